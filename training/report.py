"""The HTML report of a run, or of several runs side by side: ``python -m training.report RUN [RUN2 ...]``.

It may be made at any time, also while a run goes on: what a run has not written yet is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import yaml

from pipeline.options import check_section, option, parse_options
from pipeline.reports.page import (
    COLOURS,
    draw_figure,
    figure_label,
    flatten,
    is_finite,
    read_object,
    write_page,
)
from pipeline.schema import PRIVATE, REPORT_FILE, SUMMARY_FILE, UserError
from training.metrics import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]

COMPARISON_FILE, METRICS_FILE, CONFIG_FILE = "comparison.html", "metrics.jsonl", "config.yaml"
LINKED_FILES = ("MODEL_CARD.md", CONFIG_FILE, METRICS_FILE, REPORT_FILE)

MAX_POINTS = 500
"""Maximum number of points of a curve; neighbours are averaged where there are more."""

KINDS = {"train": ("training", "-"), "valid": ("validation", "--")}
"""The name and the line of the curve of each kind of record."""


class Panel(NamedTuple):
    """A plot of one metric over the steps of training, which it shows ``scale`` times as large."""

    metric: str
    title: str
    scale: float = 1.0


CURVES = {
    "losses": (
        Panel("loss", "Total loss"),
        Panel("reconstruction", "Reconstruction"),
        Panel("kl", "KL divergence"),
        Panel("classification", "Classification"),
    ),
    "discrimination": (Panel("auroc", "AUROC"), Panel("auprc", "AUPRC")),
    "optimisation": (
        Panel("learning_rate", "Learning rate"),
        Panel("beta", "Weight of the KL divergence"),
        Panel("grad_norm", "Norm of the gradient"),
    ),
    "collapse": (
        Panel("active_units", "Active units"),
        Panel("mean_posterior_variance", "Mean posterior variance"),
    ),
    "throughput": (
        Panel("patients_per_second", "Patients per second"),
        Panel("events_per_second", "Events per second"),
        Panel("rss_bytes", "Resident memory, MiB", 2.0**-20),
        Panel("data_wait_fraction", "Time waiting for data, %", 100.0),
        Panel("event_padding_waste", "Padding waste of events, %", 100.0),
        Panel("set_padding_waste", "Padding waste of sets, %", 100.0),
    ),
}
"""The plots of each figure."""

MEMORY_CURVES = {
    "main process, resident": ("main", "rss_bytes"),
    "main process, unique": ("main", "uss_bytes"),
    "child processes, resident": ("child", "rss_bytes"),
    "child processes, unique": ("child", "uss_bytes"),
    "GPU, in tensors": ("main", "cuda_allocated_bytes"),
    "GPU, reserved": ("main", "cuda_reserved_bytes"),
}
"""The role of the processes and the column of ``memory.csv`` of each curve."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Report."""

    runs: tuple[str, ...] = option((), "Output folder of a run; several runs are compared.", metavar="RUN")
    output: str | None = option(
        None, "Path of the page. By default report.html in RUN; of several runs comparison.html in the first."
    )

    __post_init__ = check_section


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The options of the command."""

    report: ReportOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run has written so far.

    Attributes:
        folder: the output folder of training.
        label: the run's name in figures.
        records: the lines of ``metrics.jsonl``.
        results: ``summary.json`` and each ``evaluation_<split>.json``, flattened.
        profile: where the time of a step goes, if it was recorded.
        predictions: labels and probabilities of the labelled samples of each split.
        options: ``config.yaml``, flattened.
    """

    folder: Path
    label: str
    records: list[dict[str, Any]]
    results: dict[str, Any]
    profile: dict[str, Any]
    predictions: dict[str, tuple[Floats, Floats]]
    options: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, label: str = "") -> Run:
        """Read the folder of a run, in which every file may be missing.

        Raises:
            UserError: a file is there and is not what its name says.
        """
        metrics, summary = folder / METRICS_FILE, read_object(folder / SUMMARY_FILE)
        profile = summary.pop("profile", None)
        summary |= {path.stem.replace("_", " "): read_object(path) for path in sorted(folder.glob("evaluation_*.json"))}
        predictions = sorted(folder.glob("predictions_*.parquet"))
        return cls(
            folder=folder,
            label=label,
            records=read_json_lines(metrics) if metrics.exists() else [],
            results=flatten(summary),
            profile=profile if isinstance(profile, dict) else {},
            predictions={path.stem.removeprefix("predictions_"): _read_predictions(path) for path in predictions},
            options=flatten(read_object(folder / CONFIG_FILE, parse=yaml.safe_load)),
        )

    @property
    def last_step(self) -> dict[str, Any]:
        """The last record of a training step; empty before the first."""
        return next((record for record in reversed(self.records) if record.get("kind") == "train"), {})

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote its summary."""
        return "steps" in self.results

    def curve(self, kind: str, metric: str) -> Floats:
        """Return the steps and values of a metric where they are finite, [N, 2], averaged to ``MAX_POINTS``."""
        points = [
            (record["step"], record[metric])
            for record in self.records
            if record.get("kind") == kind and is_finite(record.get("step")) and is_finite(record.get(metric))
        ]
        pieces = np.array_split(np.array(points, np.float64), min(len(points), MAX_POINTS)) if points else []
        return np.array([piece.mean(axis=0) for piece in pieces]).reshape(-1, 2)

    def links(self, start: Path) -> dict[str, str]:
        """Return the relative address, from a page in ``start``, of each of ``LINKED_FILES`` that exists."""
        paths = {name: self.folder / name for name in LINKED_FILES}
        return {name: quote(os.fsencode(os.path.relpath(path, start))) for name, path in paths.items() if path.exists()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend."""
    os.umask(os.umask(PRIVATE) | PRIVATE)
    try:
        options = parse_options(
            CommandLine, arguments, prog="python -m training.report", description=__doc__, positional="runs"
        ).report
        for run in options.runs:
            if not any(any(Path(run).glob(name)) for name in (METRICS_FILE, CONFIG_FILE, "evaluation_*.json")):
                raise UserError(f"{run}: not the output of a run; give the --output_dir of train.py")
        output = None if options.output is None else Path(options.output)
        if output is not None and (output.is_dir() or not output.parent.is_dir()):
            raise UserError(f"--output {output}: must be a file in a folder that exists")
        print(write_run_report(*map(Path, options.runs), output=output))
    except (UserError, OSError) as error:
        print(f"training.report: {error}", file=sys.stderr)
        return 2
    return 0


def write_run_report(*folders: Path, output: Path | None = None) -> Path:
    """Write the report of one run, or a page that compares several, from whatever they have written so far.

    Args:
        folders: the output folders of training, at least one.
        output: the page; by default ``report.html`` in the folder, and of several ``comparison.html`` in the first.

    Returns:
        The path of the page.

    Raises:
        UserError: a file of a run is there and is not what its name says.
    """
    several = len(folders) > 1
    names = [folder.resolve().name for folder in folders]
    labels = [f"{number}: {figure_label(name)}" if several else "" for number, name in enumerate(names, start=1)]
    runs = [Run.read(folder, label) for folder, label in zip(folders, labels, strict=True)]
    output = output or folders[0] / (COMPARISON_FILE if several else REPORT_FILE)
    memory = [] if several else sorted(folders[0].glob("memory*.csv"))
    return write_page(
        output,
        "run_report.html.jinja",
        package="training",
        name=f"{len(runs)} runs" if several else names[0],
        runs=runs,
        several=several,
        start=output.parent,
        results=_side_by_side([run.results for run in runs]),
        last_steps=_side_by_side([run.last_step for run in runs]),
        options=_side_by_side([run.options for run in runs]),
        curves={name: _draw_curves(runs, panels, from_zero=name == "throughput") for name, panels in CURVES.items()},
        predictions={
            split: _draw_predictions(runs, split) for split in sorted({key for run in runs for key in run.predictions})
        },
        memory={path.stem: _draw_memory(path) for path in memory if path.stat().st_size},
        profile_figure=None if several else _draw_profile(runs[0].profile),
    )


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every name in all columns; None where a column lacks the name."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _read_predictions(path: Path) -> tuple[Floats, Floats]:
    """Return labels and probabilities, each [P], of the labelled samples of a file of predictions."""
    schema = pa.schema([("label", pa.float64()), ("probability", pa.float64())])
    try:
        table = pq.read_table(path, columns=schema.names, page_checksum_verification=True).cast(schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as predictions ({reason}); evaluate again") from None
    table = table.filter(pc.greater_equal(table["label"], 0))  # neither null nor NaN
    return table["label"].to_numpy(), table["probability"].to_numpy()


def _draw_curves(runs: Sequence[Run], panels: Iterable[Panel], *, from_zero: bool) -> str | None:
    """Return an image of the panels for which a run recorded anything; None where no run did."""
    filled = []
    for panel in panels:
        curves = [
            (number, kind, runs[number].curve(kind, panel.metric)) for number in range(len(runs)) for kind in KINDS
        ]
        if any(len(points) for _, _, points in curves):
            filled.append((panel, [curve for curve in curves if len(curve[2])]))
    if not filled:
        return None

    def draw(axes: list[Axes]) -> None:
        labelled = {}
        for axis, (panel, curves) in zip(axes, filled, strict=False):
            for number, kind, points in curves:
                name, line = KINDS[kind]
                colour = COLOURS[(number if len(runs) > 1 else [*KINDS].index(kind)) % len(COLOURS)]
                marker = "." if len(points) < 30 else None
                (drawn,) = axis.plot(points[:, 0], points[:, 1] * panel.scale, line, color=colour, marker=marker)
                labelled[f"{runs[number].label} {name}".strip()] = drawn
            axis.set(title=panel.title, xlabel="step", ylim=(0, None) if from_zero else None)
        for axis in axes[len(filled) :]:
            axis.set_axis_off()
        axes[0].figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)

    columns = 2 if len(filled) == 4 else min(len(filled), 3)
    return draw_figure(-(-len(filled) // columns), columns, draw)


def _draw_predictions(runs: Sequence[Run], split: str) -> str | None:
    """Return an image of the ROC, precision-recall and calibration curves; None where no run's can be drawn."""
    from sklearn.calibration import calibration_curve  # noqa: PLC0415 (a second that only predictions need)
    from sklearn.metrics import precision_recall_curve, roc_curve  # noqa: PLC0415

    drawable = {}
    for number, run in enumerate(runs):
        label, probability = run.predictions.get(split, (np.zeros(0), np.zeros(0)))
        if np.array_equal(np.unique(label), [0, 1]) and ((probability >= 0) & (probability <= 1)).all():
            drawable[number] = label, probability
    if not drawable:
        return None

    def draw(axes: list[Axes]) -> None:
        dotted: dict[str, Any] = {"color": COLOURS[-1], "linewidth": 0.8, "linestyle": ":"}
        for number, (label, probability) in drawable.items():
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": runs[number].label}
            false_positive_rate, true_positive_rate, _ = roc_curve(label, probability)
            precision, recall, _ = precision_recall_curve(label, probability, drop_intermediate=True)
            observed, predicted = calibration_curve(label, probability, n_bins=15, strategy="quantile")
            axes[0].plot(false_positive_rate, true_positive_rate, **style)
            axes[1].plot(recall, precision, **style)
            axes[1].axhline(label.mean(), **dotted)
            axes[2].plot(predicted, observed, marker="o", markersize=3, **style)
        for axis in (axes[0], axes[2]):
            axis.axline((0, 0), slope=1, **dotted)
        axes[0].set(title="ROC", xlabel="1 − specificity", ylabel="sensitivity")
        axes[1].set(title="Precision and recall", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
        axes[2].set(title="Calibration", xlabel="predicted probability", ylabel="observed rate")
        if len(runs) > 1:
            axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    return draw_figure(1, 3, draw)


def _draw_profile(profile: Mapping[str, Any]) -> str | None:
    """Return an image of the time of each part of a step; None where it was not recorded."""
    rows = profile.get("parts") or {}
    parts = {figure_label(name): row["milliseconds"] for name, row in rows.items() if name != "step"}

    def draw(axes: list[Axes]) -> None:
        bars = axes[0].barh([*parts], [*parts.values()])
        axes[0].bar_label(bars, fmt="{:,.2f}", padding=3)
        axes[0].invert_yaxis()
        axes[0].grid(axis="y", visible=False)
        axes[0].set(xlabel="milliseconds of a step")

    return draw_figure(1, 1, draw) if parts else None


def _draw_memory(path: Path) -> str:
    """Return an image of the memory of the run's processes over time.

    Raises:
        UserError: the file is not what ``training.monitor`` writes.
    """
    columns = {name: pa.float64() for name in ("seconds", *dict.fromkeys(name for _, name in MEMORY_CURVES.values()))}
    columns |= {"role": pa.string(), "event": pa.string()}
    try:
        table = pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda row: "skip"),
            convert_options=pa_csv.ConvertOptions(column_types=columns, include_columns=[*columns]),
        )
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a memory profile ({reason}); move the file away") from None
    column = {name: table[name].to_numpy() for name in columns}
    seconds = column["seconds"]

    def draw(axes: list[Axes]) -> None:
        axis = axes[0]
        for label, (role, name) in MEMORY_CURVES.items():
            known = (column["role"] == role) & np.isfinite(column[name])
            times, sample = np.unique(seconds[known], return_inverse=True)
            if len(times):
                axis.plot(times, np.bincount(sample, weights=column[name][known]) / 2**20, label=label)
        axis.set(xlabel="seconds", ylabel="MiB", ylim=(0, None))
        events = [event for event in dict.fromkeys(column["event"]) if event not in ("", "start")]
        for event, colour in zip(events, reversed(COLOURS), strict=False):
            times = seconds[column["event"] == event]
            style: dict[str, Any] = {"linewidth": 0.9, "linestyle": ":", "color": colour, "label": figure_label(event)}
            axis.vlines(times, 0, 1, transform=axis.get_xaxis_transform(), **style)
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    return draw_figure(1, 1, draw)


if __name__ == "__main__":
    sys.exit(main())
