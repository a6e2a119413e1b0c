"""The HTML report of a run."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.reports.page import (
    COLOURS,
    Share,
    figure,
    flatten,
    is_finite,
    preformatted,
    read_summary,
    section,
    table,
    write_page,
)
from pipeline.schema import SUMMARY_FILE, UserError
from training.metrics import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PROCESSES = 4
"""Processes with curves of their own in the plot of memory; those of the others are summed."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a run's metrics over its steps.

    Attributes:
        title: above the plot.
        names: of the metrics, or patterns of names.
        kinds: of the records that hold them.
        from_zero: whether the vertical axis begins there.
    """

    title: str
    names: tuple[str, ...]
    kinds: tuple[str, ...] = ("train", "valid")
    from_zero: bool = False


RUN_FIGURES = {
    "Losses": (
        Panel("Total", ("loss",)),
        Panel("Reconstruction", ("reconstruction",)),
        Panel("KL divergence", ("kl",)),
        Panel("Classification", ("classification",)),
    ),
    "Validation": (
        Panel("Discrimination", ("auroc", "auprc"), ("valid",)),
        Panel("Error of the probabilities", ("brier", "ece"), ("valid",)),
    ),
    "Optimisation": (
        Panel("Learning rate", ("learning_rate",)),
        Panel("Weight of the KL divergence", ("beta",)),
        Panel("Norm of the gradient", ("grad_norm",)),
    ),
    "Throughput": (
        Panel("Patients per second", ("patients_per_second",), ("train",), from_zero=True),
        Panel("Events per second", ("events_per_second",), ("train",), from_zero=True),
        Panel("Waiting and padding, fractions", ("data_wait_fraction", "*_padding_waste"), ("train",), from_zero=True),
        Panel("Resident bytes of the main process", ("rss_bytes",), ("train",), from_zero=True),
    ),
    "Posterior collapse": (
        Panel("KL divergence by level, nats a set", ("kl_level_*",)),
        Panel("Active units by level", ("active_units_*",), from_zero=True),
        Panel("Mean posterior variance by level", ("mean_posterior_variance_*",)),
    ),
}


RUN_HEADLINE = (
    "test auroc",
    "test auprc",
    "test brier",
    "best auroc",
    "best auprc",
    "best epoch",
    "stopped_by",
    "steps",
    "seconds",
    "patients_per_second",
    "data_wait_fraction",
    "event_padding_waste",
    "peak_rss_bytes",
    "peak_cuda_bytes",
)


def write_run_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from whatever a run has written so far; its path.

    Reads ``metrics.jsonl``, ``summary.json``, ``evaluation_<split>.json``, ``config.yaml``, ``memory*.csv`` and
    ``predictions_<split>.parquet`` (``label``, null where unlabelled; ``probability``); each may be missing.

    Raises:
        UserError: one of them is there and is not what its name says.
    """
    metrics_file = run_dir / "metrics.jsonl"
    records = read_json_lines(metrics_file) if metrics_file.exists() else []
    whole_summary = read_summary(run_dir / SUMMARY_FILE)
    profile = whole_summary.pop("profile", None)
    summary = dict(flatten(whole_summary))
    headline = {name: summary[name] for name in RUN_HEADLINE if name in summary} or summary
    if not headline:
        last: dict[str, Any] = next((record for record in reversed(records) if record.get("kind") == "train"), {})
        headline = {"state": "no summary yet: running, or ended early"} | last
    sections = [
        section(f"Evaluation: {path.stem.removeprefix('evaluation_')}", table((), flatten(read_summary(path))))
        for path in sorted(run_dir.glob("evaluation_*.json"))
    ]
    sections += [
        section(f"Predictions: {path.stem.removeprefix('predictions_')}", *_predictions_figure(path))
        for path in sorted(run_dir.glob("predictions_*.parquet"))
    ]
    sections += [
        section(title, image) for title, panels in RUN_FIGURES.items() if (image := _metrics_figure(records, panels))
    ]
    if profile:
        sections.append(section("Where the time goes", *_profile_figure(profile)))
    for path in sorted(run_dir.glob("memory*.csv")):
        image = figure("Memory over time", 1, 1, functools.partial(_draw_memory, path))
        sections.append(section(f"Memory: {path.stem}", image, "Resident memory counts shared pages in each process."))
    events = [record for record in records if record.get("kind") == "event"]
    if events:
        names = list(dict.fromkeys(name for record in events for name in record if name != "kind"))
        rows = [[record.get(name) for name in names] for record in events]
        sections.append(section("Events of the run", table(names, rows)))
    if rest := [(name, value) for name, value in summary.items() if name not in headline]:
        sections.append(section("Summary", table((), rest)))
    if (config_file := run_dir / "config.yaml").exists():
        sections.append(section("Configuration", preformatted(config_file.read_text("utf-8", errors="replace"))))
    return write_page(run_dir, "Run report", headline, sections)


def _metrics_figure(records: list[dict[str, Any]], panels: Iterable[Panel]) -> str:
    """The panels for which something was recorded, side by side; empty where nothing was."""
    names = sorted({name for record in records for name in record})
    filled = []
    for panel in panels:
        wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in panel.names)]
        curves = {(kind, name): _series(records, kind, name) for kind in panel.kinds for name in wanted}
        if curves := {key: (steps, values) for key, (steps, values) in curves.items() if steps}:
            filled.append((panel, curves))
    if not filled:
        return ""

    def draw(axes: list[Axes]) -> None:
        for axis, (panel, curves) in zip(axes, filled, strict=False):
            kinds, wanted = (set(column) for column in zip(*curves, strict=True))
            for (kind, name), (steps, values) in curves.items():
                label = kind if len(wanted) == 1 else name if len(kinds) == 1 else f"{name}, {kind}"
                axis.plot(steps, values, label=label, marker="." if len(steps) < 30 else None)
            axis.set(title=panel.title, xlabel="step", ylim=(0, None) if panel.from_zero else None)
            if len(curves) > 1:
                axis.legend(fontsize="small")
        for axis in axes[len(filled) :]:
            axis.set_axis_off()

    columns = len(filled) if len(filled) < 4 else 2
    return figure(", ".join(panel.title for panel, _ in filled), -(-len(filled) // columns), columns, draw)


def _series(records: list[dict[str, Any]], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it is a finite number."""
    points = [
        (record["step"], record[name])
        for record in records
        if record.get("kind") == kind and is_finite(record.get("step")) and is_finite(record.get(name))
    ]
    return [step for step, _ in points], [value for _, value in points]


def _profile_figure(profile: dict[str, Any]) -> tuple[str, str]:
    """Time of a step's parts as bars and a table, and what that is of the machine's matrix rate."""
    parts = {name: row for name, row in profile["parts"].items() if name != "step"}

    def draw(axes: list[Axes]) -> None:
        bars = axes[0].barh([*parts], [row["milliseconds"] for row in parts.values()])
        axes[0].bar_label(bars, [f"{row['share']:.1%}" for row in parts.values()], padding=3)
        axes[0].invert_yaxis()
        axes[0].grid(axis="y", visible=False)
        axes[0].set(xlabel="ms a step, recorded")

    rows = [
        (name, row["milliseconds"], Share(row["share"]), row["gflop"] or None, row["gflops"] or None)
        for name, row in profile["parts"].items()
    ]
    note = (
        f"Mean of {profile['recorded_steps']} steps, {profile['device']}, {profile['precision']}; their trace is in "
        f"trace.json.gz. {'Not recorded, a' if profile['timed_steps'] else 'A'} step takes "
        f"{profile['step_milliseconds']:,.1f} ms: {profile['step_gflops']:,.1f} GFLOP/s, "
        f"{profile['share_of_matrix_rate']:.1%} of the {profile['matrix_gflops']:,.0f} that large matrices reach."
    )
    return figure("Where the time goes", 1, 1, draw) + table(("part", "ms", "share", "GFLOP", "GFLOP/s"), rows), note


def _draw_memory(path: Path, axes: list[Axes]) -> None:
    axis = axes[0]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("event") is not None]  # a last row cut short: none
        seconds = np.array([float(row["seconds"]) for row in rows])
        mebibytes = {
            name: np.array([float(row[f"{name}_bytes"] or "nan") / 2**20 for row in rows])
            for name in ("rss", "uss", "cuda_allocated", "cuda_reserved")
        }
        process = np.array(["main process" if row["role"] == "main" else f"process {row['pid']}" for row in rows])
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not a memory profile ({error}); move the file away") from None

    def draw(of: npt.NDArray[np.bool_], name: str, label: str, **style: Any) -> None:
        """The sum over the rows ``of`` at every sample, where it is known."""
        known = of & np.isfinite(mebibytes[name])
        moments, sample = np.unique(seconds[known], return_inverse=True)
        if len(moments):
            axis.plot(moments, np.bincount(sample, weights=mebibytes[name][known]), label=label, **style)

    peak = {name: float(mebibytes["rss"][process == name].max()) for name in dict.fromkeys(process.tolist())}
    drawn = sorted(peak, key=lambda name: (name != "main process", -peak[name]))[:MAX_PROCESSES]
    curves = [(name, process == name) for name in drawn]
    if len(peak) > len(drawn):
        curves.append((f"{len(peak) - len(drawn)} others", ~np.isin(process, drawn)))
    for number, (name, of) in enumerate(curves):
        colour: Any = COLOURS[number % len(COLOURS)]
        draw(of, "rss", f"{name}, resident", color=colour)
        draw(of, "uss", f"{name}, unique", color=colour, linestyle="--")
    for name in ("cuda_allocated", "cuda_reserved"):
        draw(process == "main process", name, name.replace("_", ", ").replace("cuda", "CUDA"), linestyle="-.")
    curve_lines = axis.get_lines()
    marks: dict[str, Any] = {}
    for second, event in zip(seconds, (row["event"] for row in rows), strict=True):
        if event and event != "start":
            colour = marks[event].get_color() if event in marks else COLOURS[-1 - len(marks) % len(COLOURS)]
            marks[event] = axis.axvline(second, color=colour, linewidth=0.9, linestyle=":")
    axis.set(xlabel="seconds", ylabel="MiB")
    if curve_lines:
        axis.set_ylim(0, 1.05 * axis.dataLim.ymax)
        axis.figure.legend(handles=curve_lines, loc="outside lower center", ncols=4, fontsize="small")
    if marks:
        names = [event.replace("$", r"\$") for event in marks]
        axis.figure.legend([*marks.values()], names, loc="outside upper center", ncols=6)


def _predictions_figure(path: Path) -> tuple[str, str]:
    """ROC, precision-recall and calibration curves of the labelled patients of one file, and what they show."""
    from sklearn.calibration import calibration_curve  # noqa: PLC0415 (a second that only predictions need)
    from sklearn.metrics import precision_recall_curve, roc_curve  # noqa: PLC0415

    try:
        predictions = pq.read_table(path, columns=["label", "probability"], page_checksum_verification=True)
        predictions = predictions.filter(pc.greater_equal(predictions["label"], 0))  # null is not kept either
        label, probability = predictions["label"].to_numpy(), predictions["probability"].to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as predictions ({error}); evaluate again") from None
    note = f"{len(label):,} labelled patients, {int(label.sum()):,} positive."
    if len(np.unique(label)) < 2 or not np.isfinite(probability).all():
        return "", f"{note} No curves: they need patients of both classes, and finite probabilities."

    def draw(axes: list[Axes]) -> None:
        false_rate, true_rate, _ = roc_curve(label, probability)
        precision, recall, _ = precision_recall_curve(label, probability, drop_intermediate=True)
        observed, predicted = calibration_curve(label, probability, n_bins=15, strategy="quantile")
        dotted: dict[str, Any] = {"color": COLOURS[-1], "linewidth": 0.8, "linestyle": ":"}
        axes[0].plot(false_rate, true_rate)
        axes[0].axline((0, 0), slope=1, **dotted)
        axes[0].set(title="ROC", xlabel="1 − specificity", ylabel="sensitivity")
        axes[1].plot(recall, precision)
        axes[1].axhline(label.mean(), **dotted)
        axes[1].set(title="Precision and recall", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
        axes[2].plot(predicted, observed, marker="o", markersize=3)
        axes[2].axline((0, 0), slope=1, **dotted)
        axes[2].set(title="Calibration, bins of equal mass", xlabel="predicted", ylabel="observed")

    image = figure("ROC, precision and recall, calibration", 1, 3, draw)
    return image, f"{note} Dotted: chance; in the last, perfect calibration."
