"""The loss of a batch by a Python loop over patients and sets, as implementations with a batch size of one do it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from benchmarks.steps import count_batch
from model.events import has_number
from model.losses import (
    DIRECTION_WEIGHT,
    MAGNITUDE_WEIGHT,
    SQUARED_WEIGHT,
    LossOptions,
    kl_sum,
    outcome_sum,
)
from model.prepared import PreparedBatch
from model.ragged import SetLayout
from model.reconstruction import chamfer_sums
from model.segments import Segments
from model.seqsetvae import SeqSetVAE
from model.set_vae import Posterior
from pipeline import PatientBatch


@functools.cache
def layout_of_set(size: int, device: str) -> SetLayout:
    """Return the layout of one set of ``size`` events, on ``device``."""
    layout = SetLayout.build(torch.tensor([0, size]))
    values = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return SetLayout(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()})


def loss_of_loop(model: SeqSetVAE, batch: PatientBatch, *, device: str = "cpu") -> Tensor:
    """Return the loss of a batch without noise, with a Python loop over its patients and their sets.

    The modules and the mathematics are the model's; but each set is encoded, decoded and compared alone, and each
    patient alone goes through the transformer and the head.
    """
    options, counts, total = LossOptions(), count_batch(batch), torch.zeros((), device=device)
    weights = torch.tensor([DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT], device=device)
    for index in range(batch.num_patients):
        prepared = PreparedBatch.build(batch.between(index, index + 1)).to(device)
        patient = prepared.batch
        sizes = batch.between(index, index + 1).set_sizes.tolist()
        layouts = [layout_of_set(size, device) for size in sizes]
        events, posteriors, start = [], [], 0
        for size, layout in zip(sizes, layouts, strict=True):
            event = start + layout.event_of_slot
            code, number = patient.code[event], has_number(patient.code[event], patient.has_value[event])
            events.append(model.events(model.events.embedding, Segments.build(code), patient.value[event], number))
            posteriors.append(model.encoder(events[-1], layout))
            start += size
        posterior = Posterior(*(torch.cat(parts) for parts in zip(*posteriors, strict=True)))
        context = model.transformer(posterior.mu, prepared.time, prepared.sequences, None)
        distances = torch.zeros((), device=device)
        for number, (layout, target) in enumerate(zip(layouts, events, strict=True)):
            decoded = model.decoder(context[number : number + 1], layout)
            distances = distances + (torch.stack(chamfer_sums(target.detach(), decoded, layout)) * weights).sum()
        flat = torch.cat([slots[:size] for slots, size in zip(events, sizes, strict=True)])  # padding comes last
        embedding = model.events.embedding[prepared.codes]
        slots = flat[prepared.sets.event_of_slot]
        (logits,) = model.head(prepared, embedding, slots, context, posterior.mu, None)
        outcome = outcome_sum(model.config.outcomes[0], logits, patient.label, options)
        total = total + options.vae_weight * distances / counts.num_events
        total = (
            total
            + options.vae_weight
            * options.beta
            * kl_sum(posterior, options.free_bits, prepared.sets.num_counted)
            / counts.num_sets
        )
        total = total + options.outcome_weight * outcome / max(counts.num_labelled[0], 1)
    return total
