"""How a run optimises: learning rate and weight decay over steps and parts of the model."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from model.capacity import MAX_CAPACITIES
from model.seqsetvae import SeqSetVAE
from pipeline.options import Section, option

LR_SCALES = {"encoder": 3.0, "decoder": 8.0}
"""Learning-rate scales of parts of the model at width ``LR_SCALES_WIDTH``.  Sets are learned from reconstruction, which
takes more steps than the outcome does, and would stay behind.  A wider model takes scales that are lower by as much
(Yang et al. 2022, arXiv:2203.03466), and no part's is below 1."""

LR_SCALES_WIDTH = 64

FINAL_LR = 0.05
"""Share of the peak learning rate at the last step."""


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions(Section):
    """Optimisation."""

    init_from: str | None = option(None, "Start from the EMA weights of this checkpoint.")
    freeze: bool = option(False, "Train the outcome head alone and keep the rest as --init_from gives it.")
    max_epochs: int = option(8, "Number of epochs.", minimum=1)
    stop_after: int = option(
        0, "Number of epochs after which the run ends, though the learning rate falls over --max_epochs; 0 = all.",
        minimum=0,
    )  # fmt: skip
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW, reached after warm-up.", minimum=0)
    weight_decay: float = option(0.1, "Weight decay of AdamW, on matrices only.", minimum=0)
    warmup_steps: int = option(50, "Steps over which the learning rate rises; a cosine lowers it after.", minimum=0)
    ema_decay: float = option(
        0.99, "Decay per step of the exponential moving average of the weights, which is validated and saved; 0 = the "
        "weights of the last step.", minimum=0, maximum=0.9999,
    )  # fmt: skip
    gradient_clip: float = option(1.0, "Maximum norm of the gradient; 0 = no limit.", minimum=0)
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "Precision of matrix products; losses, softmax sums and the posterior stay in float32."
    )

    cuda_graphs: bool = option(
        False,
        "Replay steps as CUDA graphs, which costs a step one launch: batches are filled up to one of at most "
        f"{MAX_CAPACITIES} sizes, and those that no size has room for run as without the flag.",
    )

    @property
    def num_epochs(self) -> int:
        """Return the number of epochs after which the run ends."""
        return min(self.stop_after or self.max_epochs, self.max_epochs)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which matrix products on ``device`` have the precision asked for."""
        enabled = self.precision != "fp32"
        if not torch.amp.is_autocast_available(device.type):
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype if enabled else None, enabled=enabled)


def learning_rate_at(options: OptimisationOptions, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return options.learning_rate * (FINAL_LR + (1 - FINAL_LR) * cosine)


def parameter_groups(model: SeqSetVAE, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups of parameters: ``params``, ``lr_scale`` and ``weight_decay``.

    Biases, norms and single vectors have no weight decay.  Which group a parameter is in depends on its name and shape
    alone, not on any option, so that an optimiser's state fits a run whose options have changed.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    width_scale = min(1.0, LR_SCALES_WIDTH / model.config.width)
    for name, parameter in model.named_parameters():
        lr_scale = max(LR_SCALES.get(name.partition(".")[0], 1.0) * width_scale, 1.0)
        is_matrix = parameter.ndim > 1 and not name.endswith("bias")
        groups.setdefault((lr_scale, is_matrix), []).append(parameter)
    return [
        # AdamW multiplies the decay by the group's learning rate.
        {"params": parameters, "lr_scale": lr_scale, "weight_decay": weight_decay / lr_scale if is_matrix else 0.0}
        for (lr_scale, is_matrix), parameters in groups.items()
    ]
