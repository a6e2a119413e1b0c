"""The page of all published figures, made of the results that are committed.

    python -m benchmarks.figures [--write docs/figures.md]

Each row names a file of ``benchmarks/results``, what to take from it, and the command that measured it; the machine
and the date are those of the file.  Figures of runs that left no file are in ``noted.json``.  A test holds the page to
this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.batch_size_table import markdown
from benchmarks.scale_costs import run_tables

RESULTS = Path(__file__).parent / "results"


class Figure(NamedTuple):
    """A row of the page: what was measured, the text of the figure made of a result, and how to measure it again."""

    what: str
    file: str
    text: Callable[[Any], str]
    command: str = ""


def preset_pair(small: str, reference: str, text: Callable[[Any], str]) -> str:
    return " / ".join(text(read(name)) for name in (small, reference))


def scores(values: dict[str, Sequence[float]]) -> str:
    return " / ".join(f"{values[name][0]:.3f}" for name in ("log_loss", "auroc", "auprc"))


def outcome(values: dict[str, float]) -> str:
    return f"{values['auroc']:.3f} / {values['auprc']:.3f}"


def number(values: dict[str, float]) -> str:
    return f"{values['r2']:.3f} / {values['mae']:.2f} / {values['c_index']:.3f}"


def study(result: Any, variant: str) -> str:
    losses = [run["validation_loss_last"] for run in result["runs"][variant]]
    return f"{mean(losses):.3f} ± {stdev(losses):.3f}"


def five_splits(result: Any, name: str) -> str:
    return " / ".join(f"{middle:.3f} ± {spread:.3f}" for middle, spread in result["mean_and_sd"][name])


def planned(result: Any, policy: str) -> str:
    row = result["16 patients"][policy]
    return f"{row['padding_of_events']:.1%}; {row['pairs_meeting_again']:.1%}"


def against(result: Any, name: str) -> str:
    row = result["against_the_bar"][name]["log_loss"]
    return f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}), z {row['z']:+.1f}"


def describe_billion(row: Any) -> str:
    memory, disk = row["peak_rss_bytes_all_processes"] / 1e9, row["peak_disk_bytes_per_event"]
    return f"{row['seconds'] / 60:.1f} min; {memory:.1f} GB; {disk:.0f} bytes an event"


MEDS = "python -m benchmarks.preprocess_meds set-a --mtd …"
PLAN, LOADER = "python -m benchmarks.plan data", "python -m benchmarks.loader data --peers …"
CROSS_FIT = "python -m benchmarks.crossfit set-a --work work -- --folds 0 --final_seeds 2"
STUDY = "python -m benchmarks.study set-a --work work"
PREFIXES = "python -m benchmarks.prefixes data"

TABLES: dict[str, Sequence[Figure]] = {
    "prepare": [
        Figure(
            "33.5 M events in MEDS form to shards, from start to exit",
            "preprocess_meds",
            lambda it: f"{it['ways']['preprocess.py']['rows_per_second'] / 1e6:.1f} M events/s",
            MEDS,
        ),
        Figure(
            "… of the seconds of meds-torch-data's pipeline / of Polars' read, sort and write",
            "preprocess_meds",
            lambda it: " / ".join(
                f"{it['times_the_seconds_of_preprocess'][name]:.2g} ×"
                for name in ("meds-torch-data", "polars read, sort, write")
            ),
        ),
        Figure(
            "… a day later, on a busier machine: of the seconds of Polars' read, sort and write",
            "preprocess_meds_now",
            lambda it: f"{it['times_the_seconds_of_preprocess']['polars read, sort, write']:.2g} ×",
        ),
        Figure(
            "100 M synthetic events to shards, 2 workers: time; memory of all processes",
            "preprocess_scale",
            lambda it: (
                f"{it['rows'][-1]['seconds']:.0f} s; {it['rows'][-1]['peak_rss_bytes_all_processes'] / 1e9:.2f} GB"
            ),
            "python -m benchmarks.preprocess_scale",
        ),
        *(
            Figure(
                f"a billion events of {name} to shards, 2 workers: time; memory of all processes; disk for the work",
                "billion",
                lambda it, kind=kind: describe_billion(it["kinds"][kind]["whole"]),
                "make bench-billion",
            )
            for kind, name in (("parquet", "Parquet"), ("csv", "CSV"))
        ),
        Figure(
            "… killed five times on the way: other bytes; memory of a billion, to that of a tenth",
            "billion",
            lambda it: (
                f"{'none' if all(kind['same_bytes_after_kills'] for kind in it['kinds'].values()) else 'some'}; "
                f"{max(kind['memory_by_that_of_a_tenth'] for kind in it['kinds'].values()):.2f} ×"
            ),
        ),
        Figure(
            "200 M rows in one `.csv.gz` of 1.3 GB: rows/s; to the same rows unpacked; memory of all processes",
            "preprocess_gzip",
            lambda it: (
                f"{it['packed.csv.gz']['events_per_second'] / 1e6:.2f} M; {it['rate_to_unpacked']:.2f} ×; "
                f"{it['packed.csv.gz']['peak_rss_bytes_all_processes'] / 2**30:.1f} GiB"
            ),
            "python -m benchmarks.preprocess_gzip --rows 200000000",
        ),
        Figure(
            "a task of 100,000 samples added to 33.5 M events, from start to exit",
            "tasks",
            lambda it: f"{min(it['seconds_to_add']):.1f} to {max(it['seconds_to_add']):.1f} s",
            "python -m benchmarks.tasks set-a",
        ),
        Figure(
            "preprocess killed at random moments and started again, 1 and 2 processes: kills; other bytes",
            "faults",
            lambda it: (
                f"{sum(it['tried'][f'kills of preprocess, {count} process(es)'] for count in (1, 2))}; "
                f"{len(it['failed'])}"
            ),
            "make test-faults",
        ),
    ],
    "loader": [
        *(
            Figure(f"padding of events; pairs of patients who meet again in the next epoch: {name}", "plan", text, PLAN)
            for name, text in (
                ("the default", lambda it: planned(it, "bucket_width 4")),
                ("random batches", lambda it: planned(it, "random")),
                ("sorted", lambda it: planned(it, "sorted")),
            )
        ),
        *(
            Figure(
                f"batches of 16, patients/s: {name}",
                "loader",
                lambda it, name=name: f"{it['patients_per_second'][name]:,}",
                LOADER,
            )
            for name in (
                "ours, ragged",
                "ours, padded",
                "ours, ragged then to_padded",
                "litdata",
                "webdataset",
                "meds-torch-data",
                "pandas, a file a patient",
            )
        ),
        Figure(
            "100 M simulated patients: peak memory / first batch / resume",
            "groups",
            lambda it: (
                f"{it['simulated']['peak_rss_mib']} MiB / {it['simulated']['seconds_to_first_batch']} s / "
                f"{it['simulated']['seconds_to_resume']} s"
            ),
            "python -m benchmarks.groups",
        ),
        *(
            Figure(
                f"1,000 M simulated samples of 100 M patients{where}: peak memory / first batch / resumed batch",
                "groups_samples",
                lambda it, part=part: (
                    f"{it[part]['peak_rss_mib']} MiB / {it[part]['seconds_to_first_batch']} s / "
                    f"{it[part]['seconds_to_first_resumed_batch']} s"
                ),
                "python -m benchmarks.groups --samples 10 --groups 3 --output benchmarks/results/groups_samples.json",
            )
            for part, where in (("simulated", ""), ("store", ", table in a store 50 ms away"))
        ),
        Figure(
            "batches of 16 stays, none alike, for which 14 CUDA graphs have room; further events",
            "capacities",
            lambda it: f"{it['rows'][1]['share_with_room']:.1%}; {it['rows'][1]['events'] - 1:.0%}",
            "python -m benchmarks.capacities data",
        ),
    ],
    "quality": [
        *(
            Figure(
                f"death, five folds twice, 4,000 stays, log-loss / AUROC / AUPRC: {label}", "crossfit", text, CROSS_FIT
            )
            for label, text in (
                ("SeqSetVAE, two models averaged", lambda it: scores(it["models"]["SeqSetVAE"])),
                ("… without trees in its head", lambda it: scores(it["models"]["SeqSetVAE, --tree_share 0"])),
                ("stack of trees and a linear model", lambda it: scores(it["models"]["stack, all other folds"])),
                ("mean logit of both", lambda it: scores(it["models"]["mean logit of both"])),
            )
        ),
        *(
            Figure(f"… log-loss less that of the stack, 95 %: {name}", "crossfit", lambda it, n=name: against(it, n))
            for name in ("SeqSetVAE", "mean logit of both")
        ),
        *(
            Figure(
                f"death, five splits, test AUROC / AUPRC: {name.replace('_', ' ')}",
                "quality",
                lambda it, name=name: five_splits(it, name),
                "python -m benchmarks.quality set-a --work work",
            )
            for name in ("SeqSetVAE, seed 0", "trees", "logistic_regression")
        ),
        Figure(
            "death, one split: AUROC / AUPRC: trees; logistic regression",
            "baselines",
            lambda it: f"{outcome(it['trees'])}; {outcome(it['logistic_regression'])}",
            "python -m benchmarks.baselines data",
        ),
        Figure(
            "days of stay, one split: R² / mean absolute error / C-index",
            "length_of_stay",
            number,
            "python train.py … --task los",
        ),
        Figure(
            "… trees; ridge",
            "length_of_stay",
            lambda it: f"{number(it['baselines']['trees'])}; {number(it['baselines']['ridge'])}",
        ),
        Figure(
            "both at once: death; days",
            "death_and_length_of_stay",
            lambda it: f"{outcome(it['tasks']['default'])}; {number(it['tasks']['los'])}",
            "python train.py … --task default,los",
        ),
        *(
            Figure(f"validation loss, three seeds: {name}", "study", lambda it, name=name: study(it, name), STUDY)
            for name in ("the default", "random batches")
        ),
        Figure(
            "an outcome that only the order of sets tells: AUROC; without contexts; stack on summaries",
            "planted_sequence",
            lambda it: "; ".join(
                f"{it['models'][name]['auroc'][0]:.3f}"
                for name in ("SeqSetVAE", "SeqSetVAE, --without contexts", "stack on summaries")
            ),
            "python -m benchmarks.planted_sequence",
        ),
    ],
    "speed": [
        Figure(
            "training step, reference preset, batch 16: patients/s, float32 / bfloat16",
            "train_step",
            lambda it: f"{it['fp32_patients_per_second']:.1f} / {it['bf16_patients_per_second']:.1f}",
            "python -m benchmarks.train_step --data_dir data",
        ),
        Figure(
            "… to a loop over patients and sets of the same maths; share of the measured matrix rate",
            "train_step",
            lambda it: f"{it['times_the_loop']:.0f} ×; {it['fp32_share_of_matrix_rate']:.0%}",
        ),
        Figure(
            "… small preset, float32 / bfloat16",
            "train_step_small",
            lambda it: f"{it['fp32_patients_per_second']:.0f} / {it['bf16_patients_per_second']:.0f}",
            "… --preset small",
        ),
        Figure(
            "one process on two threads / two processes, to one thread, small preset",
            "devices",
            lambda it: (
                f"{it['times_the_first']['1 device, 2 threads']:.1f} / {it['times_the_first']['2 devices']:.1f} ×"
            ),
            "python -m benchmarks.devices data",
        ),
        Figure(
            "time an event at 5,000 sets a patient, to that at 100, small / reference preset",
            "growth",
            lambda it: preset_pair(
                "growth_small", "growth", lambda it: f"{it['times_an_event_of_100_sets_at_5000']:.2f} ×"
            ),
            "python -m benchmarks.growth",
        ),
        Figure(
            "… without attention over sets",
            "growth",
            lambda it: preset_pair(
                "growth_small", "growth", lambda it: f"{it['the_same_without_attention'][-1]:.2f} ×"
            ),
        ),
        Figure(
            "8 prediction times of each stay, in steps of one: sharing a pass; as separate windows",
            "prefixes",
            lambda it: "; ".join(f"{it['ways'][name]['step_over_first']:.2f}" for name in ("8 shared", "8 separate")),
            PREFIXES,
        ),
        Figure(
            "48 hourly labels a stay, to one: patients/s of training",
            "prefixes_hourly",
            lambda it: f"{it['patients_a_second']['hourly'] / it['patients_a_second']['default']:.2f} ×",
            f"{PREFIXES} --hourly TASK",
        ),
    ],
    "memory": [
        Figure(
            "predicted peak memory of a step, largest error of 20 batches, small / reference preset",
            "memory_model_small",
            lambda it: preset_pair(
                "memory_model_small", "memory_model_reference", lambda it: f"{it['largest_relative_error']:.1%}"
            ),
            "python -m benchmarks.memory_model data",
        ),
        Figure(
            "gradient checkpointing, reference preset, 16 stays: peak of a step / time",
            "checkpointing",
            lambda it: " / ".join(
                f"{value:.2f} ×"
                for row in [it["16 stays of PhysioNet 2012 set A"]]
                for value in (row["share_of_peak"], 1 + row["more_time"])
            ),
            "python -m benchmarks.checkpointing",
        ),
        Figure(
            "an hour of training: growth of resident memory",
            "soak",
            lambda it: f"{it['rss_mib_an_hour']:.2f} ± {it['rss_mib_an_hour_standard_error']:.2f} MiB",
            "python -m benchmarks.soak",
        ),
    ],
}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def make_tables() -> dict[str, str]:
    """Return the tables of the page, as Markdown, by the names of their places."""
    noted = read("noted")
    content = {}
    for name, figures in TABLES.items():
        rows = [(it.what, it.text(read(it.file)), it.command, machine(read(it.file))) for it in figures]
        rows += [
            (row["what"], row["figure"], row["command"], f"{short(row['hardware'])}, {row['date']}")
            for row in noted
            if row["table"] == name
        ]
        lines = [f"| {what} | {text} | {where} | {f'`{run}`' if run else ''} |" for what, text, run, where in rows]
        head = "| what | figure | measured on | command |\n|---|---:|---:|---|"
        content[name] = "\n".join([head, *lines])
    for preset in ("small", "reference"):
        result = read("batch_size_table" + ("_small" if preset == "small" else ""))
        content[f"batch_sizes_{preset}"] = markdown(result).strip()
    return content


def machine(result: Any) -> str:
    about = result.get("machine", result)
    return f"{short(about['hardware'])}, {about['date']}"


def short(hardware: str) -> str:
    """Return the processor without its count of cores, which the page gives, unless it was another one."""
    words = hardware.replace("(R)", "").replace(" Processor", "").replace("AMD ", "").replace("Intel ", "")
    return words.removeprefix("2 cores, ")


def main() -> None:
    run_tables("Make the tables of published figures.", make_tables)


if __name__ == "__main__":
    main()
