"""Batches, models, training steps and runs, for every benchmark that measures a training step.

The GPU benchmarks meet the model and the trainer through this module, ``benchmarks.synthetic`` and
``benchmarks.set_loop`` alone: when a name changes there, it changes here and nowhere else in ``benchmarks/gpu`` and
``tests/gpu``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from model.capacity import BatchShape
from model.config import ModelOptions, Preset, SeqSetVAEConfig
from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline import PatientBatch, PatientLoader, make_loader
from pipeline.dataset.manifest import Manifest
from training.augment import drop_events
from training.checkpoint import Checkpoint
from training.data import BatchPreparer, DataOptions, ReadyBatch
from training.json_lines import read_json_lines
from training.metrics import BatchAmounts
from training.parallel import World, choose_device
from training.profiling import count_flops
from training.schedule import OptimisationOptions
from training.state import build_state
from training.step import StepSettings, select_trained, train_step

Batch = ReadyBatch
"""What the loader yields and a step takes."""

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""The precisions whose speed is measured; fp16 is as fast as bf16."""

EVENT_DROPOUT = DataOptions().event_dropout


def endless_batches(
    data_dir: Path | str,
    batch_size: int,
    *,
    device: str = "cpu",
    prefetch: int = 4,
    event_dropout: float = EVENT_DROPOUT,
    capacities: tuple[BatchShape, ...] = (),
) -> Iterator[Batch]:
    """Yield the training batches of a data directory, epoch after epoch, as ``train.py`` prepares them."""
    pin = torch.device(device).type == "cuda"
    preparer = BatchPreparer(seed=0, event_dropout=event_dropout, pin=pin, capacities=capacities)
    loader = make_loader(
        data_dir, split="train", batch_size=batch_size, seed=0, prefetch=prefetch, verify=False, transform=preparer
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def prepare(batch: PatientBatch, step: int = 0, *, event_dropout: float = 0.0) -> Batch:
    """Prepare a batch that no loader has made for training step ``step``, on the CPU."""
    seen = drop_events(batch, event_dropout, seed=0, step=step)
    parts = [BatchPreparer(seed=0).prepare(seen, step)]
    return ReadyBatch(parts=parts, batch=seen, counts=count_batch(seen), amounts=BatchAmounts.of(batch))


def padding_waste_of(data_dir: Path | str, batch_size: int) -> float:
    """Return the share of padding among the events of an epoch's padded batches."""
    loader = make_loader(
        data_dir, batch_size=batch_size, seed=0, prefetch=0, transform=lambda batch, place: BatchAmounts.of(batch)
    )
    amounts = list(loader)
    return 1 - sum(of.num_events for of in amounts) / sum(of.event_cells for of in amounts)


def num_codes(data_dir: Path | str) -> int:
    """Return the number of rows of the vocabulary of a data directory."""
    return Manifest.load(Path(data_dir)).num_codes


def count_batch(batch: PatientBatch) -> LossCounts:
    """Return the number of events, sets and labelled patients by which the losses of a batch are divided."""
    return LossCounts(
        num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=(int((batch.label >= 0).sum()),)
    )


# ------------------------------------------------------------------------------------------------ steps


def new_model(preset: Preset, codes: int) -> SeqSetVAE:
    """Make an untrained model on the CPU, with the same weights at every call."""
    torch.manual_seed(0)
    return SeqSetVAE(SeqSetVAEConfig.preset(preset, num_codes=codes, dropout=ModelOptions().dropout))


class Stepper:
    """The state of a run, without its files, which makes the training steps of ``train.py``.

    Args:
        model: What is trained; it is moved to the device.
        precision: Of matrix products.
        device: Where the steps are computed; on ``meta`` they are shapes alone.
        optimisation: Other options of the optimisation.
    """

    def __init__(
        self,
        model: SeqSetVAE,
        precision: Precision = "fp32",
        *,
        device: str = "cpu",
        **optimisation: Any,
    ) -> None:
        self.world = World(0, 1, torch.device(device) if device == "meta" else choose_device(device, 0))
        self.settings = StepSettings(
            loss=LossOptions(),
            optimisation=OptimisationOptions(precision=precision, **optimisation),
            world=self.world,
            total_steps=10_000,
            preparer=BatchPreparer(seed=0),
            has_gauges=True,  # as by default
        )
        self.model = model.to(self.world.device)
        select_trained(self.model, self.settings.loss, self.settings.optimisation)
        no_loader = cast(PatientLoader, None)  # the loader of a state is for its checkpoints alone
        self.state = build_state(self.model, no_loader, self.settings.optimisation)

    def step(self, batch: Batch) -> Tensor:
        """Make one training step and return its loss, on the device, without waiting for it."""
        losses, _ = train_step(self.state, batch, self.settings)
        return losses.total


def outputs_and_gradients(
    model: SeqSetVAE,
    batch: PatientBatch,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    noise: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Run one forward and backward pass on ``device``.

    Returns:
        ``outputs``, ``losses`` and ``gradients`` by name, as float32 tensors on the CPU.
    """
    options, scale = LossOptions(), 1024.0 if precision == "fp16" else 1.0
    model = model.to(device).train(noise)
    model.zero_grad(set_to_none=True)
    prepared = PreparedBatch.build(batch, seed=0, step=5).to(device)
    with OptimisationOptions(precision=precision).autocast(torch.device(device)):
        output = model(prepared)
        losses = compute_losses(output, prepared.batch.label, options, count_batch(batch), beta=options.beta)
    (losses.total * scale).backward()
    outputs = {name: getattr(output, name) for name in ("context", "decoded", "probability")}
    groups = {
        "outputs": outputs | output.posterior._asdict(),
        "losses": {name: getattr(losses, name) for name in ("total", "reconstruction", "kl", "outcome")},
        "gradients": {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None},
    }
    return {kind: {name: t.detach().float().cpu() for name, t in group.items()} for kind, group in groups.items()}


def flops_of(batch: PatientBatch, model: SeqSetVAE) -> float:
    """Return the floating-point operations of one training step on a batch."""
    return sum(count_flops(model, PreparedBatch.build(batch), LossOptions()).values())


# ------------------------------------------------------------------------------------------------ runs


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return what a run of ``train.py`` has written so far.

    Returns:
        ``train`` and ``valid``, the records of ``metrics.jsonl``, and ``summary``, empty until the run has ended.
    """
    log, summary = run_dir / "metrics.jsonl", run_dir / "summary.json"
    records = read_json_lines(log) if log.exists() else []
    by_kind: dict[str, Any] = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid")}
    return {**by_kind, "summary": json.loads(summary.read_text()) if summary.exists() else {}}


def read_weights(run_dir: Path) -> tuple[int, Tensor]:
    """Return the step at which ``last.pt`` of a run was saved and all its weights as one float32 vector."""
    saved = Checkpoint.load(run_dir / "checkpoints" / "last.pt")
    weights = [tensor.flatten().float() for tensor in saved.state["model"].values() if tensor.is_floating_point()]
    return saved.step, torch.cat(weights)
