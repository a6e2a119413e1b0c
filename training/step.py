"""One optimiser step on a global batch, of which this rank has a share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from model.losses import LossCounts, Losses, LossOptions, beta_at, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from training.console import log_main
from training.data import BatchPreparer, ReadyBatch
from training.memory import halve, is_out_of_memory
from training.parallel import World
from training.schedule import OptimisationOptions, learning_rate_at
from training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What decides a step besides state and batch.

    Attributes:
        loss: weights and schedules of the losses.
        optimisation: learning rate, clipping, EMA, precision.
        world: this process among the ranks.
        total_steps: over which the learning rate falls.
        preparer: prepares smaller parts where memory ends.
    """

    loss: LossOptions
    optimisation: OptimisationOptions
    world: World
    total_steps: int
    preparer: BatchPreparer


def select_trained(model: SeqSetVAE, loss: LossOptions, optimisation: OptimisationOptions) -> None:
    """Let only those parameters have gradients that the objective, or ``--freeze``, trains."""
    for name, parameter in model.named_parameters():
        in_head, in_decoder = name.startswith("head."), name.startswith("decoder.")
        trained = in_head if optimisation.freeze else True
        trained &= loss.learns_outcome if in_head else loss.learns_sets if in_decoder else True
        frozen_table = model.config.frozen_embeddings and parameter is model.events.embedding
        parameter.requires_grad_(trained and not frozen_table)


def wrap_for_ranks(model: SeqSetVAE, world: World) -> torch.nn.Module:
    """Return what a step calls: the model, or with several ranks the model whose gradients are averaged over them.

    A rank that got no patients, or only sets of one event, uses a part of the parameters; the others take its share of
    those gradients as zero.
    """
    if world.size == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def train_step(
    model: torch.nn.Module, state: TrainState, ready: ReadyBatch, settings: StepSettings
) -> tuple[Losses, Tensor]:
    """Make one step; return this rank's share of the losses and the norm of the gradient, both on the device.

    A batch that does not fit the memory is taken again in smaller parts.  Losses are sums over patients and noise is a
    patient's own, so the gradient is that of the whole.

    Args:
        model: as :func:`wrap_for_ranks` gives it.
        state: of the run; its model, EMA, optimiser, scaler and progress move on.
        ready: this rank's share of the global batch.
        settings: the rest.
    """
    optimisation, step = settings.optimisation, state.progress.step
    # Schedules and noise are functions of the step alone, so a resumed run needs none of their state.
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate_at(optimisation, step, settings.total_steps)
    parts, losses = ready.parts, None
    while losses is None:
        state.optimizer.zero_grad(set_to_none=True)
        try:
            losses = accumulate_gradients(model, parts, ready.counts, state, settings)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if losses is None:  # outside of the handler nothing holds what the failed part had
            parts = smaller_parts(parts, step, settings)
    with record_function("optimiser"):
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), optimisation.gradient_clip or math.inf)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        update_ema(state, optimisation.ema_decay)
    state.progress.step = step + 1
    return losses, norm


def accumulate_gradients(
    model: torch.nn.Module, parts: list[PreparedBatch], counts: LossCounts, state: TrainState, settings: StepSettings
) -> Losses:
    """Add up the gradients of a batch part by part; return the sum of the losses, without a graph."""
    world, total = settings.world, None
    for number, part in enumerate(parts, start=1):
        with record_function("copy"):
            prepared = part.to(world.device, non_blocking=True)
        # Ranks wait for one another in a backward pass that ends with a sum over all: the last part's.
        waits = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            losses = forward_losses(model, prepared, counts, settings, state.progress.step)
            with record_function("backward"):
                # Losses are shares of a sum, and ranks' gradients are averaged.
                state.scaler.scale(losses.total * world.size).backward()
        losses = dataclasses.replace(losses, total=losses.total.detach())
        total = losses if total is None else total + losses
    assert total is not None
    return total


def forward_losses(
    model: torch.nn.Module, prepared: PreparedBatch, counts: LossCounts, settings: StepSettings, step: int
) -> Losses:
    """Return the losses of a training step on one part of a batch; what the objective does not use is not computed."""
    loss = settings.loss
    with settings.optimisation.autocast(settings.world.device):
        output = model(prepared, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        with record_function("losses"):
            return compute_losses(output, prepared.batch.label, loss, counts, beta=beta_at(loss, step))


def smaller_parts(parts: list[PreparedBatch], step: int, settings: StepSettings) -> list[PreparedBatch]:
    """Return a batch for which there was no memory in smaller parts, and say so.

    Raises:
        UserError: there are none; or there are other ranks, which cannot be told to begin the step again.
    """
    largest = max((part.batch for part in parts), key=lambda batch: batch.num_events)
    size = f"{largest.num_patients} patients, {largest.num_events:,} events in {largest.num_sets:,} sets"
    if settings.world.size > 1:
        raise UserError(f"out of memory in step {step + 1}, on {size}: give --max_memory, or lower --batch_size")
    if largest.num_patients == 1:
        advice = "give --gradient_checkpointing, or cut patients with --max_sequence_length"
        raise UserError(f"out of memory in step {step + 1}, on a single patient: {size}; {advice}")
    smaller = [settings.preparer.prepare(half, step) for part in parts for half in halve(part.batch)]
    log_main(
        settings.world, f"warning: out of memory in step {step + 1}, on {size}: taken again in {len(smaller)} parts"
    )
    return smaller


@torch.no_grad()
def update_ema(state: TrainState, decay: float) -> None:
    """Move the EMA weights towards the model's; early in a run it forgets its beginning sooner."""
    step = state.progress.step
    decay = min(decay, (1 + step) / (10 + step))
    parameters: list[Any] = [*state.model.parameters()]
    torch._foreach_lerp_([*state.ema_model.parameters()], parameters, 1 - decay)
