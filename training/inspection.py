"""What batches look like: shapes, padding, a forward pass and memory, for a person who looks before training."""

from __future__ import annotations

import time

import torch

from model.prepared import PreparedBatch
from pipeline.dataset.manifest import Manifest
from pipeline.machine import peak_rss_bytes
from training.data import agree_on_data
from training.options import TrainOptions
from training.parallel import World
from training.state import build_model


def inspect_batches(options: TrainOptions, manifest: Manifest) -> int:
    """Print number, shapes, padding, a forward pass and memory of batches of 1, 2, 4 and 8 patients; return 0."""
    world, seed = World(0, 1, torch.device("cpu")), options.run.seed
    data = agree_on_data(options.data, manifest, world, options.task, "train")
    model = build_model(options.model, data, seed=seed).eval()
    print(data.describe())
    for batch_size in (1, 2, 4, 8):
        loader = data.open_loader("train", seed=seed, shuffle=True, world=world, batch_size=batch_size)
        batch = next(iter(loader))
        pad_to = loader.longest_patient if options.data.use_dynamic_padding is False else None
        padded = batch.to_padded(model.events.embedding.detach(), pad_to=pad_to)
        print(f"\nbatch_size {batch_size}: {len(loader)} batches")
        for name, tensor in padded.items():
            print(f"  {name:<13}{tuple(tensor.shape)!s:<20}{str(tensor.dtype).removeprefix('torch.')}")
        mask = padded["padding_mask"]
        print(f"  padding_mask.sum() = {int(mask.sum())} of {mask.numel()} cells ({float(mask.float().mean()):.2%})")
        started = time.perf_counter()
        with torch.no_grad():
            output = model(PreparedBatch.build(batch))
        milliseconds = 1000 * (time.perf_counter() - started)
        each = zip(output.outcomes, output.predictions, strict=True)
        shapes = ", ".join(f"{outcome.name} {tuple(prediction.shape)}" for outcome, prediction in each)
        sizes = f"{batch.num_sets} sets, {batch.num_events} events"
        print(f"  forward: {sizes} -> {shapes}, {milliseconds:.0f} ms")
        print(f"  memory: {peak_rss_bytes() / 2**20:.0f} MiB at most so far")
    return 0
