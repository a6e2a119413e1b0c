"""Self-contained HTML reports of a data directory and of a run: one file, no script, nothing loaded from elsewhere.

Text from data (variables, options, messages) is escaped and stands in tables only; figures are SVG images whose
words are ours, so that no name can break a page or a plot.
"""

from __future__ import annotations

import csv
import functools
import json
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

from pipeline.monitor import read_json_lines
from pipeline.page import COLOURS, Share, Spread, figure, histogram, preformatted, section, table, write_page
from pipeline.plan import Policy, plan_epoch
from pipeline.plan_report import padding_waste
from pipeline.schema import FIRST_CODE, SPLITS, SUMMARY_FILE, UserError
from pipeline.shards import FlatPatients, Manifest, read_index, read_shard, read_vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]

BATCH_SIZES = (4, 8, 16, 32, 64)

MAX_VARIABLES = 300
"""Rows of the table of variables; the whole vocabulary is in its own file."""

NAME_LENGTH = 100
"""Most characters of a variable's name that are shown."""

EVENTS_LOOKED_AT = 1 << 21
"""Shards are read for the values' ranges until they hold as many; they hold patients at random."""

PATIENTS_PLANNED = 1 << 16
"""Most patients that padding is worked out for."""

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

SPREAD_REACH = 4.0
"""Standard deviations on each side of the mean that the bar of a variable shows."""


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


def write_data_report(directory: Path) -> Path:
    """Write ``directory/report.html`` about the data that preprocess put there; its path.

    Raises:
        UserError: manifest, index, vocabulary or a shard is missing or damaged.
    """
    manifest = Manifest.load(directory)
    index, vocabulary = read_index(directory, manifest), read_vocabulary(directory, manifest)
    summary = _read_summary(directory / SUMMARY_FILE)
    split = next((name for name in SPLITS if manifest.splits.get(name)), "train")
    shards = _some_shards(directory, manifest, split)
    rejects, unknown = (summary.pop(name, None) or {} for name in ("rejects", "unknown_variables"))
    headline = {
        "Patients": index.num_rows,
        "Sets": sum(entry.num_sets for entries in manifest.splits.values() for entry in entries),
        "Events": sum(entry.num_events for entries in manifest.splits.values() for entry in entries),
        "Rejected rows": sum(rejects.values()),
        "Variables with events": int((vocabulary["count"].to_numpy() > 0).sum()),
        "Shards": sum(len(entries) for entries in manifest.splits.values()),
        "MiB of shards": sum(entry.num_bytes for entry in manifest.shards()) / 2**20,
    }
    looked_at = (
        f"{len(shards)} of {len(manifest.splits.get(split, []))} shards of the {split} split, "
        f"{sum(len(shard.code) for shard in shards):,} events"
    )
    set_sizes = np.concatenate([np.diff(shard.set_offsets) for shard in shards] or [np.zeros(0, np.int64)])
    lengths = (
        histogram("Events of a patient", index["num_events"].to_numpy(), "patients"),
        histogram("Sets of a patient", index["num_sets"].to_numpy(), "patients"),
        histogram("Events of a set", set_sizes, "sets"),
        histogram("Events of a patient's largest set", index["max_set_size"].to_numpy(), "patients"),
    )
    counted_in = "the data set that --like named" if manifest.options.get("like") else "the train split"
    variables_note = (
        f"The most frequent first. Events, mean and std are of {counted_in}. Values are of {looked_at}; the bar spans "
        f"{SPREAD_REACH:g} std on each side of the mean: all values pale, 5 to 95 % darker, the median a mark."
    )
    sections = [
        section("Splits", _splits_table(index), "A patient without a label is unlabelled, not negative."),
        section("Lengths", f'<div class="plots">{"".join(lengths)}</div>', f"Of a set: {looked_at}."),
        *_waste_sections(index.filter(pc.equal(index["split"], split)), split),
        section("Rejected rows", *_rejects_table(rejects, summary.get("events_in"))),
        section("Variables", _variables_table(vocabulary, shards), variables_note),
    ]
    if unknown:
        sections.append(section("Unknown variables", table(("variable", "events"), unknown.items())))
    sections += [
        section("Summary", table((), _flat(summary))),
        section("Options", preformatted(json.dumps(manifest.options, indent=1, ensure_ascii=False))),
    ]
    return write_page(directory, "Data report", headline, sections)


def write_run_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from whatever a run has written so far; its path.

    Reads ``metrics.jsonl``, ``summary.json``, ``evaluation_<split>.json``, ``config.yaml``, ``memory*.csv`` and
    ``predictions_<split>.parquet`` (``label``, null where unlabelled; ``probability``); each may be missing.

    Raises:
        UserError: one of them is there and is not what its name says.
    """
    metrics_file = run_dir / "metrics.jsonl"
    records = read_json_lines(metrics_file) if metrics_file.exists() else []
    whole_summary = _read_summary(run_dir / SUMMARY_FILE)
    profile = whole_summary.pop("profile", None)
    summary = dict(_flat(whole_summary))
    headline = {name: summary[name] for name in RUN_HEADLINE if name in summary} or summary
    if not headline:
        last: dict[str, Any] = next((record for record in reversed(records) if record.get("kind") == "train"), {})
        headline = {"state": "no summary yet: running, or ended early"} | last
    sections = [
        section(f"Evaluation: {path.stem.removeprefix('evaluation_')}", table((), _flat(_read_summary(path))))
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


# Parts of the data report.


def _some_shards(directory: Path, manifest: Manifest, split: str) -> list[FlatPatients]:
    """The first shards of a split, until ``EVENTS_LOOKED_AT``."""
    shards, num_events = list[FlatPatients](), 0
    for entry in manifest.splits.get(split, []):
        if num_events >= EVENTS_LOOKED_AT:
            break
        shards.append(read_shard(directory, entry))
        num_events += entry.num_events
    return shards


def _splits_table(index: pa.Table) -> str:
    rows: list[list[Any]] = []
    names = index["split"].unique().to_pylist()
    for name in sorted(names, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)):
        chosen = index.filter(pc.equal(index["split"], name))
        patients, labelled = chosen.num_rows, chosen.num_rows - chosen["label"].null_count
        positive = pc.sum(chosen["label"], min_count=0).as_py()
        sums = [pc.sum(chosen[column]).as_py() for column in ("num_sets", "num_events")]
        rate = Share(positive / labelled) if labelled else None
        rows.append([name, patients, Share(patients / index.num_rows), *sums, labelled, positive, rate])
    return table(("split", "patients", "share", "sets", "events", "labelled", "positive", "positive rate"), rows)


def _waste_sections(index: pa.Table, split: str) -> list[str]:
    """Padding waste of one epoch of a split's patients, of events and of sets, by policy and batch size."""
    if not index.num_rows:
        return []
    every = -(-index.num_rows // PATIENTS_PLANNED)
    num_events, num_sets = (index[column].to_numpy()[::every] for column in ("num_events", "num_sets"))
    longest, mean = int(num_events.max()), float(num_events.mean())
    wastes: dict[str, list[tuple[float, float]]] = {}
    for batch_size in BATCH_SIZES:
        budget = max(longest, round(batch_size * mean))
        policies = {
            "at random": Policy(batch_size=batch_size, bucket_by=None),
            "bucketed by events (the default)": Policy(batch_size=batch_size),
            "bucketed by sets": Policy(batch_size=batch_size, bucket_by="sets"),
            "sorted by events": Policy(batch_size=batch_size, bucket_width=0),
            "budget of padded events": Policy(batch_size=None, max_events=budget, layout="padded"),
        }
        for name, policy in policies.items():
            plan = plan_epoch(num_events, num_sets, policy, seed=0, epoch=0)
            waste = padding_waste(plan, num_events), padding_waste(plan, num_sets)
            wastes.setdefault(name, []).append(waste)
    note = f"Padded cells ÷ all cells of the padded layout, {split} split; the ragged layout has none."
    if every > 1:
        note += f" Of one patient in {every}: with all of them, bucketing wastes less."
    header = ("batches", *(f"{batch_size} patients" for batch_size in BATCH_SIZES))
    return [
        section(
            f"Expected padding waste of {axis}",
            table(header, [(name, *(Share(waste[place]) for waste in row)) for name, row in wastes.items()]),
            note if place == 0 else "A budget is the mean events of as many patients, and at least the longest one's.",
        )
        for place, axis in enumerate(("events", "sets"))
    ]


def _rejects_table(rejects: dict[str, int], events_in: int | None) -> tuple[str, str]:
    """Rows by reason, and what they are of."""
    total = sum(rejects.values())
    if not total:
        return "", "None."
    by_count = sorted(rejects.items(), key=lambda reason: (-reason[1], reason[0]))
    of_all = f" of {events_in:,} ({total / events_in:.3%})" if events_in else ""
    header = ("reason", "rows", "share of rejects")
    return table(header, [(*reason, Share(reason[1] / total)) for reason in by_count]), f"{total:,} rows{of_all}."


def _variables_table(vocabulary: pa.Table, shards: list[FlatPatients]) -> str:
    """How many events each variable has, and where the values of ``shards`` lie, raw."""
    count, mean, std = (vocabulary[name].to_numpy() for name in ("count", "mean", "std"))
    scaled = _quantiles(shards, vocabulary.num_rows)
    raw = scaled * std[:, None] + mean[:, None]
    raw[np.abs(raw) < 1e-6 * np.abs(mean[:, None])] = 0.0  # what float32 leaves of zero
    places = ((scaled + SPREAD_REACH) / (2 * SPREAD_REACH)).clip(0.01, 0.99)
    variables = vocabulary["variable"].to_pylist()
    rows = []
    for code in np.lexsort((np.arange(len(count)), -count)).tolist()[:MAX_VARIABLES]:
        numbers = (mean[code], std[code], *raw[code, [0, 2, 4]])
        spread = Spread(*places[code].tolist()) if np.isfinite(scaled[code, 0]) else None
        share = Share(count[code] / max(1, count.sum()))
        name = variables[code] if len(variables[code]) <= NAME_LENGTH else f"{variables[code][:NAME_LENGTH]}…"
        rows.append((name, code, int(count[code]), share, *map(float, numbers), spread))
    header = ("variable", "code", "events", "share", "mean", "std", "least", "median", "greatest", "values")
    rest = len(count) - MAX_VARIABLES
    note = f"<p>and {rest:,} more in vocabulary.parquet</p>" if rest > 0 else ""
    plot = histogram("Events of a variable", count[count > 0], "variables")
    return f'<div class="plots">{plot}</div>{table(header, rows)}{note}'


def _quantiles(shards: list[FlatPatients], num_codes: int) -> Floats:
    """[num_codes, Q] of the scaled values of each code; NaN where it has none, and of unknown variables."""
    keys = []
    for shard in shards:
        chosen = shard.has_value & (shard.code >= FIRST_CODE)
        bits = shard.value[chosen].view(np.uint32)
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # as the floats they are the bits of
        keys.append(shard.code[chosen].astype(np.uint64) << np.uint64(32) | ordered)
    key = np.sort(np.concatenate([*keys, np.zeros(0, np.uint64)]))  # a tenth of the time of sorting two columns
    count = np.bincount((key >> np.uint64(32)).astype(np.int64), minlength=num_codes)
    place = np.rint(np.array(QUANTILES) * (count[:, None] - 1)).astype(np.int64)
    found = np.full((num_codes, len(QUANTILES)), np.nan)
    there = count > 0
    ordered = key[(np.cumsum(count) - count)[there, None] + place[there]].astype(np.uint32)
    found[there] = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered).view(np.float32)
    return found


# Figures of the run report.


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
        if record.get("kind") == kind and _is_finite(record.get("step")) and _is_finite(record.get(name))
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


# Summaries.


def _flat(summary: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values of a nested summary, an interval beside its value."""
    rows: list[tuple[str, Any]] = []
    for name, value in summary.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        elif not name.endswith(("_low", "_high")):
            low, high = summary.get(f"{name}_low"), summary.get(f"{name}_high")
            with_interval = _is_finite(value) and _is_finite(low) and _is_finite(high)
            shown = f"{value:.4g} (95 %: {low:.4g} to {high:.4g})" if with_interval else value
            rows.append((f"{prefix}{name}", shown))
    return rows


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: not a summary; move the file away")
    return summary


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
