"""The state of a run: everything that a checkpoint holds, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.config import SeqSetVAEConfig
from model.seqsetvae import SeqSetVAE
from pipeline.dataset.tables import load_embeddings
from pipeline.loading.loader import PatientLoader
from pipeline.schema import UserError
from training.collapse import CollapseGauges
from training.data import DataSet
from training.metrics import Progress
from training.options import TrainOptions
from training.schedule import OptimisationOptions, parameter_groups
from training.trees import choose_tree_share

ADAM_EPS = 1e-6
"""With the usual 1e-8, weights that matter to nothing would follow the rounding noise of their gradients."""

FIRST_SCALE = 1024
"""First scale of fp16 losses: the usual 65,536 overflows, and so wastes, the first steps, for losses are sums."""


PARTS = ("loader", "model", "ema_model", "optimizer", "scaler", "gauges")
"""What has a state of its own; the loader's is restored first, as it refuses other batches."""


@dataclass(kw_only=True)
class TrainState:
    """What changes from step to step.

    ``ema_model``, a moving average, is validated, saved and used to predict; ``gauges`` are of the sets of the steps
    since they were last read.
    """

    model: SeqSetVAE
    ema_model: SeqSetVAE
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: PatientLoader
    gauges: CollapseGauges
    progress: Progress

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that :meth:`load_state_dict` restores the run from."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return {**parts, "progress": dataclasses.asdict(self.progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore everything but the optimiser's settings, which are those of the options of now."""
        settings = [dict(group) for group in self.optimizer.param_groups]
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({**own, "params": group["params"]})
        self.progress = Progress(**state["progress"])

    def check_finite(self, *, last_loss: float) -> None:
        """Raise UserError where the losses or the weights are not finite, so that no checkpoint ever holds such."""
        tensors = [*self.model.parameters(), *self.ema_model.parameters()]
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()
        if not (bool(finite) and abs(last_loss) < float("inf")):
            advice = "lower --learning_rate, or use --precision bf16 or fp32; the last checkpoint is untouched"
            raise UserError(f"loss or weights are not finite at step {self.progress.step}: {advice}")


def build_model(options: TrainOptions, data: DataSet) -> SeqSetVAE:
    """Return an untrained model for this data; the same weights for the same seed on every rank and device."""
    chosen = options.model
    changes: dict[str, Any] = {name: getattr(chosen, name) for name in ("event_form", "dropout", "without")}
    changes |= {"outcomes": data.outcomes, "tree_share": choose_tree_share(chosen, options.loss, data)}
    embeddings, manifest = None, data.manifest
    if manifest.embedding_dim is not None:
        embeddings = torch.from_numpy(load_embeddings(data.folder, manifest))
        changes |= {"embedding_dim": manifest.embedding_dim, "frozen_embeddings": True}
    torch.manual_seed(options.run.seed)
    config = SeqSetVAEConfig.preset(chosen.preset, num_codes=manifest.num_codes, **changes)
    model = SeqSetVAE(config, embeddings)
    model.gradient_checkpointing = chosen.gradient_checkpointing
    return model


def build_state(model: SeqSetVAE, loader: PatientLoader, options: OptimisationOptions) -> TrainState:
    """Return the state of a run that begins, on the model's device."""
    groups = parameter_groups(model, options.weight_decay)
    device = next(model.parameters()).device
    captured = options.cuda_graphs and device.type == "cuda"
    return TrainState(
        model=model,
        ema_model=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=torch.optim.AdamW(groups, lr=options.learning_rate, eps=ADAM_EPS, fused=True, capturable=captured),
        scaler=torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=options.precision == "fp16"),
        loader=loader,
        gauges=CollapseGauges(model.config.width, device),
        progress=Progress(),
    )
