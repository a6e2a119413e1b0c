"""The model card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.config import SeqSetVAEConfig
from pipeline.schema import FIRST_CODE
from training.options import TrainOptions

METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "min_se_ppv": "min(Se, +P)", "brier": "Brier", "ece": "ECE"}


def write_model_card(
    config: SeqSetVAEConfig, options: TrainOptions, patients: Mapping[str, int], summary: Mapping[str, Any]
) -> str:
    """Return what someone who is handed the checkpoint must know, in Markdown (Mitchell et al. 2019, arXiv:1810.03993).

    Args:
        config: of the model.
        options: of the run.
        patients: number of patients of each split of the data it was trained on.
        summary: of the run, as in ``summary.json``.
    """
    loss, best = options.loss, summary["best"]
    shift = "." if loss.pos_weight == 1 else f"; `--pos_weight {loss.pos_weight}` shifts them."
    lines = [
        "# Model card: SeqSetVAE",
        "",
        f"`checkpoints/best.pt` of a run with `--objective {loss.objective}`: preset {options.model.preset}, width "
        f"{config.width}, {config.num_codes - FIRST_CODE} variables, PyTorch {torch.__version__}. `config.yaml` has "
        "every option.",
        "",
        "## Trained on",
        "",
        f"{', '.join(f'{number:,} {split}' for split, number in patients.items())} patients; statistics and "
        f"vocabulary of the train split. Seed {options.run.seed}, {summary['steps']:,} steps in "
        f"{summary['seconds']:,.0f} s; epoch {best['epoch'] + 1} was the best on the validation split.",
        "",
        "## What it is good for",
        "",
        *_quality_lines(summary["test"], config, learns_outcome=loss.learns_outcome),
        "",
        "## What it is not",
        "",
        "- Tested on patients of one source, at the same time and place as those it learned from. Elsewhere, prepare "
        "patients with `preprocess.py --like` and look at `train.py --evaluate` before anything else.",
        "- Probabilities are calibrated as far as the table says, for a similar share of outcomes" + shift,
        "- No quality by age, sex or origin is measured here; `--evaluate` gives it by length of stay alone.",
        "- For research. It is not a medical device; no decision about a patient should rest on it.",
        "- It was fitted to records of patients: treat the checkpoint as you treat those records.",
    ]
    return "\n".join(lines) + "\n"


def _quality_lines(test: Mapping[str, Any] | None, config: SeqSetVAEConfig, *, learns_outcome: bool) -> list[str]:
    if test is None:
        return ["Not tested: the data have no test split."]
    units = f"Active units {test['active_units']} of {config.width}."
    if not learns_outcome:
        return ["The outcome head was not trained: the model gives latents and reconstructions.", "", units]
    labelled = f"{test['num_labelled']:,} labelled patients, {test['num_positive']:,} with the outcome"
    lines = [f"Test split, {labelled}; 95 % intervals of the bootstrap over patients:", ""]
    lines += ["| metric | value | 95 % interval |", "|---|---:|---:|"]
    for name, title in METRICS.items():
        if test[name] is not None:
            lines.append(f"| {title} | {test[name]:.3f} | {test[f'{name}_low']:.3f} to {test[f'{name}_high']:.3f} |")
    return [*lines, "", units]
