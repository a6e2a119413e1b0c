"""bfloat16 and float16 beside float32: losses and gradients of the same training steps.

    python -m benchmarks.precision [--data_dir DATA] [--preset small] [--steps 100] [--output FILE.json]

Batches, noise, schedules and first weights are the same for all.  ``one step``: at every step the rough loss and
gradient are taken at float32's own weights, so deviations do not add up.  ``free``: each precision trains on its own
weights, as a run does; its losses are compared step by step with those of float32.  Deviations are relative: of losses
|rough − exact| / |exact|, of gradients the norm of the difference by the norm of the exact one.  float16 scales its
loss by a fixed 1,024, at which a training run begins.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe, publish
from benchmarks.synthetic import invented
from model.config import SeqSetVAEConfig
from model.losses import LossCounts, Losses, beta_at, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader
from train import learning_rate, parameter_groups
from training.augment import drop_events
from training.options import TrainOptions

SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1024.0}
PARTS = ("total", "reconstruction", "kl", "classification")


class Run:
    """One precision's model and optimiser."""

    def __init__(self, model: SeqSetVAE, dtype: torch.dtype, options: TrainOptions, steps: int) -> None:
        self.model, self.dtype, self.options, self.steps = copy.deepcopy(model), dtype, options, steps
        groups = parameter_groups(self.model, options)
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-6, fused=True)

    def gradients(self, batch: PatientBatch, step: int) -> tuple[Losses, Tensor]:
        """Losses, and the gradient as one vector; both stay with the model for :meth:`update`."""
        options, scale = self.options, SCALE[self.dtype]
        counts = LossCounts(
            num_events=batch.num_events,
            num_sets=batch.num_sets,
            num_labelled=int((batch.label >= 0).sum()),
        )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(PreparedBatch.build(batch, seed=options.seed, step=step))
            weights = options.loss_options()
            found = compute_losses(output, batch.label, weights, counts, beta=beta_at(weights, step))
        (found.total * scale).backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale
        return found, torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])

    def update(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(self.options, step, self.steps)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where patients come from; otherwise sizes are made up and values random")
    parser.add_argument("--preset", choices=("small", "reference"), default="small")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    options = TrainOptions(data_dir="-", output_dir="-", preset=given.preset)
    batches = [
        drop_events(batch, options.event_dropout, seed=options.seed, step=step)
        for step, batch in enumerate(batches_of(given.data_dir, given.steps))
    ]
    torch.manual_seed(0)
    num_codes = max(int(batch.code.max()) for batch in batches) + 1
    model = SeqSetVAE(SeqSetVAEConfig.preset(options.preset, num_codes=num_codes, dropout=options.dropout))
    result: dict[str, object] = {
        **describe(),
        "preset": given.preset,
        "data": "PhysioNet 2012 set A" if given.data_dir else "invented",
        "steps": given.steps,
    }
    for name in given.precisions:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        result[name] = compare(model, dtype, batches, options)
    publish(result, given.output)


def batches_of(data_dir: str | None, steps: int) -> list[PatientBatch]:
    if data_dir is None:
        return [invented(16, step) for step in range(steps)]
    loader = make_loader(data_dir, split="train", batch_size=16, seed=0)
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps))


def compare(
    model: SeqSetVAE, dtype: torch.dtype, batches: list[PatientBatch], options: TrainOptions
) -> dict[str, object]:
    """Deviations of ``dtype`` over the batches, one training step each."""
    exact, rough, free = (Run(model, of, options, len(batches)) for of in (torch.float32, dtype, dtype))
    names = [*PARTS, "gradient", "gradient_cosine_distance", "free_total"]
    deviations: dict[str, list[float]] = {name: [] for name in names}
    for step, batch in enumerate(batches):
        rough.model.load_state_dict(exact.model.state_dict())
        (loss, gradient), (rough_loss, rough_gradient) = (run.gradients(batch, step) for run in (exact, rough))
        for part in PARTS:
            deviations[part].append(relative(getattr(rough_loss, part), getattr(loss, part)))
        deviations["gradient"].append(float((rough_gradient - gradient).norm() / gradient.norm()))
        cosine = torch.nn.functional.cosine_similarity(rough_gradient.double(), gradient.double(), dim=0)
        deviations["gradient_cosine_distance"].append(float(1 - cosine))
        free_loss, _ = free.gradients(batch, step)
        deviations["free_total"].append(relative(free_loss.total, loss.total))
        exact.update(step)
        free.update(step)
    weights = [torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (exact, free)]
    summary = {
        name: {"median": float(np.median(values)), "largest": float(np.max(values))}
        for name, values in deviations.items()
    }
    rounded = {name: {of: float(f"{value:.3g}") for of, value in row.items()} for name, row in summary.items()}
    return {
        **rounded,
        "free_weights_after": float(f"{float((weights[1] - weights[0]).norm() / weights[0].norm()):.3g}"),
    }


def relative(rough: Tensor, exact: Tensor) -> float:
    return float((rough.detach() - exact.detach()).abs() / exact.detach().abs())


if __name__ == "__main__":
    main()
