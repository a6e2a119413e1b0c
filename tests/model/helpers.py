"""Small random batches and models for the tests of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from model.config import SeqSetVAEConfig
from model.losses import LossCounts
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.arrays import is_labelled
from pipeline.loading.batch import PatientBatch

NUM_CODES = 9


def tiny_model(**changes: Any) -> SeqSetVAE:
    torch.manual_seed(3)
    shape = {"embedding_dim": 6, "width": 16, "inducing_points": 3, "set_feed_forward": 20, "feed_forward": 12}
    return SeqSetVAE(SeqSetVAEConfig(**{"num_codes": NUM_CODES, **shape, **changes}))


def random_batch(
    sets_of_patients: Sequence[Sequence[int]], seed: int = 0, labels: Sequence[int] | None = None
) -> PatientBatch:
    """A batch whose patient b has sets of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for sets in sets_of_patients for size in sets]
    num_events = sum(sizes)
    zero = torch.zeros(1, dtype=torch.int64)
    has_value = torch.rand(num_events, generator=generator) > 0.2
    minutes = [torch.rand(len(sets), generator=generator).sort().values * 2880 for sets in sets_of_patients]
    return PatientBatch(
        code=torch.randint(1, NUM_CODES, (num_events,), generator=generator),
        value=torch.randn(num_events, generator=generator) * has_value,
        has_value=has_value,
        set_offsets=torch.cat([zero, torch.tensor(sizes, dtype=torch.int64).cumsum(0)]),
        minute=torch.cat([torch.zeros(0), *minutes]),
        patient_offsets=torch.cat(
            [zero, torch.tensor([len(s) for s in sets_of_patients], dtype=torch.int64).cumsum(0)]
        ),
        label=torch.tensor(
            labels if labels is not None else [b % 2 for b in range(len(sets_of_patients))], dtype=torch.int64
        ),
        patient_id=[f"p{b}" for b in range(len(sets_of_patients))],
    )


def select(batch: PatientBatch, patients: Sequence[int]) -> PatientBatch:
    """The batch of some of its patients, in that order; patient by patient."""
    parts: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("code", "value", "has_value", "minute", "sizes", "counts")
    }
    for b in patients:
        first, last = int(batch.patient_offsets[b]), int(batch.patient_offsets[b + 1])
        events = slice(int(batch.set_offsets[first]), int(batch.set_offsets[last]))
        for name in ("code", "value", "has_value"):
            parts[name].append(getattr(batch, name)[events])
        parts["minute"].append(batch.minute[first:last])
        parts["sizes"].append(batch.set_sizes[first:last])
        parts["counts"].append(torch.tensor([last - first]))
    zero = torch.zeros(1, dtype=torch.int64)
    return PatientBatch(
        **{name: torch.cat(parts[name]) for name in ("code", "value", "has_value", "minute")},
        set_offsets=torch.cat([zero, torch.cat(parts["sizes"]).cumsum(0)]),
        patient_offsets=torch.cat([zero, torch.cat(parts["counts"]).cumsum(0)]),
        label=batch.label[list(patients)],
        patient_id=[batch.patient_id[b] for b in patients],
    )


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """The same patients as they were so many hours after their first set, where sets come in order of time."""
    start_S = batch.minute[batch.patient_offsets[:-1]][batch.patient_of_set]
    return batch.keep_events((batch.minute - start_S <= 60 * hours)[batch.set_of_event])


def counts_of(batch: PatientBatch) -> LossCounts:
    labelled = is_labelled(batch.label.numpy())
    of_tasks = labelled.T if labelled.ndim > 1 else [labelled]
    counts = tuple(int(each.sum()) for each in of_tasks)
    return LossCounts(num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=counts)


def run_model(model: SeqSetVAE, batch: PatientBatch, seed: int | None = None, step: int = 0) -> SeqSetVAEOutput:
    """A forward pass of training step ``step``; without a seed one of evaluation, which has no noise."""
    return model.train(seed is not None)(PreparedBatch.build(batch, seed=seed, step=step))
