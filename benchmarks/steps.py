"""Batches, models, training steps and runs, for every benchmark that measures a training step.

This is the only module through which the GPU benchmarks meet the model and the trainer: when a name changes there, it
changes here and nowhere else in ``benchmarks/gpu`` and ``tests/gpu``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from training.flops import step_flops

import train
from model.config import SeqSetVAEConfig
from model.losses import LossCounts, chamfer_sums, cross_entropy_sum, kl_sum
from model.outcome import VariableLayout
from model.ragged import SetLayout
from model.seqsetvae import ModelInput, SeqSetVAE
from model.seqsetvae import losses as compute_losses
from model.sequence import SequenceLayout
from model.set_vae import Posterior
from pipeline.dataset.manifest import Manifest
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader
from pipeline.sampling.quality import padding_waste
from pipeline.schema import FIRST_CODE
from tests.data_dirs import Patient, write_data_dir
from training.augment import drop_events
from training.metrics import read_json_lines
from training.options import TrainOptions
from training.parallel import World

Batch: TypeAlias = PatientBatch
"""What the loader yields and a step takes."""

Preset = Literal["small", "reference"]
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""The precisions whose speed is measured; fp16 is as fast as bf16."""

# Share of sets that have 1, 2, … 16 events, in PhysioNet 2012 set A.
SET_SIZES = np.array([69, 39, 59, 88, 192, 212, 145, 87, 48, 33, 10, 4, 2, 2, 4, 6]) / 1000

# ------------------------------------------------------------------------------------------------ batches


def invented(batch_size: int, seed: int, *, sets: int | None = None, events: int | None = None) -> PatientBatch:
    """Make up a batch with as many sets and events per set as intensive-care stays have, or as many as asked for."""
    generator = np.random.default_rng(seed)
    num_sets = generator.integers(66, 81, batch_size) if sets is None else np.full(batch_size, sets)
    sizes = generator.choice(np.arange(1, 17), num_sets.sum(), p=SET_SIZES / SET_SIZES.sum())
    sizes = sizes if events is None else np.full_like(sizes, events)
    num_events = int(sizes.sum())
    minutes = [np.sort(generator.uniform(0, 2880, count)) for count in num_sets]
    zero = np.zeros(1, np.int64)
    return PatientBatch(
        code=torch.from_numpy(generator.integers(2, 43, num_events)),
        value=torch.from_numpy(generator.standard_normal(num_events, np.float32)),
        has_value=torch.ones(num_events, dtype=torch.bool),
        set_offsets=torch.from_numpy(np.concatenate([zero, sizes.cumsum()])),
        minute=torch.from_numpy(np.concatenate(minutes).astype(np.float32)),
        patient_offsets=torch.from_numpy(np.concatenate([zero, num_sets.cumsum()])),
        label=torch.from_numpy(generator.integers(0, 2, batch_size)),
        patient_id=[str(number) for number in range(batch_size)],
    )


def write_synthetic_data(directory: Path, *, num_patients: int, sets: int = 73, seed: int = 0) -> Path:
    """Write a data directory of made-up patients, with pyarrow alone, whose outcome can be learned.

    Sets are as large as those of intensive-care stays; patients have between half and one and a half times ``sets``
    of them.  One variable is higher, in the mean, in patients with the outcome.  Four fifths train, a tenth validates,
    a tenth tests.
    """
    rng = np.random.default_rng(seed)
    patients = []
    for number in range(num_patients):
        label = int(rng.random() < 0.3)
        num_sets = rng.integers(sets // 2, sets + sets // 2 + 1)
        sizes = rng.choice(np.arange(1, 17), num_sets, p=SET_SIZES / SET_SIZES.sum())
        codes = rng.integers(FIRST_CODE, NUM_SYNTHETIC_CODES, sizes.sum())
        values = rng.standard_normal(sizes.sum()) + (codes == FIRST_CODE) * label
        minutes = np.sort(rng.choice(4320, len(sizes), replace=False)).astype(float).tolist()
        events = zip(codes.tolist(), values.tolist(), strict=True)
        filled = [
            (minute, list(itertools.islice(events, size))) for minute, size in zip(minutes, sizes.tolist(), strict=True)
        ]
        patients.append(Patient(patient_id=f"synthetic-{number}", label=label, sets=filled))
    ends = num_patients * 8 // 10, num_patients * 9 // 10
    splits = {"train": patients[: ends[0]], "valid": patients[ends[0] : ends[1]], "test": patients[ends[1] :]}
    return write_data_dir(directory, splits, shard_size=1000, num_codes=NUM_SYNTHETIC_CODES)


NUM_SYNTHETIC_CODES = 43
"""As many as PhysioNet 2012 has, padding and unknown included."""


def endless_batches(
    data_dir: Path | str, batch_size: int, *, device: str = "cpu", prefetch: int = 4
) -> Iterator[Batch]:
    """Yield the training batches of a data directory, epoch after epoch, through the loader."""
    pinned = torch.device(device).type == "cuda"
    loader = make_loader(
        data_dir, split="train", batch_size=batch_size, seed=0, prefetch=prefetch, pin_memory=pinned, verify=False
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def padding_waste_of(data_dir: Path | str, batch_size: int) -> float:
    """Return the share of padding among the events of an epoch's padded batches."""
    loader = make_loader(data_dir, split="train", batch_size=batch_size, seed=0, prefetch=0)
    return padding_waste(loader.plan, loader._group.windows.num_events)


def num_codes(data_dir: Path | str) -> int:
    """Return the number of rows of the vocabulary of a data directory."""
    return Manifest.load(Path(data_dir)).num_codes


def counts_of(batch: PatientBatch) -> LossCounts:
    """Return the number of events, sets and labelled patients by which the losses of a batch are divided."""
    return LossCounts(num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=int((batch.label >= 0).sum()))


# ------------------------------------------------------------------------------------------------ steps


def new_model(preset: Preset, codes: int) -> SeqSetVAE:
    """Make an untrained model on the CPU, with the same weights at every call."""
    torch.manual_seed(0)
    return SeqSetVAE(SeqSetVAEConfig.preset(preset, num_codes=codes))


class Stepper:
    """A model with its optimiser, loss scaler and averaged weights, which makes the training steps of ``train.py``.

    Args:
        preset: Widths of the model.
        codes: Rows of the vocabulary.
        device: Where the steps are computed.
        event_dropout: Share of the events that a step leaves out.
        checkpointing: Whether activations are computed again rather than kept.
    """

    def __init__(
        self,
        preset: Preset,
        codes: int,
        *,
        device: str = "cpu",
        event_dropout: float = 0.3,
        checkpointing: bool = False,
    ) -> None:
        self.options = TrainOptions(data_dir="-", output_dir="-", preset=preset, event_dropout=event_dropout)
        self.world = World(0, 1, torch.device(device))
        self.model = new_model(preset, codes).to(device)
        self.model.gradient_checkpointing = checkpointing
        self.averaged = new_model(preset, codes).to(device).requires_grad_(False)
        groups = train.parameter_groups(self.model, self.options)
        self.optimizer = torch.optim.AdamW(groups, lr=self.options.learning_rate, eps=1e-6, fused=True)
        self.scaler = torch.amp.GradScaler(self.world.device.type, init_scale=1024)
        self.number = 0

    def step(self, batch: Batch, precision: Precision = "fp32") -> Tensor:
        """Make one training step on a batch on the CPU and return its loss, on the device, without waiting for it."""
        options = replace(self.options, precision=precision)
        seen = drop_events(batch, options.event_dropout, seed=0, step=self.number)
        prepared = ModelInput.of(seen).to(self.world.device)
        self.optimizer.zero_grad(set_to_none=True)
        losses = train.forward_losses(self.model, prepared, counts_of(seen), options, self.world, self.number)
        scaled = precision == "fp16"
        (self.scaler.scale(losses.total) if scaled else losses.total).backward()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.gradient_clip)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.averaged.parameters()], [*self.model.parameters()], 0.01)
        self.number += 1
        return losses.total.detach()


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
    options = TrainOptions(data_dir="-", output_dir="-", precision=precision, beta_warmup_steps=0)
    model = model.to(device)
    model.zero_grad(set_to_none=True)
    prepared = ModelInput.of(batch).to(device)
    scale = 1024.0 if precision == "fp16" else 1.0
    with train.autocast(options, World(0, 1, torch.device(device))):
        output = model(prepared, seed=0 if noise else None, step=5)
        label, counts = prepared.batch.label, counts_of(batch)
        losses = compute_losses(output, label, options.loss_weights(), counts, beta=options.beta)
    (losses.total * scale).backward()
    posteriors = {
        f"{name}_{level}": getattr(posterior, name)
        for level, posterior in enumerate(output.posteriors, start=1)
        for name in ("mu", "logvar")
    }
    outputs = {"context": output.context, "decoded": output.decoded, "probability": output.probability, **posteriors}
    parts = {name: getattr(losses, name) for name in ("total", "reconstruction", "kl", "classification")}
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    groups = {"outputs": outputs, "losses": parts, "gradients": gradients}
    return {kind: {name: t.detach().float().cpu() for name, t in group.items()} for kind, group in groups.items()}


def loss_of_loop(model: SeqSetVAE, batch: PatientBatch, *, device: str = "cpu") -> Tensor:
    """Return the loss of a batch without noise, with a Python loop over its patients and their sets.

    The modules and the mathematics are the model's; but each set is encoded, decoded and compared alone, and each
    patient alone goes through the transformer and the head, as implementations with a batch size of one do it.
    """
    weights = TrainOptions(data_dir="-", output_dir="-").loss_weights()
    factors = torch.tensor([weights.direction, weights.magnitude, weights.squared], device=device)
    counts, total = counts_of(batch), torch.zeros((), device=device)
    for index in range(batch.num_patients):
        patient = batch.between(index, index + 1)
        on_device = patient.to(device)
        sizes, ends = patient.set_sizes.tolist(), patient.set_offsets.tolist()
        layouts = [SetLayout.build(torch.tensor([0, size])).to(device) for size in sizes]
        events, posteriors = [], []
        for layout, (start, stop) in zip(layouts, itertools.pairwise(ends), strict=True):
            members = slice(start, stop)
            rows = layout.event_of_row
            values = (on_device.code, on_device.value, on_device.has_value)
            events.append(model.events(*(tensor[members][rows] for tensor in values)))
            posteriors.append(model.encoder(events[-1], layout))
        levels = [
            Posterior(torch.cat([p.mu for p in level]), torch.cat([p.logvar for p in level]))
            for level in zip(*posteriors, strict=True)
        ]
        latents = levels[-1].mu
        sequences = SequenceLayout.build(patient.patient_offsets).to(device)
        context = model.transformer(latents, on_device.minute, sequences, None)
        distances = torch.zeros((), device=device)
        for position, (layout, target) in enumerate(zip(layouts, events, strict=True)):
            decoded = model.decoder(context[position : position + 1], layout)
            sums = torch.stack(chamfer_sums(target.detach(), decoded, layout))
            distances = distances + (sums * factors).sum()
        sets, variables = SetLayout.build(patient.set_offsets).to(device), VariableLayout.build(patient).to(device)
        flat = torch.cat([rows[:size] for rows, size in zip(events, sizes, strict=True)])  # padding rows come last
        logits = model.head(
            on_device, flat[sets.event_of_row], context, latents, sets, sequences, variables, None
        ).flatten(0, 1)
        label = on_device.label.repeat_interleave(len(logits))
        crossed = cross_entropy_sum(logits, label) / len(logits) / max(counts.num_labelled, 1)
        vae = distances / counts.num_events + weights.beta * kl_sum(levels, weights.free_bits) / counts.num_sets
        total = total + weights.vae * vae + weights.classification * crossed
    return total


def flops_of(batch: PatientBatch, model: SeqSetVAE) -> float:
    """Return the floating-point operations of one training step on a batch."""
    return sum(step_flops(batch, model.config).values())


# ------------------------------------------------------------------------------------------------ runs


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return what a run of ``train.py`` has written so far.

    Returns:
        ``train`` and ``valid``, the records of ``metrics.jsonl``, and ``summary``, empty until the run has ended.
    """
    log, summary = run_dir / "metrics.jsonl", run_dir / "summary.json"
    records = read_json_lines(log) if log.exists() else []
    found: dict[str, Any] = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid")}
    return {**found, "summary": json.loads(summary.read_text()) if summary.exists() else {}}


def read_weights(run_dir: Path) -> tuple[int, Tensor]:
    """Return the step at which ``last.pt`` of a run was saved and all its weights as one float32 vector."""
    saved = torch.load(run_dir / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    weights = [tensor.flatten().float() for tensor in saved["model"].values() if tensor.is_floating_point()]
    return int(saved["progress"]["step"]), torch.cat(weights)
