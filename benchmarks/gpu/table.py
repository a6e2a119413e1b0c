"""Print the results of ``benchmarks/gpu.sh`` as a table of at most 60 lines.

    python -m benchmarks.gpu.table DIRECTORY

Files that are missing, unfinished or of a part that failed are shown as such.  This imports the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PARTS = ("checks", "speed", "launches", "prefetch", "training", "loop")
MAX_LINES, MAX_COLUMNS = 60, 160
NOT_MEASURED = "not measured"

Content = dict[str, Any]


def main() -> None:
    print("\n".join(tabulate(read_results(Path(sys.argv[1])))))


def read_results(directory: Path) -> dict[str, Content]:
    """Return the content of each part's file; a part without a readable file has only a state."""
    results = {}
    for part in PARTS:
        path = directory / f"{part}.json"
        try:
            results[part] = json.loads(path.read_text())
        except FileNotFoundError:
            results[part] = {"state": "did not run"}
        except ValueError:
            results[part] = {"state": "unreadable"}
    return results


def tabulate(results: dict[str, Content]) -> list[str]:
    """Return the lines of the table."""
    lines = [*head(results), ""]
    for part, content in results.items():
        seconds = f", {content['seconds']:.0f} s" if "seconds" in content else ""
        lines.append(f"{part}: {content['state']}{seconds}")
        if content["state"].startswith(("failed", "cut off")) and content.get("log"):
            lines.append(f"  last line: {content['log'][-1]}")
        try:
            lines += [f"  {line}" for line in DETAILS[part](content)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            lines.append(f"  cannot be shown: {type(error).__name__}: {error}")
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... {len(lines) - MAX_LINES + 1} more lines: see the JSON files"]
    return [line if len(line) <= MAX_COLUMNS else line[: MAX_COLUMNS - 1] + "…" for line in lines]


def head(results: dict[str, Content]) -> list[str]:
    content = next((content for content in results.values() if "card" in content), None)
    if content is None:
        return ["no part has written a result"]
    versions = ", ".join(f"{name} {content[name]}" for name in ("python", "torch", "cuda", "triton"))
    on_gpu = any(content.get("device") == "cuda" for content in results.values())
    note = [] if on_gpu else ["PyTorch saw no GPU: all figures are the CPU's, and say nothing about a GPU."]
    card = f"card {content['card']}, driver {content['driver']}; {content['processor']}"
    return [card, f"{content['date']}, {versions}, commit {content['commit']}", *note]


def number(value: float | None, digits: int = 1) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def gigabytes(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 1e9:.2f} GB"


def show_checks(content: Content) -> Iterator[str]:
    tests = content.get("tests", [])
    outcomes = [test["outcome"] for test in tests]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if "tests" in content:
        yield counts if content["device"] == "cuda" else f"{counts}; a rehearsal on the CPU, GPU {NOT_MEASURED}"
    if content.get("running") and content["state"] != "done":
        yield f"was running: {content['running']}"
    failed = [test for test in tests if test["outcome"] == "failed"]
    for test in failed[:8]:
        yield f"FAILED {test['test']}: {' '.join(test.get('message', '').split())}"
    if len(failed) > 8:
        yield f"... and {len(failed) - 8} more"


def show_speed(content: Content) -> Iterator[str]:
    rows = content.get("rows", [])
    cells = {(row["preset"], row["batch_size"], row["precision"]): row for row in rows}
    measured = sorted({(row["preset"], row["batch_size"]) for row in rows if not is_left_out(row)})
    if measured:
        title = f"{'steps/s':>10}{'patients/s':>12}{'× batch 1':>11}{'peak GPU':>14}"
        yield f"{'':<16}{'fp32':^47}{'bf16':^47}".rstrip()
        yield f"{'preset':<10}{'batch':>6}{title}{title}"
    for preset, size in measured:
        line = f"{preset:<10}{size:>6}"
        for precision in ("fp32", "bf16"):
            row = cells.get((preset, size, precision), {})
            if "steps_per_second" not in row:
                line += f"{row.get('note', NOT_MEASURED)[:45]:>47}"
                continue
            alone = cells.get((preset, 1, precision), {}).get("patients_per_second")
            ratio = f"{row['patients_per_second'] / alone:.2f}" if alone else NOT_MEASURED
            rates = f"{number(row['steps_per_second'], 2):>10}{number(row['patients_per_second']):>12}"
            line += f"{rates}{ratio:>11}{gigabytes(row['peak_cuda_bytes']):>14}"
        yield line
    left_out = sorted({row["batch_size"] for row in rows if is_left_out(row)})
    if left_out:
        yield f"batch {', '.join(map(str, left_out))}: left out here"


def is_left_out(row: Content) -> bool:
    return str(row.get("note", "")).startswith("left out")


def show_launches(content: Content) -> Iterator[str]:
    for row in content.get("rows", []):
        idle = row["idle_share"]
        times = f"step {row['step_milliseconds']:.1f} ms, of which GPU busy {number(row['busy_milliseconds'])}"
        share = NOT_MEASURED if idle is None else f"{idle:.0%}"
        waits = NOT_MEASURED if row["waits"] is None else f"{sum(row['waits'].values()):.1f}"
        counts = f"launches {number(row['launches'], 0)}, idle {share}, waits {waits}"
        yield f"{row['preset']:<10}{row['precision']}: {times}; {counts}; host operations {row['host_operations']:,.0f}"


def show_prefetch(content: Content) -> Iterator[str]:
    for row in content.get("rows", []):
        wait = row["data_wait_fraction"]
        waiting = NOT_MEASURED if wait is None else f"{wait:.1%}"
        rate = number(row["patients_per_second"])
        graphs = " --cuda_graphs" if row["cuda_graphs"] else ""
        workers = f" --prefetch_workers {row['prefetch_workers']}" if row["prefetch_workers"] else ""
        flags = f"--prefetch {row['prefetch']}{workers}{graphs}"
        yield f"{flags}: {rate} patients/s, waiting for data {waiting}{ending(row)}"


def show_training(content: Content) -> Iterator[str]:
    if "flags" not in content:
        return
    flags, summary, valid = content["flags"], content["summary"], content["valid"] or {}
    asked = " ".join(f"--{name} {value}" for name, value in flags.items() if name != "data_dir")
    yield f"{asked}{ending(content)}"
    test = summary.get("test") or {}
    quality = f"validation AUROC {number(valid.get('auroc'), 4)}, test AUROC {number(test.get('auroc'), 4)}"
    steps, peak = summary.get("steps", content["steps"]), summary.get("peak_cuda_bytes")
    figures = f"{number(content['patients_per_second'])} patients/s, {number(steps, 0)} steps"
    yield f"{figures}, {content['wall_seconds']:.1f} s in all, peak GPU {gigabytes(peak)}"
    yield quality


def ending(run: Content) -> str:
    """Say how a run of ``train.py`` ended, unless it ended by itself and well."""
    endings = {0: "", 143: f" (stopped: {run['stopped_by']})"}
    last = run["printed"][-1] if run["printed"] else "nothing printed"
    return endings.get(run["exit_code"], f" (FAILED, exit code {run['exit_code']}: {last})")


def show_loop(content: Content) -> Iterator[str]:
    for row in content.get("rows", []):
        rates = f"batch of {content['batch_size']} {number(row['batch_patients_per_second'])} patients/s"
        loop = f"loop over patients and sets {number(row['loop_patients_per_second'], 2)}"
        yield f"{row['preset']:<10}{content['precision']}: {rates}, {loop}, ratio {number(row['times_the_loop'])}"


DETAILS: dict[str, Callable[[Content], Iterator[str]]] = {
    "checks": show_checks,
    "speed": show_speed,
    "launches": show_launches,
    "prefetch": show_prefetch,
    "training": show_training,
    "loop": show_loop,
}


if __name__ == "__main__":
    main()
