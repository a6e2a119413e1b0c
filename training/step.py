"""One optimiser step on a global batch, of which this rank has a share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
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


@dataclass(frozen=True)
class StepSettings:
    """What decides a step besides state and batch.

    The learning rate falls over ``total_steps``; ``preparer`` makes smaller parts where memory ends.
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


def train_step(state: TrainState, ready: ReadyBatch, settings: StepSettings) -> tuple[Losses, Tensor]:
    """Make one step; return this rank's share of the losses and the norm of the gradient, both on the device.

    Model, EMA, optimiser, scaler and progress of ``state`` move on; ``ready`` is this rank's share of the global batch.
    A batch that does not fit the memory is taken again in smaller parts.  Losses are sums over patients and noise is a
    patient's own, so the gradient is that of the whole.
    """
    optimisation, step = settings.optimisation, state.progress.step
    # Schedules and noise are functions of the step alone, so a resumed run needs none of their state.
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate_at(optimisation, step, settings.total_steps)
    parts, losses = ready.parts, None
    while losses is None:
        state.optimizer.zero_grad(set_to_none=True)
        try:
            losses = accumulate_gradients(parts, ready.counts, state, settings)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if losses is None:  # outside of the handler nothing holds what the failed part had
            parts = smaller_parts(parts, step, settings)
    with record_function("optimiser"):
        sum_gradients([*state.model.parameters()], settings.world)
        state.scaler.unscale_(state.optimizer)
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        norm = clip_gradients(gradients, optimisation.gradient_clip or math.inf)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        update_ema(state, optimisation.ema_decay)
    state.progress.step = step + 1
    return losses, norm


def accumulate_gradients(
    parts: list[PreparedBatch], counts: LossCounts, state: TrainState, settings: StepSettings
) -> Losses:
    """Add up the gradients of a batch part by part; return the sum of the losses, without a graph."""
    total = None
    for part in parts:
        with record_function("copy"):
            prepared = part.to(settings.world.device, non_blocking=True)
        losses = forward_losses(state.model, prepared, counts, settings, state.progress.step)
        with record_function("backward"):
            state.scaler.scale(losses.total).backward()
        losses = dataclasses.replace(losses, total=losses.total.detach())
        total = losses if total is None else total + losses
    assert total is not None
    return total


def sum_gradients(parameters: list[torch.nn.Parameter], world: World) -> None:
    """Add up gradients over ranks, in one message; losses are shares of a sum, so gradients are too.

    A rank that got no patients, or only sets of one event, has no gradient of some parameters and adds nothing to
    theirs.  A parameter without a gradient on any rank stays without one, as on a single device.
    """
    if world.size == 1:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=world.control)
    shared = [parameter for parameter, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared])
    pieces = world.sum(flat).split([parameter.numel() for parameter in shared])
    for parameter, piece in zip(shared, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def forward_losses(
    model: SeqSetVAE, prepared: PreparedBatch, counts: LossCounts, settings: StepSettings, step: int
) -> Losses:
    """Return the losses of a training step on one part of a batch; what the objective does not use is not computed."""
    loss = settings.loss
    with settings.optimisation.autocast(settings.world.device):
        output = model(prepared, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        with record_function("losses"):
            return compute_losses(output, prepared.batch.label, loss, counts, beta=beta_at(loss, step))


def smaller_parts(parts: list[PreparedBatch], step: int, settings: StepSettings) -> list[PreparedBatch]:
    """Return a batch for which there was no memory in smaller parts, and say so.

    It is a UserError if there are none, or other ranks, which cannot be told to begin the step again.
    """
    largest = max((part.batch for part in parts), key=lambda batch: batch.num_events)
    size = f"{largest.num_patients} patients, {largest.num_events:,} events in {largest.num_sets:,} sets"
    if settings.world.size > 1:
        raise UserError(f"out of memory in step {step + 1}, on {size}: give --max_memory, or lower --batch_size")
    if largest.num_patients == 1:
        advice = "give --gradient_checkpointing, or cut patients with --max_sequence_length"
        raise UserError(f"out of memory in step {step + 1}, on a single patient: {size}; {advice}")
    smaller = [settings.preparer.prepare(half, step) for part in parts for half in halve(part.batch)]
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
def update_ema(state: TrainState, decay: float) -> None:
    """Move the EMA weights towards the model's; early in a run it forgets its beginning sooner."""
    step = state.progress.step
    decay = min(decay, (1 + step) / (10 + step))
    parameters: list[Any] = [*state.model.parameters()]
    torch._foreach_lerp_([*state.ema_model.parameters()], parameters, 1 - decay)
