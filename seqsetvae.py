"""The installed commands, ``seqsetvae-train`` and others, and the check that nothing hides a package of this project.

The packages are called ``pipeline``, ``model`` and ``training``, as files of other people are too.  This file has a
name of its own, and so is found whatever lies in the folder from which a command is run, or in ``PYTHONPATH``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent


def find_hidden_package(names: Sequence[str]) -> str | None:
    """Return one line about the first of the packages that Python would import from elsewhere; None if none is."""
    for name in names:
        spec = find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
        found = [Path(place).resolve() for place in places if place]
        if found and not any(path.is_relative_to(HOME / name) or path == HOME / f"{name}.py" for path in found):
            advice = "rename it, or run from another folder and without it in PYTHONPATH"
            return f"{found[0]} hides the package {name} of SeqSetVAE; {advice}"
    return None


def run_command(command: str, module: str) -> int:
    """Run ``main()`` of a module of this project; return its exit code, 2 if something hides one of its packages."""
    if line := find_hidden_package(("pipeline", "model", "training", module.partition(".")[0])):
        print(f"{command}: {line}", file=sys.stderr)
        return 2
    return int(import_module(module).main())


preprocess = partial(run_command, "seqsetvae-preprocess", "preprocess")
train = partial(run_command, "seqsetvae-train", "train")
report = partial(run_command, "seqsetvae-report", "training.report")
predict = partial(run_command, "seqsetvae-predict", "training.predict")
plan = partial(run_command, "seqsetvae-plan", "pipeline.plan")
tasks = partial(run_command, "seqsetvae-tasks", "pipeline.tasks")
