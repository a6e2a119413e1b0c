"""Losses as sums over events, sets and patients, to be divided by counts of the whole job (docs/model.md §6).

Nothing here is a mean: a mean over a batch would weight a patient by who shares its batch, a mean over a rank by how
many ranks there are.  Each sum is divided by the number of events, sets or labelled patients of the *global* batch.

Shape suffixes: S sets, B patients, D width, T outcomes, K ensemble heads, C classes of an outcome.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import Outcome
from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.reconstruction import chamfer_sums
from model.seqsetvae import SeqSetVAEOutput
from model.set_vae import Posterior
from pipeline.options import check_section, option
from pipeline.schema import UNLABELLED

Objective = Literal["joint", "supervised", "pretrain"]
BetaSchedule = Literal["linear", "cyclical"]
ClassWeights = Literal["equal", "balanced"]

DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT = 1.0, 1.0, 3.0
"""Weights of the distances that make up the reconstruction error."""

PREFIX_HOURS = (12.0, 24.0, 36.0)
"""Hours after a patient's first set whose answers ``--prefix_weight`` weighs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Loss"""

    objective: Objective = option(
        "joint",
        "What is learned: sets and outcome (joint), the outcome alone (supervised), or sets alone (pretrain), which "
        "needs no labels.",
    )
    vae_weight: float = option(0.3, "Weight of reconstruction + beta × KL divergence in the loss.", minimum=0)
    outcome_weight: float = option(1.0, "Weight of the outcomes' losses in the loss.", minimum=0)
    task_weights: tuple[float, ...] = option(
        (), "With several tasks: the weight of each one's loss among them, in their order. Default: 1 each.", minimum=0
    )
    prefix_weight: float = option(
        0.0,
        "Weight of the outcomes' losses after the first 12, 24 and 36 hours of each patient, together, beside that at "
        "the end, which has 1. The answers come from the same pass.",
        minimum=0,
    )
    distill: float | Literal["auto"] = option(
        "auto",
        "Weight of a teacher's probabilities, beside the labels, in what a binary outcome is trained towards: those of "
        "trees and linear models on summaries, fitted to other patients. 0 = labels alone; auto = 0.4 where one binary "
        "task has 500 to 50,000 labelled training samples, else 0.",
        minimum=0,
        maximum=1,
    )
    pos_weight: float = option(
        1.0,
        "Weight of the positive samples of binary tasks in the cross-entropy; other than 1 it shifts probabilities.",
        minimum=0,
    )
    class_weights: ClassWeights = option(
        "equal",
        "Whether samples of all classes count alike (equal), or all classes with labels in training do (balanced), "
        "which shifts probabilities.",
    )
    beta: float = option(0.1, "Weight of the KL divergence after warm-up.", minimum=0)
    beta_warmup_steps: int = option(5000, "Number of steps over which beta rises from 0.", minimum=0)
    beta_schedule: BetaSchedule = option(
        "linear", "Whether beta rises once (linear) or again after as many steps at its maximum (cyclical)."
    )
    free_bits: float = option(0.1, "KL divergence in nats that each dimension of a set may have at no cost.", minimum=0)

    def __post_init__(self) -> None:
        check_section(self)

    @property
    def learns_sets(self) -> bool:
        return self.objective != "supervised"

    @property
    def learns_outcome(self) -> bool:
        return self.objective != "pretrain"

    @property
    def prefix_hours(self) -> tuple[float, ...]:
        """Hours after which training answers too."""
        return PREFIX_HOURS if self.learns_outcome and self.prefix_weight else ()

    @property
    def effective_vae_weight(self) -> float:
        """The weight of the VAE's part under the objective."""
        return {"joint": self.vae_weight, "supervised": 0.0, "pretrain": 1.0}[self.objective]

    @property
    def effective_outcome_weight(self) -> float:
        """The weight of the outcomes' part under the objective."""
        return self.outcome_weight if self.learns_outcome else 0.0

    def weight_of(self, task: int) -> float:
        """Return the weight of a task among the tasks."""
        return self.task_weights[task] if self.task_weights else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCounts:
    """Numbers of events, sets and, for each task, labelled patients of the global batch, by which sums are divided.

    In a captured graph they are scalars on the device: numbers would be constants there.
    """

    num_events: int | Tensor
    num_sets: int | Tensor
    num_labelled: tuple[int | Tensor, ...]

    @classmethod
    def one(cls, num_tasks: int) -> LossCounts:
        """Return counts by which losses stay sums."""
        return cls(num_events=1, num_sets=1, num_labelled=(1,) * num_tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of one batch; those of all ranks add up to the losses of the global batch.

    Attributes:
        total: the scalar that is differentiated.
        reconstruction, kl, outcome: its parts before they are weighted, without gradient; 0 for a part that was not
            computed.  The outcome's is the sum over tasks, weighted among themselves.
        tasks: [T], the loss of each task, without gradient.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    outcome: Tensor
    tasks: Tensor

    def __add__(self, other: Losses) -> Losses:
        """Add the losses of two parts of a batch."""
        return Losses(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def beta_at(options: LossOptions, step: int) -> float:
    """Return the weight of the KL divergence at a step, after a linear warm-up.

    A cycle (Fu et al. 2019, arXiv:1903.10145) is half warm-up, half the maximum.
    """
    warmup = max(options.beta_warmup_steps, 1)
    done = step % (2 * warmup) if options.beta_schedule == "cyclical" else step
    return options.beta * min(1.0, (done + 1) / warmup)


def compute_losses(
    output: SeqSetVAEOutput, label: Tensor, options: LossOptions, counts: LossCounts, *, beta: float | Tensor
) -> Losses:
    """Return the sums over this batch divided by the counts of the global batch.

    Args:
        output: of the model; reconstruction and KL divergence need ``decoded``, the outcomes need ``logits``.  Samples
            that follow those of the batch are prefixes of its patients, as many times all of them.
        label: of the samples of the batch, see :attr:`PatientBatch.sample_label`.
        options: the weights.
        counts: of the global batch.
        beta: weight of the KL divergence at this step; in a captured graph a scalar on the device.
    """
    zeros = output.context.new_zeros(3 + len(output.outcomes), dtype=torch.float32)
    (reconstruction, kl, total), tasks = zeros[:3].unbind(), zeros[3:]
    outcome = total
    if output.decoded is not None:
        direction, magnitude, squared = chamfer_sums(output.events, output.decoded, output.sets)
        error = DIRECTION_WEIGHT * direction + MAGNITUDE_WEIGHT * magnitude + SQUARED_WEIGHT * squared
        reconstruction = error / _at_least_one(counts.num_events)
        kl = kl_sum(output.posterior, options.free_bits, output.sets.num_counted) / _at_least_one(counts.num_sets)
        total = options.effective_vae_weight * (reconstruction + beta * kl)
    if output.logits is not None:
        samples = len(label)
        outcome, tasks = _outcome_losses(output.first(samples), label, options, counts)
        total = total + options.effective_outcome_weight * outcome
        if times := (len(output.logits[0]) - samples) // max(samples, 1):
            early = replace(output, logits=tuple(each[samples:] for each in output.logits))
            repeated = label.repeat(times, *[1] * (label.ndim - 1))
            weight = options.effective_outcome_weight * options.prefix_weight / times
            total = total + weight * _outcome_losses(early, repeated, options, counts)[0]
    return Losses(
        total=total,
        reconstruction=reconstruction.detach(),
        kl=kl.detach(),
        outcome=outcome.detach(),
        tasks=tasks.detach(),
    )


def _outcome_losses(
    output: SeqSetVAEOutput, label: Tensor, options: LossOptions, counts: LossCounts
) -> tuple[Tensor, Tensor]:
    """Return the loss of the outcomes, weighted among themselves, and that of each [T]."""
    assert output.logits is not None
    labels = [label] * len(output.logits) if label.ndim == 1 else [*label.unbind(1)]
    sums = [outcome_sum(*each, options) for each in zip(output.outcomes, output.logits, labels, strict=True)]
    losses = [each / _at_least_one(count) for each, count in zip(sums, counts.num_labelled, strict=True)]
    if len(losses) == 1:
        return losses[0], losses[0][None]
    weighted = [options.weight_of(task) * loss for task, loss in enumerate(losses)]
    return sum(weighted[1:], weighted[0]), torch.stack(losses)


def outcome_sum(outcome: Outcome, logits_BKC: Tensor, label_B: Tensor, options: LossOptions) -> Tensor:
    """Return the loss of an outcome summed over labelled patients, and averaged over ensemble heads.

    For classes it is the cross-entropy; for a regression half the squared error of the standardised target, which is
    the likelihood of a normal distribution.

    Args:
        outcome: what it is.
        logits_BKC: of its ensemble.
        label_B: float32, NaN = unlabelled, of a binary outcome the probability of a positive label; or of classes
            int64, -1 = unlabelled.
        options: the weights of classes.
    """
    heads = logits_BKC.shape[1]
    if outcome.kind == "regression":
        error_BK = logits_BKC[:, :, 0].float() - (label_B[:, None] - outcome.mean) / outcome.std
        return 0.5 * torch.where(label_B.isnan()[:, None], 0.0, error_BK).square().sum() / heads
    weights_C = class_weights(outcome, options.pos_weight, options.class_weights, logits_BKC.device)
    if outcome.kind == "binary" and label_B.is_floating_point():
        target_B2 = torch.stack([1 - label_B, label_B], dim=1).nan_to_num()
        log_BKC = logits_BKC.float().log_softmax(2)
        return -(log_BKC * (target_B2 if weights_C is None else weights_C * target_B2)[:, None]).sum() / heads
    if label_B.is_floating_point():
        label_B = label_B.nan_to_num(nan=UNLABELLED).long()
    labels = label_B.repeat_interleave(heads)
    return cross_entropy_sum(logits_BKC.flatten(0, 1), labels, weights_C) / heads


@functools.lru_cache(maxsize=64)
def class_weights(outcome: Outcome, pos_weight: float, kind: ClassWeights, device: torch.device) -> Tensor | None:
    """Return [C] float32, the weights of the classes of an outcome in the cross-entropy; None = all are 1.

    They are made once a device, for a step must not wait for a copy.
    """
    weights = [1.0] * len(outcome.classes)
    if kind == "balanced" and outcome.prior:
        seen = sum(share > 0 for share in outcome.prior)
        weights = [1 / (seen * share) if share > 0 else 0.0 for share in outcome.prior]
    if outcome.kind == "binary":
        weights[1] *= pos_weight
    return None if set(weights) == {1.0} else torch.tensor(weights, device=device)


def _at_least_one(number: int | Tensor) -> int | Tensor:
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


def kl_per_dimension(posterior: Posterior) -> Tensor:
    """Return [S, D], ``½(exp(logvar) + mu² − 1 − logvar)``: the divergence from a standard normal (Kingma & Welling
    2014, app. B).
    """
    mu, logvar = posterior.mu.float(), posterior.logvar.float()
    return 0.5 * (logvar.exp() + mu.square() - 1 - logvar)


def kl_sum(posterior: Posterior, free_bits: float, num_sets: Tensor) -> Tensor:
    """Return the sum over the first ``num_sets`` [1] sets and all dimensions, each dimension of each set counting at
    least ``free_bits``.

    The floor is that of single sets, not of a batch's mean as in Kingma et al. 2016 (§C.8), so that the loss of a
    patient does not depend on who shares its batch.
    """
    if uses_kernels(posterior.mu.device):
        divergence: Tensor = ops.divergence(posterior.mu, posterior.logvar, num_sets, free_bits)
        return divergence
    is_counted = torch.arange(len(posterior.mu), device=num_sets.device) < num_sets
    return (kl_per_dimension(posterior).clamp_min(free_bits) * is_counted[:, None]).sum()


def cross_entropy_sum(logits_BC: Tensor, label_B: Tensor, weights_C: Tensor | None = None) -> Tensor:
    """Return the sum over labelled patients, each weighted by its class, without those of label -1."""
    return F.cross_entropy(logits_BC.float(), label_B, weights_C, ignore_index=UNLABELLED, reduction="sum")
