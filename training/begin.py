"""How a run begins or goes on: everything is checked and built before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from pathlib import Path
from typing import Any

import torch

from model.capacity import BatchShape, fit_capacities
from model.config import Outcome
from model.kernels.ops import uses_kernels
from model.outcome import feature_moments
from model.seqsetvae import SeqSetVAE
from pipeline.dataset.manifest import Manifest
from pipeline.loading.batch import PatientBatch
from pipeline.loading.place import BatchPlace
from pipeline.schema import UserError
from training.buckets import GradientBuckets
from training.budget import measure_step_memory
from training.checkpoint import Checkpoint
from training.data import BatchPreparer, DataSet, agree_on_data
from training.folds import Member, select_patients
from training.graphs import StepGraphs
from training.meds_predictions import check_meds_task
from training.memory import StepMemory
from training.options import TrainOptions, check_resume
from training.parallel import World, choose_threads
from training.prepare_pool import PreparePool
from training.run import Run
from training.state import build_model, build_state
from training.step import StepSettings, select_trained
from training.targets import TEACHER_FILE, Teacher
from training.teacher import find_teacher
from training.trees import fit_trees
from training.validation import choose_monitor

CAPACITY_BATCHES = 64
"""Batches that capacities are fitted to; they have room for 98 % of all then (docs/model.md)."""

ENSEMBLES = "head.ensembles."
"""What the names of the parameters begin with that belong to an outcome."""

TREES = "head.trees."
"""What the names of the buffers begin with that are fitted anew to each run's labels."""

FEATURE_PATIENTS = 20_000
"""Enough for means and deviations of summary features, however large the split is."""

THREAD_LIMIT = {"small": 1, "reference": None}
"""Most threads from which a step gains, by preset: products of width 64 are too small to be shared, and a second core
is better used by the thread that prepares batches."""


def begin_run(options: TrainOptions, manifest: Manifest, world: World, member: Member | None = None) -> Run:
    """Build a run, or restore that of ``--output_dir``, where options, data and files allow it.

    The model that a ``member`` of cross-fitting is learns from some patients alone.
    """
    directory = Path(options.run.output_dir)
    saved = find_checkpoint(options, directory, world)  # before the data: a task that differs is refused by its flag
    data = agree_on_data(options.data, manifest, world, options.task, *manifest.splits)
    if member is not None:
        data = select_patients(data, member, options)
    if options.evaluation.meds_predictions:
        check_meds_task(data.manifest, data.tasks)
    monitor = check_outcomes(options, data.outcomes)
    if options.optimisation.cuda_graphs:
        check_graphs(options, world)
    data.check_train_split()
    if options.data.sampling != "natural" or options.data.data_weights:  # what is refused is before a teacher is fitted
        data.open_loader("train", world=world.alone(), **data.sampling)
    best = find_best(saved, directory)
    threads = saved.state["progress"]["threads"] if saved and options.run.threads is None else options.run.threads
    threads = set_threads(options, world, threads)

    model = build_model(options, data).to(world.device)
    if saved is not None:
        saved.check_same_model(directory / "checkpoints" / "last.pt", model.config)
    else:
        prepare_model(model, options, data, world)
    select_trained(model, options.loss, options.optimisation)
    memory = None
    if options.run.max_memory is not None or options.data.batch_size == "auto":
        # A resumed run keeps its own.
        path = directory / "memory_model.json"
        memory = StepMemory.load(path) if saved is not None else measure_step_memory(model, data, world, options)
    kept = directory / TEACHER_FILE if saved is not None else None
    teacher = find_teacher(data, world, options.loss, kept, threads=options.run.threads)
    preparer = make_preparer(options, data, world, memory, teacher)
    graphs = StepGraphs(world.device) if options.optimisation.cuda_graphs else None
    if graphs is not None:
        preparer = dataclasses.replace(preparer, capacities=fit_step_capacities(preparer, data, world))
    changes, pool, workers = data.sampling, None, options.data.prefetch_workers
    if workers:
        pool = PreparePool(preparer, workers)
        changes |= {"transform": pool, "prefetch": max(options.data.prefetch, workers + 1)}
    loader = data.open_loader("train", seed=options.run.seed, shuffle=True, world=world, preparer=preparer, **changes)
    # By the first epoch, also where a later one, in which a budget makes another number of batches, is resumed.
    total_steps = max(len(loader) * options.optimisation.max_epochs, 1)
    buckets = GradientBuckets(model.parameters(), world) if world.size > 1 else None
    settings = StepSettings(options.loss, options.optimisation, world, total_steps, preparer, graphs, buckets, monitor)
    settings = dataclasses.replace(settings, has_gauges=options.run.collapse_steps > 0)
    state = build_state(model, loader, options.optimisation)
    if saved is not None:
        state.load_state_dict(saved.state)
        if not world.is_main:
            state.gauges.reset()  # the first rank holds the sums of all
    state.progress.threads = threads
    return Run(options, data, world, memory, state, settings, best, saved is not None, pool, member)


def set_threads(options: TrainOptions, world: World, asked: int | None) -> int:
    """Give operations on this process's CPU the threads that are asked for, or that the preset gains from."""
    threads = choose_threads(asked, world, limit=THREAD_LIMIT[options.model.preset])
    torch.set_num_threads(threads)
    return threads


def make_preparer(
    options: TrainOptions, data: DataSet, world: World, memory: StepMemory | None, teacher: Teacher | None
) -> BatchPreparer:
    """Return what prepares the batches of training steps."""
    seed, padding, pad_to = options.run.seed, options.data.use_dynamic_padding, None
    if padding is False:
        pad_to = data.open_loader("train", seed=seed, shuffle=False, world=world.alone()).longest_patient
    return BatchPreparer(
        seed=seed,
        event_dropout=options.data.event_dropout,
        padded=padding is not None,
        pad_to=pad_to,
        memory=memory,
        pin=world.device.type == "cuda",
        hours=options.loss.prefix_hours,
        teacher=teacher,
    )


def check_graphs(options: TrainOptions, world: World) -> None:
    """Raise UserError where steps cannot be captured."""
    if world.device.type != "cuda" or world.size > 1 or not uses_kernels(world.device):
        raise UserError("--cuda_graphs needs one process with a GPU and the package triton; leave the flag out")
    if options.loss.prefix_hours:
        raise UserError("--cuda_graphs cannot be combined with --prefix_weight: capacities have no room for prefixes")
    if options.optimisation.precision == "fp16":
        raise UserError("--cuda_graphs cannot be combined with --precision fp16, whose scale the host decides")


def fit_step_capacities(preparer: BatchPreparer, data: DataSet, world: World) -> tuple[BatchShape, ...]:
    """Return capacities for the training batches, from the first ones of the first epoch: the same at a resume."""

    def measure(batch: PatientBatch, place: BatchPlace) -> list[BatchShape]:
        ready = preparer(batch, place)
        return [BatchShape.of(part.batch) for part in ready.parts]

    settings: dict[str, Any] = {"seed": preparer.seed, "shuffle": True, "preparer": preparer, "transform": measure}
    batches = data.open_loader("train", world=world, **settings, **data.sampling)
    shapes = [shape for parts in itertools.islice(batches, CAPACITY_BATCHES) for shape in parts]
    return fit_capacities(shapes, num_codes=data.manifest.num_codes)


def find_checkpoint(options: TrainOptions, directory: Path, world: World) -> Checkpoint | None:
    """Return the checkpoint from which the run goes on, if ``--resume`` and its options allow it; None = it begins."""
    path = directory / "checkpoints" / "last.pt"
    exists = path.exists()
    if exists and not options.run.resume:
        raise UserError(f"--output_dir {directory} holds a run; --resume goes on with it, or name another")
    saved = Checkpoint.load(path) if exists else None
    steps = world.gather(None if saved is None else saved.step)
    if len(set(steps)) > 1:
        raise UserError(f"--output_dir {directory}: ranks see different checkpoints; name a folder that all share")
    if saved is not None:
        check_resume(saved.options, options, path)
    return saved


def find_best(saved: Checkpoint | None, directory: Path) -> dict[str, Any] | None:
    """Return the metrics of ``best.pt``, which must be of this run's best epoch; None where none has been validated."""
    path = directory / "checkpoints" / "best.pt"
    if saved is None or not (path.exists() or saved.state["progress"]["best_step"] >= 0):
        return None
    best = Checkpoint.load(path)
    # A run that was killed before it noted a new best step is about to validate that step again.
    steps = (saved.state["progress"]["best_step"], saved.step)
    same_run = best.state["loader"]["settings"] == saved.state["loader"]["settings"]
    of_step = {"epoch": best.state["progress"]["epochs_validated"], "step": best.step}
    if not same_run or best.metrics is None or best.step not in steps or not of_step.items() <= best.metrics.items():
        found = f"saved at step {best.step}, last.pt at step {saved.step}"
        advice = "put the best checkpoint back, or start anew"
        raise UserError(f"{path}: not the best checkpoint of this run ({found}); {advice}")
    return best.metrics


def prepare_model(model: SeqSetVAE, options: TrainOptions, data: DataSet, world: World) -> None:
    """Give a model what it has before its first step: weights of ``--init_from`` or moments of features, and trees."""
    if options.optimisation.init_from is not None:
        initialise(model, Path(options.optimisation.init_from), data)
    else:
        fit_features(model, data, seed=options.run.seed)
    fit_trees(model, data, world, options.loss, seed=options.run.seed)


def initialise(model: SeqSetVAE, path: Path, data: DataSet) -> None:
    """Take the EMA weights of a checkpoint of a model of the same shape and vocabulary (``--init_from``).

    It may have learned other outcomes: where these are not alike in number and classes, their ensembles begin anew.
    """
    saved = Checkpoint.load(path)
    if "members" in saved.state:
        raise UserError(f"--init_from {path}: averages several models; name the last.pt of one below RUN/members")
    saved.check_same_model(path, model.config, but=("outcomes", "tree_share"))
    saved.check_same_vocabulary(path, data.manifest.vocabulary_fingerprint)
    there, here = saved.state["ema_model"], model.state_dict()
    there = {name: tensor for name, tensor in there.items() if not name.startswith(TREES)}
    there |= {name: tensor for name, tensor in here.items() if name.startswith(TREES)}
    shapes = ([of[name].shape for name in of if name.startswith(ENSEMBLES)] for of in (there, here))
    if not operator.eq(*shapes):
        there = {name: tensor for name, tensor in there.items() if not name.startswith(ENSEMBLES)}
        there |= {name: tensor for name, tensor in here.items() if name.startswith(ENSEMBLES)}
    model.load_state_dict(there)


def check_outcomes(options: TrainOptions, outcomes: tuple[Outcome, ...]) -> str:
    """Return the metric that decides which epoch is best; raise UserError where options do not fit the outcomes."""
    loss, weights = options.loss, options.loss.task_weights
    if weights and len(weights) != len(outcomes):
        raise UserError(f"--task_weights: {len(weights)} weights for {len(outcomes)} tasks; give one each")
    if loss.learns_outcome and loss.pos_weight != 1 and all(outcome.kind != "binary" for outcome in outcomes):
        raise UserError("--pos_weight is for binary tasks; leave it out, or say --class_weights balanced")
    return choose_monitor(options.run.monitor, loss, outcomes)


def fit_features(model: SeqSetVAE, data: DataSet, *, seed: int) -> None:
    """Tell the head mean and deviation of each summary feature in the train split, or in a large sample of it.

    Every rank looks at the same patients in the same order, so that the number of ranks changes nothing.
    """
    moments, patients = None, 0

    def measure(batch: PatientBatch, _: object) -> tuple[torch.Tensor, int]:
        return feature_moments(batch, data.manifest.num_codes), batch.num_patients

    changes: dict[str, Any] = {"batch_size": 64, "max_events": None, "bucketing": False, "transform": measure}
    alone = World(0, 1, torch.device("cpu"))
    for batch_moments, num_patients in data.open_loader("train", seed=seed, shuffle=True, world=alone, **changes):
        moments = batch_moments if moments is None else moments + batch_moments
        patients += num_patients
        if patients >= FEATURE_PATIENTS:
            break
    assert moments is not None
    model.head.fit_features(moments.to(model.head.feature_mean.device))
