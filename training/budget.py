"""The memory that a run's batches are planned for: measured once, on steps of the run's own model and data."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch

from model.losses import LossCounts
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.machine import release_free_memory
from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError
from pipeline.storage.cache import parse_bytes
from training.console import log_main
from training.data import MIN_STEPS, BatchPreparer, DataSet
from training.memory import MARGIN, StepMemory, count_amounts, fit_peaks, free_bytes, held_bytes, measure_peak
from training.options import TrainOptions
from training.parallel import World
from training.step import StepSettings, forward_losses


def measure_step_memory(model: SeqSetVAE, data: DataSet, world: World, options: TrainOptions) -> StepMemory:
    """Measure the peak memory of steps on the first rank, and decide what batches may take; the same on every rank."""
    found, max_memory = None, options.run.max_memory
    if world.is_main:
        peak, least = _measure_peaks(model, data, world.alone(), options)
        source, limit = "the machine's free memory", MARGIN * free_bytes(world.device, world.local_size)
        if max_memory is not None:
            source, limit = "--max_memory", parse_bytes(max_memory, "--max_memory")
        release_free_memory()
        held = held_bytes(world.device, sum(parameter.nbytes for parameter in model.parameters()))
        step_bytes = MARGIN * (limit - held)
        if step_bytes <= least:
            raise UserError(
                f"{source}: of {limit / 1e9:.2f} GB {held / 1e9:.2f} are taken before a step, which needs another "
                f"{least / 1e9:.2f}; raise it, or choose a smaller --preset or --gradient_checkpointing"
            )
        size = data.options.batch_size
        if size == "auto":
            size = _largest_batch_size(data, world, peak, step_bytes, seed=options.run.seed)
        found = StepMemory(peak=peak, step_bytes=step_bytes, batch_bytes=step_bytes * world.size, batch_size=size)
        log_main(world, f"{size} patients a batch; a step may take {step_bytes / 1e9:.2f} GB of {limit / 1e9:.2f}")
    answer = world.gather(found)[0]
    assert answer is not None
    return answer


def _measure_peaks(model: SeqSetVAE, data: DataSet, alone: World, options: TrainOptions) -> tuple[CostModel, int]:
    """Return the cost model of the peaks of steps on batches of several sizes and mixtures, and the least peak."""
    device, seed, batches = alone.device, options.run.seed, list[PatientBatch]()
    for patients, bucketing in itertools.product((1, 2, 4, 8, 16), (True, False)):
        changes: dict[str, Any] = {"batch_size": patients, "bucketing": bucketing, "max_events": None}
        batches += itertools.islice(data.open_loader("train", seed=seed, shuffle=True, world=alone, **changes), 2)
    preparer = BatchPreparer(seed=seed, hours=options.loss.prefix_hours)
    settings = StepSettings(options.loss, options.optimisation, alone, 1, preparer)
    one = LossCounts.one(len(model.config.outcomes))

    def step(batch: PatientBatch) -> None:
        prepared = settings.preparer.prepare(batch, 0).to(device)
        forward_losses(model, prepared, one, settings, 0.0).total.backward()

    model.train()
    step(batches[0])  # gradients are there before the first peak is measured
    peaks = [measure_peak(functools.partial(step, batch), device) for batch in batches]
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fit_peaks(np.array([count_amounts(batch) for batch in batches]), np.array(peaks, np.float64)), min(peaks)


def _largest_batch_size(data: DataSet, world: World, peak: CostModel, step_bytes: float, *, seed: int) -> int:
    """Return the largest batch size, a power of two a device, whose dearest batch fits and that leaves enough steps."""
    maximum = max(data.num_samples["train"] // MIN_STEPS, world.size)
    size = world.size
    while size * 2 <= maximum:
        loader = data.open_loader("train", seed=seed, shuffle=True, world=world.alone(), batch_size=size * 2)
        if loader.predict_costs(peak).max() > world.size * step_bytes:
            break
        size *= 2
    return size
