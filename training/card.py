"""What the evaluation card says beside the metrics (how early, for whom, how well sets are reconstructed), and the
model card of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import SeqSetVAEConfig
from model.losses import DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT, chamfer_sums
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.loading.batch import PatientBatch
from pipeline.schema import FIRST_CODE, UNLABELLED
from training.evaluation import auroc_auprc
from training.options import TrainOptions

EARLY_HOURS = (6, 12, 24, 48)
LENGTH_BUCKETS = 4


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """The same patients as they were so many hours after their first set; the model is causal, so no context of a set
    that stays is another.
    """
    start_S = batch.minute[batch.patient_offsets[:-1]].repeat_interleave(batch.sets_per_patient)
    early_S = batch.minute - start_S <= 60 * hours
    return batch.keep_events(early_S.repeat_interleave(batch.set_sizes))


def reconstruction_sums(model: SeqSetVAE, batch: PatientBatch, output: SeqSetVAEOutput) -> Tensor:
    """[2] float32: the reconstruction loss of the model, and of decoding each event's own variable at its mean.

    The latter is told which variables a set holds, which the decoder is not.
    """
    event = output.sets.event_of_slot
    code, has_value = batch.code[event], batch.has_value[event]
    at_mean = model.events(code, torch.zeros_like(batch.value[event]), has_value)
    assert output.decoded is not None
    part_weights = output.events.new_tensor([DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT])
    errors = [chamfer_sums(output.events, decoded, output.sets) for decoded in (output.decoded, at_mean)]
    return torch.stack([torch.stack(parts) @ part_weights for parts in errors])


def by_length(
    label: npt.NDArray[np.int64], probability: npt.NDArray[np.float64], num_events: npt.NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    """AUROC and AUPRC of the labelled patients in ``LENGTH_BUCKETS`` ranges of ``num_events`` of about equal mass."""
    labelled = label != UNLABELLED
    label, probability, num_events = label[labelled], probability[labelled], num_events[labelled]
    if not len(label):
        return {}
    edges = np.quantile(num_events, np.linspace(0, 1, LENGTH_BUCKETS + 1)[1:-1])
    bucket, result = np.searchsorted(edges, num_events), {}
    for number in np.unique(bucket):
        of = bucket == number
        auroc, auprc = auroc_auprc(label[of], probability[of])
        name = f"{num_events[of].min()} to {num_events[of].max()} events"
        result[name] = {"patients": int(of.sum()), "positive": int(label[of].sum()), "auroc": auroc, "auprc": auprc}
    return result


METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "min_se_ppv": "min(Se, +P)", "brier": "Brier", "ece": "ECE"}


def model_card(
    config: SeqSetVAEConfig, options: TrainOptions, patients: Mapping[str, int], summary: Mapping[str, Any]
) -> str:
    """What someone who is handed the checkpoint must know, in Markdown (Mitchell et al. 2019, arXiv:1810.03993).

    Args:
        patients: of each split of the data it was trained on.
        summary: of the run, as in ``summary.json``.
    """
    test, best = summary["test"], summary["best"]
    lines = [
        "# Model card: SeqSetVAE",
        "",
        f"`checkpoints/best.pt` of a run with `--objective {options.objective}`: preset {options.preset}, width "
        f"{config.width}, {config.num_codes - FIRST_CODE} variables, PyTorch {torch.__version__}. `config.yaml` has "
        "every option.",
        "",
        "## Trained on",
        "",
        f"{', '.join(f'{number:,} {split}' for split, number in patients.items())} patients; statistics and "
        f"vocabulary of the train split. Seed {options.seed}, {summary['steps']:,} steps in {summary['seconds']:,.0f} "
        f"s; epoch {best['epoch'] + 1} was the best on the validation split.",
        "",
        "## What it is good for",
        "",
    ]
    if test is None:
        lines.append("Not tested: the data have no test split.")
    else:
        labelled = f"{test['num_labelled']:,} labelled patients, {test['num_positive']:,} with the outcome"
        lines += [f"Test split, {labelled}; 95 % intervals of the bootstrap over patients:", ""]
        lines += ["| metric | value | 95 % interval |", "|---|---:|---:|"]
        for name, title in METRICS.items():
            if test[name] is not None:
                lines.append(
                    f"| {title} | {test[name]:.3f} | {test[f'{name}_low']:.3f} to {test[f'{name}_high']:.3f} |"
                )
        lines += ["", f"Active units {test['active_units']} of {config.width}."]
        if options.objective == "pretrain":
            lines.append("The outcome head was not trained; its probabilities mean nothing.")
    lines += [
        "",
        "## What it is not",
        "",
        "- Tried on patients of one source, at the same time and place as those it learned from. Elsewhere, prepare "
        "patients with `preprocess.py --like` and look at `train.py --evaluate` before anything else.",
        "- Probabilities are calibrated as far as the table says, for a like share of outcomes"
        + ("." if options.positive_weight == 1 else f"; `--positive_weight {options.positive_weight}` shifts them."),
        "- No quality by age, sex or origin is measured here; `--evaluate` gives it by length of stay alone.",
        "- For research. Not a medical device; no decision about a patient should rest on it.",
        "- It was fitted to records of patients: treat the checkpoint as you treat those records.",
    ]
    return "\n".join(lines) + "\n"
