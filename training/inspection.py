"""What batches look like: shapes, padding, losses and memory, for a person who looks before training."""

from __future__ import annotations

import math
import time

import torch

from model.losses import Losses
from model.seqsetvae import SeqSetVAE
from pipeline.dataset.manifest import Manifest
from pipeline.schema import UserError
from training.console import format_memory, measure_memory
from training.data import BatchPreparer, DataSet, ReadyBatch, agree_on_data
from training.memory import measure_peak
from training.options import TrainOptions
from training.parallel import World, choose_device
from training.state import build_model
from training.step import StepSettings, forward_losses

SPLITS = {"train": "training", "valid": "validation"}
BATCH_SIZES = (1, 2, 4, 8)


def inspect_batches(options: TrainOptions, manifest: Manifest) -> int:
    """Print shapes, padding, losses and memory of small batches of train and valid; return 0.

    Raises:
        UserError: the train split is empty, or a loss is not finite.
    """
    world = World(0, 1, choose_device(options.run.device, 0))
    data = agree_on_data(options.data, manifest, world, options.task, *SPLITS)
    model = build_model(options, data).to(world.device)
    print(data.describe())
    data.check_train_split()
    done = 0
    for split, name in SPLITS.items():
        if not data.num_samples.get(split):
            print(f"\nno {name} batches: nobody is in the split")
            continue
        for batch_size in BATCH_SIZES:
            print(f"\n{name} batches, batch_size {batch_size}:")
            _inspect_batch(model, data, split, batch_size, options, world)
            done += 1
    print(f"\nall is well: {done} batches went through the model, their losses are finite; train without --inspect")
    return 0


def _inspect_batch(
    model: SeqSetVAE, data: DataSet, split: str, batch_size: int, options: TrainOptions, world: World
) -> None:
    """Print what the first batch of a split is, and what a step on it, or a pass in validation, gives and takes."""
    is_train = split == "train"
    preparer = BatchPreparer(seed=options.run.seed if is_train else None)
    settings = StepSettings(options.loss, options.optimisation, world, 1, preparer)
    loader = data.open_loader(
        split, seed=options.run.seed, shuffle=is_train, world=world, preparer=preparer, batch_size=batch_size
    )
    ready: ReadyBatch = next(iter(loader))
    batch, prepared = ready.batch, ready.parts[0].to(world.device)
    pad_to = loader.longest_patient if options.data.use_dynamic_padding is False else None
    padded = batch.to_padded(model.events.embedding.detach().cpu(), pad_to=pad_to)
    print(f"  {len(loader)} batches an epoch")
    for name, tensor in padded.items():
        print(f"  {name:<13}{tuple(tensor.shape)!s:<20}{str(tensor.dtype).removeprefix('torch.')}")
    mask = padded["padding_mask"]
    print(f"  padding_mask.sum() = {int(mask.sum())} of {mask.numel()} cells ({float(mask.float().mean()):.2%})")
    model.train(is_train)

    def run() -> Losses:
        losses = forward_losses(model, prepared, ready.counts, settings, options.loss.beta)
        if is_train:
            losses.total.backward()
        return losses

    with torch.set_grad_enabled(is_train):
        peak, started = measure_peak(run, world.device), time.perf_counter()
        losses = run()
    total = float(losses.total.detach())
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    shapes = ", ".join(f"{each.name} {(batch.num_samples, each.num_outputs)}" for each in model.config.outcomes)
    print(f"  predictions: {shapes} of {batch.num_sets} sets, {batch.num_events} events")
    parts = ((name, float(getattr(losses, name))) for name in ("reconstruction", "kl", "outcome"))
    print(f"  loss {total:.4f} ({', '.join(f'{name} {value:.4f}' for name, value in parts)}), {1000 * seconds:.0f} ms")
    each = f"{peak / 2**20:.1f} MiB at most, {peak / 2**20 / batch.num_patients:.1f} MiB a patient"
    print(f"  memory: {each}; the process holds {format_memory(measure_memory(world.device))}")
    if not math.isfinite(total):
        raise UserError(f"the loss of a {SPLITS[split]} batch is not finite; look at the values in report.html")
