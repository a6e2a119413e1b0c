"""What the evaluation card says beside the metrics: how early, for whom, and how well sets are reconstructed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.evaluation import auroc_auprc
from model.losses import LossWeights, chamfer_sums
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.batch import PatientBatch
from pipeline.schema import UNLABELLED

EARLY_HOURS = (6, 12, 24, 48)
LENGTH_BUCKETS = 4


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """The same patients as they were so many hours after their first set; the model is causal, so no context of a set
    that stays is another.
    """
    start_S = batch.minute[batch.patient_offsets[:-1]].repeat_interleave(batch.sets_per_patient)
    early_S = batch.minute - start_S <= 60 * hours
    return batch.keep_events(early_S.repeat_interleave(batch.set_sizes))


def reconstruction_sums(model: SeqSetVAE, batch: PatientBatch, output: SeqSetVAEOutput, weights: LossWeights) -> Tensor:
    """[2] float32: the reconstruction loss of the model, and of decoding each event's own variable at its mean.

    The latter is told which variables a set holds, which the decoder is not.
    """
    row = output.sets.event_of_row
    code, has_value = batch.code[row], batch.has_value[row]
    at_mean = model.events(code, torch.zeros_like(batch.value[row]), has_value)
    part_weights = output.events.new_tensor([weights.direction, weights.magnitude, weights.squared])
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
