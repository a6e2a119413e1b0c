"""One optimiser step on a global batch, of which this rank has a share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from model.losses import LossCounts, Losses, LossOptions, beta_at, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from training.buckets import GradientBuckets
from training.collapse import CollapseGauges
from training.console import log_main
from training.data import BatchPreparer, ReadyBatch
from training.graphs import StepGraphs, StepNumbers
from training.memory import halve, is_out_of_memory
from training.parallel import World
from training.profiling import COMMUNICATION
from training.schedule import OptimisationOptions, learning_rate_at
from training.state import TrainState


@dataclass(frozen=True)
class StepSettings:
    """What decides a step besides state and batch.

    The learning rate falls over ``total_steps``; ``preparer`` makes smaller parts where memory ends; ``graphs`` replays
    steps, where there are capacities; ``buckets`` add up gradients, where there are several ranks; ``monitor`` is the
    validation metric that decides which epoch is best; with ``has_gauges`` steps fill the gauges of collapse.
    """

    loss: LossOptions
    optimisation: OptimisationOptions
    world: World
    total_steps: int
    preparer: BatchPreparer
    graphs: StepGraphs | None = None
    buckets: GradientBuckets | None = None
    monitor: str = "loss"
    has_gauges: bool = False


def select_trained(model: SeqSetVAE, loss: LossOptions, optimisation: OptimisationOptions) -> None:
    """Let only those parameters have gradients that the objective, or ``--freeze``, trains."""
    for name, parameter in model.named_parameters():
        in_head, in_decoder = name.startswith("head."), name.startswith("decoder.")
        trained = in_head if optimisation.freeze else True
        trained &= loss.learns_outcome if in_head else loss.learns_sets if in_decoder else True
        frozen_table = model.config.frozen_embeddings and parameter is model.events.embedding
        parameter.requires_grad_(trained and not frozen_table)


def train_step(state: TrainState, ready: ReadyBatch, settings: StepSettings) -> tuple[Losses, Tensor]:
    """Make one step; return this rank's share of the losses and the norm of the gradient, both on the device.

    Model, EMA, optimiser, scaler and progress of ``state`` move on; ``ready`` is this rank's share of the global batch.
    A batch that does not fit the memory is taken again in smaller parts.  Losses are sums over patients and noise is a
    patient's own, so the gradient is that of the whole.
    """
    numbers, parts, done = step_numbers(state, ready.counts, settings), ready.parts, None
    if settings.graphs is not None and len(parts) == 1:
        done = settings.graphs.run(parts[0], numbers, lambda part, scalars: run_step([part], scalars, state, settings))
    while done is None:
        try:
            done = run_step(parts, numbers, state, settings)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if done is None:  # outside of the handler nothing holds what the failed part had
            parts = smaller_parts(parts, state.progress.step, settings)
    state.progress.step += 1
    return done


def step_numbers(state: TrainState, counts: LossCounts, settings: StepSettings) -> StepNumbers:
    """Return the schedules at the step of now: functions of it alone, so a resumed run needs none of their state."""
    optimisation, step = settings.optimisation, state.progress.step
    learning_rate = learning_rate_at(optimisation, step, settings.total_steps)
    return StepNumbers(
        counts=counts,
        beta=beta_at(settings.loss, step),
        # Early in a run the averaged weights forget their beginning sooner.
        ema_decay=min(optimisation.ema_decay, (1 + step) / (10 + step)),
        learning_rates=[group["lr_scale"] * learning_rate for group in state.optimizer.param_groups],
    )


def run_step(
    parts: list[PreparedBatch], numbers: StepNumbers, state: TrainState, settings: StepSettings
) -> tuple[Losses, Tensor]:
    """Make a step of the parts of a batch, without asking the host for anything: a CUDA graph may hold it."""
    state.optimizer.zero_grad(set_to_none=True)
    losses = accumulate_gradients(parts, numbers, state, settings)
    if settings.buckets is not None:
        with record_function(COMMUNICATION):
            settings.buckets.finish()
    with record_function("optimiser"):
        state.scaler.unscale_(state.optimizer)
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        norm = clip_gradients(gradients, settings.optimisation.gradient_clip or math.inf)
        for group, learning_rate in zip(state.optimizer.param_groups, numbers.learning_rates, strict=True):
            group["lr"] = learning_rate
        state.scaler.step(state.optimizer)
        state.scaler.update()
        update_ema(state, numbers.ema_decay)
    return losses, norm


def accumulate_gradients(
    parts: list[PreparedBatch], numbers: StepNumbers, state: TrainState, settings: StepSettings
) -> Losses:
    """Add up the gradients of a batch part by part; return the sum of the losses, without a graph."""
    total, last = None, parts[-1]
    if settings.buckets is not None:
        settings.buckets.hold()
    for part in parts:
        with record_function("copy"):
            prepared = part.to(settings.world.device, non_blocking=True)
        gauges = state.gauges if settings.has_gauges else None
        losses = forward_losses(state.model, prepared, numbers.counts, settings, numbers.beta, gauges)
        with record_function("backward"):
            if part is last and settings.buckets is not None:
                settings.buckets.begin()
            state.scaler.scale(losses.total).backward()
        losses = dataclasses.replace(losses, total=losses.total.detach())
        total = losses if total is None else total + losses
    assert total is not None
    return total


def forward_losses(
    model: SeqSetVAE,
    prepared: PreparedBatch,
    counts: LossCounts,
    settings: StepSettings,
    beta: float | Tensor,
    gauges: CollapseGauges | None = None,
) -> Losses:
    """Return the losses of a training step on one part of a batch; what the objective does not use is not computed.

    The posterior is shown to ``gauges``.
    """
    loss = settings.loss
    with settings.optimisation.autocast(settings.world.device):
        output = model(prepared, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        with record_function("losses"):
            if gauges is not None:
                gauges.update(output.posterior, output.sets.num_counted)
            return compute_losses(output, prepared.batch.sample_label, loss, counts, beta=beta)


def smaller_parts(parts: list[PreparedBatch], step: int, settings: StepSettings) -> list[PreparedBatch]:
    """Return a batch for which there was no memory in smaller parts, and say so.

    It is a UserError if there are none, or other ranks, which cannot be told to begin the step again.
    """
    batches = [part.batch.between(0, part.num_patients) for part in parts]  # without fillers
    largest = max(batches, key=lambda batch: batch.num_events)
    size = f"{largest.num_patients} patients, {largest.num_events:,} events in {largest.num_sets:,} sets"
    if settings.world.size > 1:
        raise UserError(f"out of memory in step {step + 1}, on {size}: give --max_memory, or lower --batch_size")
    if largest.num_patients == 1:
        advice = "give --gradient_checkpointing, or cut patients with --max_sequence_length"
        raise UserError(f"out of memory in step {step + 1}, on a single patient: {size}; {advice}")
    smaller = [settings.preparer.prepare(half, step) for batch in batches for half in halve(batch)]
    again = f"taken again in {len(smaller)} parts"
    log_main(settings.world, f"warning: out of memory in step {step + 1}, on {size}: {again}")
    return smaller


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm is at most ``max_norm``; return the norm before, without waiting for it."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


@torch.no_grad()
def update_ema(state: TrainState, decay: float | Tensor) -> None:
    """Move the EMA weights towards the model's."""
    averages, parameters = list[Any](state.ema_model.parameters()), list[Any](state.model.parameters())
    if isinstance(decay, Tensor):
        change = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(averages, change)
    else:
        torch._foreach_lerp_(averages, parameters, 1 - decay)
