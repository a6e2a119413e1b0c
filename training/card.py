"""The model cards of a run, and whether its summary is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from model.config import SeqSetVAEConfig
from pipeline.machine import peak_rss_bytes
from pipeline.schema import FIRST_CODE
from pipeline.storage.files import write_atomically
from training.metrics import Throughput
from training.options import TrainOptions
from training.quality import HEADLINES

if TYPE_CHECKING:
    from training.run import Run

METRICS = {
    "auroc": "AUROC", "auprc": "AUPRC", "min_se_ppv": "min(Se, +P)", "accuracy": "Accuracy", "brier": "Brier",
    "log_loss": "Log-loss", "ece": "ECE", "calibration_slope": "Calibration slope",
    "calibration_intercept": "Calibration intercept", "r2": "R²", "mae": "MAE", "rmse": "RMSE", "c_index": "C-index",
}  # fmt: skip


def write_model_cards(
    config: SeqSetVAEConfig,
    options: TrainOptions,
    num_samples: Mapping[str, int],
    summary: Mapping[str, Any],
    unit: str = "patients",
) -> Iterator[tuple[str, str]]:
    """Yield what someone who is handed the checkpoint must know, in Markdown (Mitchell et al. 2019, arXiv:1810.03993).

    A card's file name stands before it; each of several tasks has a card of its own.  After it comes a TRIPOD+AI
    checklist (Collins et al. 2024, BMJ 385:e078378) with what a run can fill in, where an outcome was learned.
    ``num_samples`` has the number of samples of each split, which are called ``unit``, and ``summary`` what
    ``summary.json`` has.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    test, several = summary["test"], len(config.outcomes) > 1
    for outcome in config.outcomes:
        suffix = f"_{outcome.name}" if several else ""
        for name in ("MODEL_CARD", "TRIPOD_AI") if options.loss.learns_outcome else ("MODEL_CARD",):
            card = environment.get_template(f"{name.lower()}.md.jinja").render(
                final_seeds=options.cross_fit.final_seeds,
                folds=options.cross_fit.folds,
                headlines=HEADLINES[outcome.kind],
                loss=options.loss,
                metrics=METRICS,
                num_samples=num_samples,
                outcome=outcome,
                outcomes=config.outcomes,
                preset=options.model.preset,
                seed=options.run.seed,
                summary=summary,
                test=test["tasks"][outcome.name] | {"active_units": test["active_units"]} if test and several else test,
                torch_version=torch.__version__,
                tree_share=config.tree_share,
                unit=unit,
                variables=config.num_codes - FIRST_CODE,
                width=config.width,
            )
            yield f"{name}{suffix}.md", card


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, which says that a run has ended."""
    write_atomically(directory / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


def is_summary_of(path: Path, step: int) -> bool:
    """Return whether ``summary.json`` is of a run that ended at ``step``."""
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("steps") == step


def summarize_run(run: Run) -> dict[str, Any]:
    """Return what the training was, for ``summary.json``: totals over all resumed parts of the run."""
    progress = run.state.progress
    summary: dict[str, Any] = {
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "stopped_by": run.stop_reason,
        **Throughput(**progress.totals).rates(),
        "threads": progress.threads,
        "steps_in_graphs": 0 if run.settings.graphs is None else run.settings.graphs.replayed,
        "peak_rss_bytes": max(progress.peak_rss_bytes, peak_rss_bytes()),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if run.world.device.type == "cuda" else None,
    }
    if run.options.run.profile_memory:  # of this process and those below it; each rank has a profile of its own
        summary["profiled_peak_rss_bytes"] = run.monitor.peak_rss_bytes
        summary["profiled_peak_uss_bytes"] = run.monitor.peak_uss_bytes
    if (drawn := run.state.loader.count_draws(max(run.state.loader.epoch - 1, 0))) is not None:
        summary["drawn_in_last_epoch"] = drawn
    if run.profiler.table is not None:
        summary["profile"] = run.profiler.table
    quarantined = {"quarantined_patients": run.data.quarantined_patients}
    return summary | quarantined | {"quarantined_shards": run.data.quarantined_shards, "best": run.best}
