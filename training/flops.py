"""Operations of a training step, counted from shapes: what the model's mathematics needs, as it is computed here.

Only matrix products count, a multiplication and an addition each.  Padding rows do not, nor do activations that
gradient checkpointing computes again: the figure is of useful work.  PyTorch's own counter finds the same where
nothing is padded (tests/model/test_flops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import SeqSetVAEConfig
from model.outcome import ENCODED_FEATURES, FEATURE_CHANNELS, SUMMARY_CHANNELS
from pipeline.loading.batch import PatientBatch

BACKWARD = "backward"


def step_flops(batch: PatientBatch, config: SeqSetVAEConfig) -> dict[str, float]:
    """Operations of each part of the forward pass, and of the whole backward pass under ``BACKWARD``.

    A product has two gradients of its own size; where an input is data, it has one.
    """
    width, hidden = config.width, config.set_feed_forward
    square = float(width**2)
    sets_B, sizes_S = batch.sets_per_patient.double(), batch.set_sizes
    events, sets, patients = batch.num_events, batch.num_sets, batch.num_patients
    largest = int(sizes_S.max()) if sets else 0

    table = config.num_codes * config.embedding_dim * width * (2 if config.event_form == "additive" else 1)
    encoder = config.levels * _isab(sizes_S, config) + 2 * sets * square

    seeds = float(largest * width * 2 * hidden)
    decoder = float(2 * sets * width * 2 * hidden + events * width * (4 * hidden + width))
    decoder += (config.levels - 1) * _isab(sizes_S, config)

    time = float(sets * 33 * width)
    pairs = float((sets_B * (sets_B + 1) / 2).sum())
    layer = 4 * sets * square + 2 * sets * width * config.feed_forward + 2 * pairs * width
    transformer = config.layers * layer

    inputs, facts, head = width, 0.0, 0.0
    if config.variable_axis:
        variables_B = _variables_per_patient(batch)
        channels = min(width, SUMMARY_CHANNELS)
        inputs = 2 * width + channels
        a_variable = (
            ENCODED_FEATURES * min(width, FEATURE_CHANNELS) + config.ensemble_heads * (ENCODED_FEATURES + 1) * channels
        )
        facts = float(variables_B.sum()) * a_variable
        head = (events + sets) * square + events * width * config.heads + facts + _isab(variables_B, config)
    head += config.ensemble_heads * patients * width * (inputs + 2)

    losses = float(sizes_S.double().square().sum() * width)
    forward = {
        "encoder": encoder + table,
        "transformer": transformer + time,
        "decoder": decoder + seeds,
        "head": head,
        "losses": losses,
    }
    one_gradient = time + seeds + losses + facts + (table if config.frozen_embeddings else 0)
    forward[BACKWARD] = 2 * sum(forward.values()) - one_gradient
    return {name: 2 * products for name, products in forward.items()}


def _isab(sizes_S: Tensor, config: SeqSetVAEConfig) -> float:
    """Products of one ISAB over sets of these sizes; a set of one has one inducing row, and nothing to weigh."""
    width, heads, points = config.width, config.heads, config.inducing_points
    rows_S = torch.where(sizes_S == 1, 1, points)
    gather = _shared_queries(sizes_S, rows_S, points, config)
    rows, attended = float(sizes_S.sum()), float((sizes_S * points)[sizes_S > 1].sum())
    folded = 2 * float(width**3) + 2 * width**2
    scatter = rows * 2 * heads * width**2 + 2 * heads * attended * width + _feed_forward(rows, config)
    return gather + folded + scatter


def _shared_queries(sizes_S: Tensor, rows_S: Tensor, queries: int, config: SeqSetVAEConfig) -> float:
    """Products of :meth:`model.attention.MAB.shared_queries` that gives ``rows_S`` rows for sets of ``sizes_S``."""
    width, heads = config.width, config.heads
    attended = float((sizes_S * rows_S)[sizes_S > 1].sum())
    folded = 2 * queries * width**2 + float(width**3) + width**2
    values = float(sizes_S.sum()) * heads * width**2
    return folded + values + 2 * heads * attended * width + _feed_forward(float(rows_S.sum()), config)


def _feed_forward(rows: float, config: SeqSetVAEConfig) -> float:
    return 2 * rows * config.width * config.set_feed_forward


def _variables_per_patient(batch: PatientBatch) -> Tensor:
    """[B] int64, how many variables occur in each patient."""
    patient_E = torch.repeat_interleave(batch.events_per_patient, output_size=batch.num_events)
    num_codes = int(batch.code.max()) + 1 if batch.num_events else 1
    return torch.bincount(torch.unique(patient_E * num_codes + batch.code) // num_codes, minlength=batch.num_patients)
