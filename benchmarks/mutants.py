"""Small changes to a file, one at a time: does a test fail for each?

    python -m benchmarks.mutants model/losses.py tests/model/test_losses.py [--most 60] [--output FILE.json]

A mutant has one comparison, operator, number or boolean word changed.  Each is tried in a fork of this process, which
has imported what is slow; a mutant that takes ten times as long as the file itself counts as found.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401

from benchmarks.machine import describe

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Nodes by their number in a walk, that can be changed, and how."""
    annotations = {id(part) for node in ast.walk(tree) for part in _annotations(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in annotations:
            continue
        if type(getattr(node, "op", None)) in SWAPS:
            yield number, "op"
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield number, "ops"
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield number, "value"


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        if getattr(node, name, None) is not None:
            yield from ast.walk(getattr(node, name))


def mutant(tree: ast.Module, number: int, how: str) -> tuple[ast.Module, str]:
    changed = copy.deepcopy(tree)
    node: Any = list(ast.walk(changed))[number]
    before = ast.unparse(node)
    if how == "op":
        node.op = SWAPS[type(node.op)]()
    elif how == "ops":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    else:
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    return changed, f"line {node.lineno}: {before} -> {ast.unparse(node)}"


def survives(tree: ast.Module, file: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass with the file's code replaced."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            name = ".".join(file.with_suffix("").parts)
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            exec(compile(tree, str(file), "exec"), module.__dict__)
            setattr(importlib.import_module(name.rpartition(".")[0]), file.stem, module)
            code = int(pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]))
        except BaseException:
            code = 1
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--most", type=int, help="a sample of so many")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    tree = ast.parse(given.file.read_text())
    started = time.monotonic()
    assert survives(tree, given.file, given.tests, 600), "the tests must pass with the file as it is"
    seconds = 10 * (time.monotonic() - started)
    found = list(places(tree))
    tried = random.Random(0).sample(found, min(given.most or len(found), len(found)))
    alive = []
    for number, how in tried:
        changed, what = mutant(tree, number, how)
        if survives(ast.fix_missing_locations(changed), given.file, given.tests, seconds):
            alive.append(what)
            print(what, flush=True)
    result = {"mutants": len(found), "tried": len(tried), "found": len(tried) - len(alive), "alive": sorted(alive)}
    print(json.dumps(result, indent=1))
    if given.output:
        earlier = json.loads(given.output.read_text()) if given.output.exists() else {}
        content = {**earlier, "machine": describe(), str(given.file): result}
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
