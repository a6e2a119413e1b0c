"""The HTML report of a run, or of several runs side by side: ``python -m training.report RUN [RUN2 ...]``.

It may be made at any time, also while a run goes on: what a run has not written yet is left out.  Which metrics are
shown, and the sentences that explain them, stand in ``templates/run_report.html.jinja``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.options import OneLineParser
from pipeline.reports.page import draw_figure, figure_label, flatten, is_finite, read_object, write_page
from pipeline.schema import PRIVATE_UMASK, REPORT_FILE, SUMMARY_FILE, UserError
from training.json_lines import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]

COMPARISON_FILE, METRICS_FILE, CONFIG_FILE = "comparison.html", "metrics.jsonl", "config.yaml"
LINKED_FILES = ("MODEL_CARD*.md", "TRIPOD_AI*.md", CONFIG_FILE, METRICS_FILE, REPORT_FILE)

NUMBERS = "Predicted over observed number"

MAX_POINTS = 500
"""Maximum number of points of a curve; neighbours are averaged where there are more."""

KINDS = {"train": ("training", "-"), "valid": ("validation", "--"), "posterior": ("training", "-")}
"""The name and the line of the curves of each kind of record; what steps record is not drawn of looks too."""

MEMORY_COLUMNS = {
    "rss_bytes": "resident",
    "uss_bytes": "unique",
    "cuda_allocated_bytes": "in tensors on the GPU",
    "cuda_reserved_bytes": "reserved on the GPU",
}
"""The columns of ``memory.csv`` that are drawn."""


class Run:
    """What a run has written into its folder so far; every file may be missing, but none be what its name does not say.

    Attributes:
        label: the name of the run in a comparison; empty without.
        records: the lines of ``metrics.jsonl``; ``last_step`` is the last one of a training step.
        profile: where the time of a step goes, from ``summary.json``; empty without.
        results: the rest of ``summary.json`` and each ``evaluation_<split>.json``, flattened.
        options: ``config.yaml``, flattened.
        predictions: those of each split, and of several tasks those of each task.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label, self.is_finished = folder, label, (folder / SUMMARY_FILE).exists()
        metrics, results = folder / METRICS_FILE, read_object(folder / SUMMARY_FILE)
        self.records = read_json_lines(metrics) if metrics.exists() else []
        steps = [record for record in self.records if record.get("kind") == "train"]
        self.last_step: dict[str, Any] = steps[-1] if steps else {}
        self.profile: dict[str, Any] = results.pop("profile", None) or {}
        results |= {path.stem.replace("_", " "): read_object(path) for path in sorted(folder.glob("evaluation_*.json"))}
        self.results, self.options = flatten(results), flatten(read_object(folder / CONFIG_FILE))
        predictions = sorted(folder.glob("predictions_*.parquet"))
        self.predictions = {path.stem.removeprefix("predictions_"): _read_predictions(path) for path in predictions}

    def curve(self, kind: str, metric: str) -> Floats:
        """Return the steps and values of a metric where they are finite, [N, 2], averaged to ``MAX_POINTS``."""
        if kind == "posterior" and metric in self.last_step:
            return np.empty((0, 2))
        pairs = [(each.get("step"), each.get(metric)) for each in self.records if each.get("kind") == kind]
        points = [pair for pair in pairs if all(map(is_finite, pair))]
        pieces = np.array_split(np.array(points, np.float64), min(len(points), MAX_POINTS)) if points else []
        return np.array([piece.mean(axis=0) for piece in pieces]).reshape(-1, 2)

    def links(self, page: Path) -> dict[str, str]:
        """Return the address, relative to a page, of each of ``LINKED_FILES`` that exists."""
        existing = [path.name for name in LINKED_FILES for path in sorted(self.folder.glob(name))]
        return {name: quote(os.fsencode(os.path.relpath(self.folder / name, page.parent))) for name in existing}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    parser = OneLineParser(prog="python -m training.report", description="Show a run, or compare several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Output folder of a run of train.py.")
    default = f"By default {REPORT_FILE} in RUN; for several runs {COMPARISON_FILE} in the first."
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=f"Path of the page. {default}")
    try:
        options = parser.parse_args(arguments)
        for run in options.runs:
            if not any(any(run.glob(name)) for name in (METRICS_FILE, CONFIG_FILE, "evaluation_*.json")):
                raise UserError(f"{run}: not the output of a run; give the --output_dir of train.py")
        print(write_run_report(*options.runs, output=options.output))
    except (UserError, OSError) as error:
        print(f"training.report: {error}", file=sys.stderr)
        return 2
    return 0


def write_run_report(*folders: Path, output: Path | None = None) -> Path:
    """Write the report of one run, or a page that compares several, from whatever they have written so far.

    ``output`` is by default ``report.html`` in the folder of the run, and of several ``comparison.html`` in the first.
    """
    several, names = len(folders) > 1, [folder.resolve().name for folder in folders]
    labels = [f"{number}: {name}" if several else "" for number, name in enumerate(names, start=1)]
    runs = [Run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    page = output or folders[0] / (COMPARISON_FILE if several else REPORT_FILE)
    memory = [] if several else [path for path in sorted(folders[0].glob("memory*.csv")) if path.stat().st_size]
    return write_page(
        page,
        "run_report.html.jinja",
        package="training",
        draw_curves=functools.partial(_draw_curves, runs),
        memory={path.stem: _draw_memory(path) for path in memory},
        names=names,
        options=_side_by_side([run.options for run in runs]),
        page=page,
        predictions={split: _draw_predictions(runs, split) for run in runs for split in run.predictions},
        profile=_draw_profile(runs[0].profile.get("parts", {})),
        results=_side_by_side([run.results for run in runs]),
        runs=runs,
    )


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every name in all columns; None where a column lacks the name."""
    return {name: [column.get(name) for column in columns] for name in dict.fromkeys(chain.from_iterable(columns))}


def _draw_curves(
    runs: Sequence[Run], panels: Mapping[str, str], *, scale: float = 1.0, from_zero: bool = False
) -> str | None:
    """Return an image with a panel for each metric that a run recorded; ``panels`` has their titles."""

    def draw(axis: Axes, metric: str) -> None:
        for number, run in enumerate(runs):
            for kind, (name, line) in KINDS.items():
                points, label = run.curve(kind, metric), f"{figure_label(run.label)} {name}".strip()
                colour = number if len(runs) > 1 else [*KINDS].index(kind)
                style = f"C{colour % 6}{'.' if len(points) < 10 else ''}{line}"
                if len(points):
                    axis.plot(points[:, 0], scale * points[:, 1], style, label=label)
        axis.set(xlabel="step", ylim=(0, None) if from_zero else None)

    metrics = [metric for metric in panels if any(len(run.curve(kind, metric)) for run in runs for kind in KINDS)]
    return draw_figure({panels[metric]: functools.partial(draw, metric=metric) for metric in metrics})


class Predictions(NamedTuple):
    """Labels and what was predicted, each [P], of the labelled samples of a split; of several classes they are names.

    ``is_binary`` says that labels are 0 or 1, and predictions probabilities.
    """

    label: npt.NDArray[Any]
    prediction: npt.NDArray[Any]
    is_binary: bool


def _read_predictions(path: Path) -> Predictions:
    """Return the predictions of the labelled samples of a file that ``training.predictions`` wrote."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            is_binary = "probability" in file.schema_arrow.names
            name = "probability" if is_binary else "prediction"
            number = pa.string() if pa.types.is_string(file.schema_arrow.field("label").type) else pa.float64()
            table = file.read(["label", name]).cast(pa.schema([("label", number), (name, number)]))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as predictions ({reason}); evaluate again") from None
    label, prediction = (column.to_numpy() for column in table.filter(table["label"].is_valid()).columns)
    return Predictions(label, prediction, is_binary)


def _draw_predictions(runs: Sequence[Run], split: str) -> str | None:
    """Return an image of the ROC, precision-recall and calibration curves, or of predicted over observed numbers.

    None where no run's can be drawn.
    """
    from sklearn.calibration import calibration_curve  # noqa: PLC0415 (a second that only predictions need)
    from sklearn.metrics import precision_recall_curve, roc_curve  # noqa: PLC0415

    titles = ("Sensitivity over 1 − specificity", "Precision over recall", "Observed over predicted rate", NUMBERS)
    lines: dict[str, list[tuple[int, Floats, Floats]]] = {title: [] for title in titles}
    for number, run in enumerate(runs):
        if split not in run.predictions:
            continue
        label, probability, is_binary = run.predictions[split]
        if not is_binary and label.dtype.kind == "f" and len(label):
            lines[NUMBERS].append((number, label, probability))
        if is_binary and np.array_equal(np.unique(label), [0, 1]) and ((probability >= 0) & (probability <= 1)).all():
            precision, recall, _ = precision_recall_curve(label, probability, drop_intermediate=True)
            observed, predicted = calibration_curve(label, probability, n_bins=15, strategy="quantile")
            curves = (roc_curve(label, probability)[:2], (recall, precision), (predicted, observed))
            for title, curve in zip(titles[:-1], curves, strict=True):
                lines[title].append((number, *curve))

    def draw(axis: Axes, title: str) -> None:
        for number, across, up in lines[title]:
            style = f"C{number % 6}{'.' if title == NUMBERS else '.-' if len(up) < 20 else '-'}"
            axis.plot(across, up, style, label=figure_label(runs[number].label))
        if title != "Precision over recall":
            axis.axline((0, 0), slope=1, color="C5", linewidth=0.8, linestyle=":")

    return draw_figure({title: functools.partial(draw, title=title) for title in titles if lines[title]})


def _draw_profile(parts: Mapping[str, Any]) -> str | None:
    """Return an image of the milliseconds of each part of a step; None where they were not recorded."""
    recorded = {name: row for name, row in parts.items() if name != "step" and is_finite(row.get("milliseconds"))}
    times = {figure_label(name): row["milliseconds"] for name, row in recorded.items()}

    def draw(axis: Axes) -> None:
        axis.bar_label(axis.barh([*times], [*times.values()]), fmt="{:,.4g}", padding=3)
        axis.invert_yaxis()

    return draw_figure({"Milliseconds of a step": draw} if times else {})


def _draw_memory(path: Path) -> str | None:
    """Return an image of the memory of the run's processes over time, from what ``training.monitor`` wrote."""
    types = dict.fromkeys(("seconds", *MEMORY_COLUMNS), pa.float64()) | dict.fromkeys(("role", "event"), pa.string())
    # A row that is being written has too few columns.
    rows = pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    columns = pa_csv.ConvertOptions(column_types=types, include_columns=[*types])
    try:
        table = pa_csv.read_csv(path, parse_options=rows, convert_options=columns)
    except (KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a memory profile ({reason}); move the file away") from None
    seconds, role, event = (table[name].to_numpy() for name in ("seconds", "role", "event"))

    def draw(axis: Axes) -> None:
        for process in ("main", "child"):
            for column, name in MEMORY_COLUMNS.items():
                values = table[column].to_numpy()
                known = (role == process) & np.isfinite(values)
                times, sample = np.unique(seconds[known], return_inverse=True)
                if len(times):
                    mebibytes = np.bincount(sample, weights=values[known]) / 2**20
                    axis.plot(times, mebibytes, label=f"{process}, {name}")
        for number, name in enumerate(name for name in dict.fromkeys(event) if name not in ("", "start")):
            style: dict[str, Any] = {"color": f"C{5 - number % 6}", "linestyles": ":", "label": figure_label(name)}
            axis.vlines(seconds[event == name], 0, 1, transform=axis.get_xaxis_transform(), **style)
        axis.set(xlabel="seconds", ylim=(0, None))

    return draw_figure({"Memory, MiB": draw})


if __name__ == "__main__":
    sys.exit(main())
