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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe, publish
from benchmarks.steps import EVENT_DROPOUT, Batch, Precision, Stepper, endless_batches, new_model, prepare
from benchmarks.synthetic import invented
from model.losses import Losses
from model.seqsetvae import SeqSetVAE
from training.schedule import learning_rate_at
from training.step import accumulate_gradients, step_numbers

PARTS = ("total", "reconstruction", "kl", "outcome")


class Run:
    """One precision's model and optimiser."""

    def __init__(self, model: SeqSetVAE, precision: Precision, steps: int, **optimisation: Any) -> None:
        stepper = Stepper(copy.deepcopy(model).train(), precision, **optimisation)
        self.model, self.state, self.settings, self.steps = stepper.model, stepper.state, stepper.settings, steps

    def gradients(self, ready: Batch, step: int) -> tuple[Losses, Tensor]:
        """Return the losses, and the gradient as one vector; both stay with the model for :meth:`update`."""
        self.state.progress.step = step
        self.state.optimizer.zero_grad(set_to_none=True)
        numbers = step_numbers(self.state, ready.counts, self.settings)
        losses = accumulate_gradients(ready.parts, numbers, self.state, self.settings)
        gradients = []
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= self.state.scaler.get_scale()
            gradients.append(parameter.grad.flatten())
        return losses, torch.cat(gradients)

    def update(self, step: int) -> None:
        optimisation = self.settings.optimisation
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate_at(optimisation, step, self.steps)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimisation.gradient_clip)
        self.state.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where patients come from; otherwise sizes are made up and values random")
    parser.add_argument("--preset", choices=("small", "reference"), default="small")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.data_dir:
        batches = list(itertools.islice(endless_batches(options.data_dir, 16), options.steps))
    else:
        batches = [prepare(invented(16, step), step, event_dropout=EVENT_DROPOUT) for step in range(options.steps)]
    result: dict[str, object] = {
        **describe(),
        "preset": options.preset,
        "data": "PhysioNet 2012 set A" if options.data_dir else "invented",
        "steps": options.steps,
    }
    model = new_model(options.preset, max(int(ready.batch.code.max()) for ready in batches) + 1)
    for precision in options.precisions:
        result[precision] = compare(model, precision, batches)
    publish(result, options.output)


def compare(model: SeqSetVAE, precision: Precision, batches: list[Batch], **optimisation: Any) -> dict[str, object]:
    """Return the deviations of ``precision`` over the batches, one training step each."""
    precisions: tuple[Precision, ...] = ("fp32", precision, precision)
    exact, rough, free = (Run(model, name, len(batches), **optimisation) for name in precisions)
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
