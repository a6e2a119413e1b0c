"""Train SeqSetVAE, or evaluate it: ``python train.py --help``.

How training works, top to bottom: :func:`main` parses and starts one process a device, :class:`Training` holds the
state and makes a step, :func:`train` is the loop, :func:`validate` and :func:`evaluate` measure.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.attention import PostAttention
from model.config import SeqSetVAEConfig
from model.losses import LossCounts, Losses, beta_at, compute_losses
from model.outcome import feature_moments
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from model.set_vae import Posterior
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import check_shards
from pipeline.dataset.tables import load_embeddings
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.machine import peak_rss_bytes, release_free_memory
from pipeline.schema import FIRST_CODE, PRIVATE, UNLABELLED, UserError
from pipeline.storage.cache import parse_bytes
from pipeline.storage.files import remove_leftovers, replacing, write_atomically
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder
from training.augment import drop_events
from training.card import EARLY_HOURS, by_length, first_hours, model_card, reconstruction_sums
from training.checkpoint import Checkpoint, load_model
from training.collapse import CollapseGauges, is_collapsed
from training.console import EpochBar, LossSums, StopSignal, memory_file, metrics_log, say, shown
from training.evaluation import auroc_auprc, evaluate_predictions
from training.memory import MARGIN, StepMemory, free_bytes, halved, held_bytes, is_out_of_memory, measured
from training.metrics import Throughput
from training.monitor import MemoryMonitor
from training.options import DEFAULT_BATCH_SIZE, LEAST_STEPS, TrainOptions, parse_options
from training.parallel import World, run
from training.profiling import StepProfiler, lines, part
from training.report import write_run_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend, 128 + n = stopped by signal n."""
    os.umask(os.umask(PRIVATE) | PRIVATE)
    try:
        options = parse_options(arguments)
        manifest = Manifest.load(data_folder(options))
        if options.inspect:
            return inspect(options, manifest)
        worker = evaluate if options.evaluate else train
        return run(functools.partial(worker, options, manifest), devices=options.devices, device=options.device)
    except (UserError, OSError) as error:  # such as a full disk
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "train.py: out of memory; lower --batch_size, or give --max_memory or --gradient_checkpointing",
            file=sys.stderr,
        )
        return 2


# ------------------------------------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data set of a run: the same shards on every rank.

    Attributes:
        folder: where its files are.
        manifest: of the shards that are used.
        quarantined: the shards that are not, because they are bad somewhere, by split.
    """

    folder: Folder
    manifest: Manifest
    quarantined: dict[str, list[ShardEntry]]

    @property
    def quarantined_shards(self) -> list[str]:
        return sorted(entry.path for entries in self.quarantined.values() for entry in entries)

    @property
    def quarantined_patients(self) -> dict[str, int]:
        return {split: sum(entry.num_patients for entry in entries) for split, entries in self.quarantined.items()}


def data_folder(options: TrainOptions) -> Folder:
    return open_folder(options.data_dir, cache_dir=options.cache_dir, cache_bytes=options.cache_bytes)


def agree_on_data(options: TrainOptions, manifest: Manifest, world: World, *splits: str) -> Data:
    """What all ranks use; where ``--on_bad_shard`` is ``quarantine``, without the shards of ``splits`` that are bad.

    A plan is made of the shards that there are, so ranks must know of all bad ones before they make it.  Machines may
    hold copies of a data set, so each checks all shards, and what is bad on one is left out by all.

    Raises:
        UserError: ranks have different data sets.
    """
    folder, found = data_folder(options), dict[str, str]()
    if options.on_bad_shard == "quarantine":
        entries = [entry for split in splits for entry in manifest.splits.get(split, [])]
        found = check_shards(folder, entries[world.local_rank :: world.local_size])
    shares = world.gather((manifest.fingerprint, found))
    if any(fingerprint != manifest.fingerprint for fingerprint, _ in shares):
        raise UserError(f"--data_dir {folder}: not the same data set on all machines; copy it anew, or start again")
    bad = {path: reason for _, share in shares for path, reason in share.items()}
    quarantined = {
        split: [entry for entry in entries if entry.path in bad] for split, entries in manifest.splits.items()
    }
    data = Data(folder=folder, manifest=manifest.without(bad), quarantined=quarantined)
    for split, entries in quarantined.items():
        for entry in entries:
            left_out = f"its {entry.num_patients:,} {split} patients are left out"
            say(world, f"warning: {folder}/{entry.path}: {bad[entry.path]}; {left_out}")
    return data


# ------------------------------------------------------------------------------------------------ training


class Training:
    """What a run is made of and a checkpoint holds: model, optimiser, scaler, place in the data, counters.

    Attributes:
        progress: ``step`` (done so far), ``best`` (validation metrics of the best epoch), ``epochs_since_best``,
            ``seconds`` (spent, over all resumed parts of the run).
    """

    def __init__(self, options: TrainOptions, data: Data, world: World) -> None:
        self.options, self.manifest, self.world = options, data.manifest, world
        self.checkpoints = Path(options.output_dir) / "checkpoints"
        if not patients_of(data.manifest)["train"]:
            raise UserError(f"{options.data_dir}: no patients to train on; its train split is empty, or left out")
        self.model = new_model(options, data).to(world.device)
        self.model.gradient_checkpointing = options.gradient_checkpointing
        self.memory = find_step_memory(options, data, world, self.model)
        if self.memory is not None:
            options = self.options = dataclasses.replace(options, batch_size=self.memory.batch_size)
        self.loader = open_loader(options, data, world, "train", shuffle=True, memory=self.memory)
        if not (self.checkpoints / "last.pt").exists():
            if options.init_from is None:
                fit_features(self.model, options, data, world, self.memory)
            else:
                start_from(Path(options.init_from), self.model, self.manifest)
        if options.freeze:
            self.model.requires_grad_(False).head.requires_grad_(True)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        # With the usual eps of 1e-8 weights that matter to nothing would follow the rounding noise of their gradients.
        groups = parameter_groups(self.model, options)
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-6, fused=True)
        # The usual first scale of 65,536 overflows, and so wastes, the first steps: losses are sums over sets.
        self.scaler = torch.amp.GradScaler(world.device.type, init_scale=1024, enabled=options.precision == "fp16")
        self.progress: dict[str, Any] = {"step": 0, "best": None, "epochs_since_best": 0, "seconds": 0.0}
        # By the first epoch, also where a later one, in which --max_events makes another number of batches, is resumed.
        self.total_steps = max(len(self.loader) * options.max_epochs, 1)
        self.restore()
        self._started = time.perf_counter() - self.progress["seconds"]
        if options.compile:
            compile_dense(self.model)
        self.stepper: Any = DistributedDataParallel(self.model) if world.size > 1 else self.model

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def restore(self) -> None:
        """Go on from ``last.pt`` where ``--resume`` asks for it and there is one.

        Raises:
            UserError: there is one and ``--resume`` was not given; or it is of another model, data or plan.
        """
        path, options = self.checkpoints / "last.pt", self.options
        if not path.exists():
            return
        if not options.resume:
            raise UserError(f"--output_dir {options.output_dir} holds a run; --resume goes on with it, or name another")
        saved = Checkpoint.load(path)
        saved.check_same_model(path, self.model.config)
        saved.check_same_vocabulary(path, self.manifest.vocabulary_fingerprint)
        self.model.load_state_dict(saved.model)
        self.averaged.load_state_dict(saved.averaged)
        self.optimizer.load_state_dict(saved.optimizer)
        self.scaler.load_state_dict(saved.scaler)
        self.loader.load_state_dict(saved.loader)
        self.progress = dict(saved.progress)

    def save(self, *names: str) -> None:
        """Save under each name; ranks are alike, so the first writes."""
        self.progress["seconds"] = self.seconds
        if self.world.is_main:
            Checkpoint(
                config=self.model.config.to_dict(),
                vocabulary_fingerprint=self.manifest.vocabulary_fingerprint,
                model=self.model.state_dict(),
                averaged=self.averaged.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                loader=self.loader.state_dict(),
                progress=dict(self.progress),
            ).save(*(self.checkpoints / f"{name}.pt" for name in names))

    def step(self, batch: PatientBatch, counts: LossCounts) -> tuple[Losses, Tensor]:
        """One step of the optimiser on a global batch, of which this rank has ``batch``; its losses and gradient norm.

        A batch that does not fit is taken in parts.  Losses are sums over patients and noise is a patient's own, so the
        gradient is that of the whole.
        """
        options, step = self.options, self.progress["step"]
        # Schedules and noise are functions of the step alone, so a resumed run needs none of their state.
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(options, step, self.total_steps)
        parts, loss = self.memory.parts(batch) if self.memory else [batch], None
        while loss is None:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                loss = self.accumulate(parts, counts)
            except RuntimeError as error:
                if type(error).__module__.startswith("torch._dynamo"):
                    raise UserError(f"--compile: {str(error).splitlines()[0]}; leave it out") from error
                if not is_out_of_memory(error):
                    raise
            if loss is None:  # out here nothing holds what the failed part had
                parts = self.smaller(parts)
        with part("optimiser"):
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.gradient_clip or math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.average()
        self.progress["step"] = step + 1
        return loss, norm

    def accumulate(self, parts: list[PatientBatch], counts: LossCounts) -> Losses:
        """Gradients of a batch, part by part; the sum of the losses, of which no part can be differentiated again."""
        world, step, total = self.world, self.progress["step"], None
        for number, batch in enumerate(parts, start=1):
            with part("layout and copy"):
                given = PreparedBatch.build(batch, seed=self.options.seed, step=step).to(world.device)
            # Ranks wait for one another in a backward pass that ends with a sum over all: the last part's.
            alone = isinstance(self.stepper, DistributedDataParallel) and number < len(parts)
            with self.stepper.no_sync() if alone else contextlib.nullcontext():
                loss = forward_losses(self.stepper, given, counts, self.options, world, step)
                differentiated = loss.total
                if world.size > 1:
                    # Losses are shares of a sum, and DDP averages.  Every parameter takes part, also on a rank that got
                    # no patients or only sets of one event, because the others wait for its gradient.
                    idle = sum(p.sum() for p in self.model.parameters() if p.requires_grad) * 0.0
                    differentiated = differentiated * world.size + idle
                with part("backward"):
                    self.scaler.scale(differentiated).backward()
            loss = dataclasses.replace(loss, total=loss.total.detach())
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def smaller(self, parts: list[PatientBatch]) -> list[PatientBatch]:
        """Smaller parts of a batch for which there was no memory, which is said.

        Raises:
            UserError: there are none; or there are other ranks, which cannot be told to begin the step again.
        """
        step, largest = self.progress["step"] + 1, max(parts, key=lambda batch: batch.num_events)
        size = f"{largest.num_patients} patients, {largest.num_events:,} events in {largest.num_sets:,} sets"
        if self.world.size > 1:
            raise UserError(f"out of memory in step {step}, on {size}: give --max_memory, or lower --batch_size")
        if largest.num_patients == 1:
            help_ = "give --gradient_checkpointing, or cut patients with --max_sequence_length"
            raise UserError(f"out of memory in step {step}, on a single patient: {size}; {help_}")
        smaller = halved(parts)
        say(self.world, f"warning: out of memory in step {step}, on {size}: taken again in {len(smaller)} parts")
        return smaller

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the model's: an exponential mean that forgets its beginning sooner."""
        step = self.progress["step"]
        decay = min(self.options.weight_averaging, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.averaged.parameters()], [*self.model.parameters()], 1 - decay)

    def judge(self, metrics: dict[str, Any], epoch: int) -> bool:
        """Whether these validation metrics are the best so far, which is noted.

        Decided by ``--monitor``, or by the loss where a split without both outcomes has no AUROC; without any
        validation patients the last is the best.
        """
        best, name = self.progress["best"], self.options.monitor
        name = "loss" if self.options.objective == "pretrain" or metrics[name] is None else name
        sign = -1 if name == "loss" else 1
        better = best is None or metrics[name] is None or best[name] is None or sign * metrics[name] > sign * best[name]
        if better:
            self.progress["best"] = {**metrics, "epoch": epoch, "step": self.progress["step"]}
        self.progress["epochs_since_best"] = 0 if better else self.progress["epochs_since_best"] + 1
        return better


def train(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """Train until the last epoch, early stopping or a signal; then evaluate the best checkpoint on the test split."""
    run_dir = Path(options.output_dir)
    data = agree_on_data(options, manifest, world, *manifest.splits)
    training = Training(options, data, world)
    options = training.options
    model, loader, progress = training.model, training.loader, training.progress
    valid_loader = open_loader(options, data, world, "valid", shuffle=False)
    pad_to = loader.longest_patient if options.use_dynamic_padding is False else None
    run_dir.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        for folder in (run_dir, training.checkpoints):  # not below: other runs may be going on there
            remove_leftovers(folder)
        resolved = {"options": dataclasses.asdict(options), "model": model.config.to_dict()}
        write_atomically(run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
    parameters = sum(p.numel() for p in model.parameters())
    say(world, f"{manifest_line(data.manifest)}; {parameters:,} parameters; {world.size} × {world.device.type}")

    overall, stop = Throughput(), None
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(StopSignal())
        log = stack.enter_context(metrics_log(run_dir, world, progress["step"]))
        memory = stack.enter_context(MemoryMonitor(memory_file(run_dir, world) if options.profile_memory else None))
        bar = stack.enter_context(EpochBar(world, options.max_epochs))
        if options.on_bad_shard == "quarantine":
            patients = {f"{split}_patients": number for split, number in data.quarantined_patients.items()}
            log("event", step=progress["step"], event="quarantine", **patients)
        profiler = stack.enter_context(step_profiler(training))
        while loader.epoch < options.max_epochs and stop is None:
            epoch, interval, sums = loader.epoch, Throughput(), LossSums(world.device)
            bar.begin(epoch, len(loader), loader.cursor)
            model.train()
            for batch, counts, waited in timed(loader):
                started = time.perf_counter()
                seen = drop_events(
                    lay_out(batch, options, pad_to), options.event_dropout, seed=options.seed, step=progress["step"]
                )
                loss, norm = training.step(seen, kept(counts, options))
                sums.add(loss, norm)
                for meter in (interval, overall):
                    meter.add(batch, waited=waited, step_seconds=time.perf_counter() - started, pad_to=pad_to)
                profiler.step(seen)
                step = progress["step"]
                if step == 1:
                    memory.mark("first step")
                bar.advance(interval)
                if step % options.log_steps == 0:
                    means = sums.means(world)
                    check_finite(means["loss"], step)
                    release_free_memory()
                    schedule = {
                        "learning_rate": learning_rate(options, step - 1, training.total_steps),
                        "beta": beta_at(options.loss_options(), step - 1),
                        "rss_bytes": psutil.Process().memory_info().rss,
                    }
                    rates, interval = Throughput.of_job(world.gather(interval)).rates(), Throughput()
                    line = {"step": step, "epoch": epoch, "seconds": training.seconds, **means, **rates}
                    log("train", **line, **schedule)
                    if options.verbose:
                        say(world, ", ".join(f"{name} {value:.4g}" for name, value in line.items()))
                if options.checkpoint_steps and step % options.checkpoint_steps == 0:
                    training.save("last")
                    memory.mark("checkpoint")
                # Ranks agree on stopping at steps that all of them reach.
                if (world.size == 1 or step % options.log_steps == 0) and world.any(stopping.number is not None):
                    training.save("last")
                    say(world, f"stopped by signal {stopping.number} at step {step}; go on with --resume")
                    return 128 + (stopping.number or signal.SIGTERM)
            memory.mark("validation")
            metrics, _ = validate(training.averaged, valid_loader, options, world)
            log("valid", step=progress["step"], epoch=epoch, seconds=training.seconds, **metrics)
            better = training.judge(metrics, epoch)
            training.save("last", *(["best"] if better else []), *(["collapsed"] if metrics["collapsed"] else []))
            memory.mark("checkpoint")
            bar.end(metrics, better)
            if metrics["collapsed"]:
                active = metrics["active_units"]
                say(world, f"warning: the posterior has collapsed, {active} of {model.config.width} units are active")
                stop = "collapse" if options.stop_on_collapse else None
            if options.patience and progress["epochs_since_best"] >= options.patience:
                stop = "patience"
    progress["seconds"] = training.seconds
    run = {"stopped_by": stop or "max_epochs", **Throughput.of_job(world.gather(overall)).rates()}
    if options.compile:
        run["compiled_graphs"] = compiled_graphs()
    if options.profile_memory:  # of this process and those below it; each rank has a profile of its own
        run |= {"profiled_peak_rss_bytes": memory.peak_rss_bytes, "profiled_peak_uss_bytes": memory.peak_uss_bytes}
    if profiler.table is not None:
        run["profile"] = profiler.table
        say(world, "\n".join(["where the time goes:", *lines(profiler.table)]))
    finish(training, data, run)
    return 0


def finish(training: Training, data: Data, run: dict[str, Any]) -> None:
    """Evaluate the best checkpoint on the test split, write summary, model card and report, say where they are."""
    options, world, progress = training.options, training.world, training.progress
    run_dir = Path(options.output_dir)
    best = run_dir / "checkpoints" / "best.pt"
    world.wait()  # until the first rank has written it
    saved, test = Checkpoint.load(best), None
    if saved.progress["step"] != progress["best"]["step"]:
        at = f"saved at step {saved.progress['step']}, the best was at step {progress['best']['step']}"
        raise UserError(f"{best}: {at}; put the best checkpoint back, or start anew")
    if data.manifest.splits.get("test"):
        model = saved.build_model(best, data.manifest.vocabulary_fingerprint).to(world.device)
        test = evaluate_split(model, "test", options, data, world)
    if not world.is_main:
        return
    summary = {
        "steps": progress["step"],
        "seconds": round(progress["seconds"], 2),
        **run,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None,
        "quarantined_patients": data.quarantined_patients,
        "quarantined_shards": data.quarantined_shards,
        "best": progress["best"],
        "test": test,
    }
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    text = model_card(training.model.config, options, patients_of(data.manifest), summary)
    write_atomically(run_dir / "MODEL_CARD.md", text.encode())
    report = write_run_report(run_dir)
    if test is not None:
        print(f"test AUROC {shown(test['auroc'])}, AUPRC {shown(test['auprc'])}")
    ragged = "; batches travelled ragged, without any" if options.use_dynamic_padding is None else ""
    print(f"padding waste {run['event_padding_waste']:.2%} of events in the padded layout{ragged}")
    print(f"report {report}")


def new_model(options: TrainOptions, data: Data) -> SeqSetVAE:
    """An untrained model for this data; the same weights for the same seed on every rank and device."""
    changes: dict[str, Any] = {"event_form": options.event_form, "dropout": options.dropout}
    embeddings, manifest = None, data.manifest
    if manifest.embedding_dim is not None:
        embeddings = torch.from_numpy(load_embeddings(data.folder, manifest))
        changes |= {"embedding_dim": manifest.embedding_dim, "frozen_embeddings": True}
    torch.manual_seed(options.seed)
    return SeqSetVAE(SeqSetVAEConfig.preset(options.preset, num_codes=manifest.num_codes, **changes), embeddings)


def find_step_memory(options: TrainOptions, data: Data, world: World, model: SeqSetVAE) -> StepMemory | None:
    """What steps may take, and will, where ``--max_memory`` or ``--batch_size auto`` asks; the same on every rank.

    It decides the batches, so a run that is resumed has what it began with, in ``memory_model.json``.

    Raises:
        UserError: there is no room for a step.
    """
    if options.max_memory is None and options.batch_size != "auto":
        return None
    path, found = Path(options.output_dir) / "memory_model.json", None
    if options.resume and path.exists():
        return StepMemory.load(path)
    if world.is_main:
        alone = World(0, 1, world.device)  # the batches of the whole job, before they are dealt
        parameter_bytes = sum(p.nbytes for p in model.parameters())
        batches: list[PatientBatch] = []
        for patients, bucketing in itertools.product((1, 2, 4, 8, 16), (True, False)):
            tried = dataclasses.replace(options, batch_size=patients, bucketing=bucketing, max_events=None)
            batches += itertools.islice(open_loader(tried, data, alone, "train", shuffle=True), 2)

        def step(batch: PatientBatch) -> None:
            counts = LossCounts(
                num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=int((batch.label >= 0).sum())
            )
            given = PreparedBatch.build(batch, seed=options.seed).to(world.device)
            forward_losses(model, given, counts, options, alone, 0).total.backward()

        peak, least = measured(step, batches, world.device)
        model.zero_grad(set_to_none=True)
        source, limit = "the machine's free memory", MARGIN * free_bytes(world.device, world.local_size)
        if options.max_memory is not None:
            source, limit = "--max_memory", parse_bytes(options.max_memory)
        release_free_memory()
        held = held_bytes(world.device, parameter_bytes)
        step_bytes = MARGIN * (limit - held)
        if step_bytes <= least:
            raise UserError(
                f"{source}: of {limit / 1e9:.2f} GB {held / 1e9:.2f} are taken before a step, which needs another "
                f"{least / 1e9:.2f}; raise it, or choose a smaller --preset or --gradient_checkpointing"
            )
        size = options.batch_size
        if size == "auto":
            most = max(patients_of(data.manifest)["train"] // LEAST_STEPS, world.size)
            size = world.size
            while size * 2 <= most:
                tried = dataclasses.replace(options, batch_size=size * 2)
                dearest = open_loader(tried, data, alone, "train", shuffle=True).predicted(peak).max()
                if dearest > world.size * step_bytes:
                    break
                size *= 2
        found = StepMemory(peak=peak, step_bytes=step_bytes, batch_size=size)
        found.save(path)
        say(world, f"{size} patients a batch; a step may take {step_bytes / 1e9:.2f} GB of {limit / 1e9:.2f}")
    return world.gather(found)[0]


COMPILER = "inductor"


def compile_dense(model: SeqSetVAE) -> None:
    """Compile, in place, the blocks after each attention: norms, activation and feed-forward of rows, however many.

    Elsewhere shapes follow the sizes of sets, and each batch would be compiled anew; here one graph with a symbolic
    number of rows serves all.  PyTorch compiles a block 8 times at most and then runs it as it is.
    """
    for module in model.modules():
        if isinstance(module, PostAttention):
            module.compile(backend=COMPILER, dynamic=True)


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def open_loader(
    options: TrainOptions,
    data: Data,
    world: World,
    split: str,
    *,
    shuffle: bool,
    memory: StepMemory | None = None,
) -> PatientLoader:
    return make_loader(
        data.folder,
        manifest=data.manifest,
        quarantined=data.quarantined_shards,
        split=split,
        batch_size=DEFAULT_BATCH_SIZE if options.batch_size == "auto" else options.batch_size,
        max_events=options.max_events,
        max_cost=memory.step_bytes * world.size if memory else None,
        budget=memory.peak if memory else None,
        max_sequence_length=options.max_sequence_length,
        shuffle=shuffle,
        seed=options.seed,
        bucketing=options.bucketing,
        bucket_width=options.bucket_width,
        rank=world.rank,
        world_size=world.size,
        group_events=options.group_events,
        prefetch=options.prefetch,
        pin_memory=world.device.type == "cuda",
    )


def start_from(path: Path, model: SeqSetVAE, manifest: Manifest) -> None:
    """``--init_from``: the averaged weights of a checkpoint of the same shape and vocabulary."""
    saved = Checkpoint.load(path)
    saved.check_same_model(path, model.config)
    saved.check_same_vocabulary(path, manifest.vocabulary_fingerprint)
    model.load_state_dict(saved.averaged)


def fit_features(model: SeqSetVAE, options: TrainOptions, data: Data, world: World, memory: StepMemory | None) -> None:
    """Tell the head what the facts of each variable are like in the train split, or in a large sample of it."""
    moments, patients = torch.zeros(3, *model.head.feature_mean.shape, dtype=torch.float64), 0
    for batch in open_loader(options, data, world, "train", shuffle=True, memory=memory):
        moments += feature_moments(batch.to("cpu"), len(moments[0]))
        patients += batch.num_patients
        if patients >= FACT_PATIENTS:
            break
    model.head.fit_features(world.sum(moments.to(world.device)))


FACT_PATIENTS = 20_000
"""Enough for means and deviations, however large the split is."""


def lay_out(batch: PatientBatch, options: TrainOptions, pad_to: int | None) -> PatientBatch:
    """The batch as it came, or through the padded layout where the user asks for that."""
    if options.use_dynamic_padding is None:
        return batch
    return PatientBatch.from_padded(batch.to_padded(pad_to=pad_to), batch.patient_id)


def parameter_groups(model: SeqSetVAE, options: TrainOptions) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases, norms and single vectors; each group's learning rate is ``rate`` times
    the schedule's.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    narrower = min(1.0, RATES_WIDTH / model.config.width)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = max(RATES.get(name.partition(".")[0], 1.0) * narrower, 1.0)
            decay = options.weight_decay / rate if parameter.ndim > 1 else 0.0  # AdamW multiplies it by the rate
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": of, "weight_decay": decay, "rate": rate} for (rate, decay), of in groups.items()]


RATES, RATES_WIDTH = {"encoder": 3.0, "decoder": 8.0}, 64
"""Sets are learned from reconstruction, which takes more steps than the outcome does, and would stay behind.  A wider
model takes rates that are lower by as much (Yang et al. 2022, arXiv:2203.03466), and no part's is below the schedule's.
"""


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth (Loshchilov & Hutter 2017)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forward_losses(
    model: torch.nn.Module, given: PreparedBatch, counts: LossCounts, options: TrainOptions, world: World, step: int
) -> Losses:
    """Losses of training step ``step`` on ``given``."""
    with autocast(options, world):
        weights = options.loss_options()
        output = model(given, reconstruct=weights.learns_sets, classify=weights.learns_outcome)
        with part("losses"):
            return compute_losses(output, given.batch.label, weights, counts, beta=beta_at(weights, step))


def autocast(options: TrainOptions, world: World) -> torch.autocast:
    enabled = options.precision != "fp32"
    return torch.autocast(world.device.type, dtype=DTYPES[options.precision] if enabled else None, enabled=enabled)


def timed(loader: PatientLoader) -> Iterator[tuple[PatientBatch, LossCounts, float]]:
    """Batches with the counts of their global batch and the seconds waited for each."""
    batches = iter(loader)
    while True:
        started, step = time.perf_counter(), loader.cursor
        with part("data"):
            batch = next(batches, None)
        if batch is None:
            return
        waited = time.perf_counter() - started
        of = loader.step_counts(step)
        counts = LossCounts(num_events=of.num_events, num_sets=of.num_sets, num_labelled=of.num_labelled)
        yield batch, counts, waited


def kept(counts: LossCounts, options: TrainOptions) -> LossCounts:
    """The counts that are to be expected where events are left out; the exact ones would have to be gathered."""
    return dataclasses.replace(counts, num_events=round(counts.num_events * (1 - options.event_dropout)))


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}: lower --learning_rate, or use --precision bf16 or fp32; "
            "the last checkpoint is untouched"
        )


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def validate(
    model: SeqSetVAE, loader: PatientLoader, options: TrainOptions, world: World
) -> tuple[dict[str, Any], pa.Table]:
    """Losses, AUROC, AUPRC and collapse gauges over a split, every patient exactly once, without noise.

    Returns:
        The metrics, and the predictions ``patient_id, label (null = unlabelled), probability``; the same on every rank.
    """
    model.eval()
    sums = LossSums(world.device)
    gauges = CollapseGauges(model.config.width, world.device)
    one = LossCounts(num_events=1, num_sets=1, num_labelled=1)
    ids: list[str] = []
    labels, probabilities = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    num_events = num_sets = num_labelled = 0
    for batch, counts, _ in timed(loader):
        given = PreparedBatch.build(batch).to(world.device)
        with autocast(options, world):
            output = model(given)
            losses = compute_losses(output, given.batch.label, options.loss_options(), one, beta=options.beta)
            sums.add(losses, None)
        gauges.update(output.posterior)
        ids += batch.patient_id
        labels.append(batch.label)
        probabilities.append(output.probability.cpu())
        num_events, num_sets = num_events + counts.num_events, num_sets + counts.num_sets
        num_labelled += counts.num_labelled
    world.sum(gauges.sums)
    shares = world.gather((ids, torch.cat(labels), torch.cat(probabilities)))
    label = torch.cat([share[1] for share in shares]).numpy()
    probability = torch.cat([share[2] for share in shares]).double().numpy()

    totals, weights = sums.totals(world), options.loss_options()
    metrics: dict[str, Any] = {
        "reconstruction": totals["reconstruction"] / max(num_events, 1),
        "kl": totals["kl"] / max(num_sets, 1),
        "classification": totals["classification"] / max(num_labelled, 1),
    }
    vae = metrics["reconstruction"] + weights.beta * metrics["kl"]
    metrics["loss"] = None
    if num_sets:
        classification = weights.effective_classification_weight * metrics["classification"]
        metrics["loss"] = weights.effective_vae_weight * vae + classification
    metrics["auroc"], metrics["auprc"] = auroc_auprc(label, probability)
    gauge = gauges.compute()
    metrics["kl_without_free_bits"] = gauge.kl
    metrics["active_units"] = gauge.active_units
    metrics["mean_posterior_variance"] = gauge.mean_posterior_variance
    metrics["collapsed"] = num_sets > 0 and is_collapsed(gauge, options.least_active_units)
    table = pa.table(
        {
            "patient_id": pa.array([name for share in shares for name in share[0]], pa.string()),
            "label": pa.array(label, pa.int8(), mask=label < 0),
            "probability": pa.array(probability, pa.float64()),
        }
    )
    return metrics, table.sort_by("patient_id")


def evaluate_split(model: SeqSetVAE, split: str, options: TrainOptions, data: Data, world: World) -> dict[str, Any]:
    """Metrics of a split with bootstrap intervals; writes ``predictions_<split>.parquet``."""
    metrics, predictions = validate(model, open_loader(options, data, world, split, shuffle=False), options, world)
    if world.is_main:
        with replacing(Path(options.output_dir) / f"predictions_{split}.parquet") as path:
            pq.write_table(predictions, path, write_page_checksum=True)
        label = predictions["label"].fill_null(UNLABELLED).cast(pa.int64()).to_numpy()
        metrics |= evaluate_predictions(label, predictions["probability"].to_numpy())
    return metrics


def evaluate(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """``--evaluate``: metrics with intervals, predictions and a report for one split."""
    path, run_dir, split = Path(options.evaluate or ""), Path(options.output_dir), options.evaluate_split
    data = agree_on_data(options, manifest, world, *sorted({split, "train"} if options.baselines else {split}))
    if not data.manifest.splits.get(split):
        raise UserError(f"{options.data_dir}: has no patients in split {split}; choose another with --evaluate_split")
    model = load_model(path, manifest.vocabulary_fingerprint).to(world.device)
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = evaluate_split(model, split, options, data, world)
    more = card(model, split, options, data, world)
    if world.is_main:
        if options.baselines:
            more["baselines"] = beside(split, options, data, world)
        content = {
            "checkpoint": str(path),
            "split": split,
            "quarantined_patients": data.quarantined_patients[split],
            "quarantined_shards": data.quarantined_shards,
            **metrics,
            **more,
        }
        write_atomically(run_dir / f"evaluation_{split}.json", (json.dumps(content, indent=1) + "\n").encode())
        print(
            f"{split} AUROC {shown(metrics['auroc'])}, AUPRC {shown(metrics['auprc'])}, loss {shown(metrics['loss'])}"
        )
        print(f"report {write_run_report(run_dir)}")
    return 0


def beside(split: str, options: TrainOptions, data: Data, world: World) -> dict[str, Any]:
    """``--baselines``: what trees and logistic regression make of the train split, on the patients of ``split``."""
    alone = World(0, 1, world.device)
    fitted, evaluated = (open_loader(options, data, alone, name, shuffle=False) for name in ("train", split))
    # Imported here because scikit-learn is slow to import, and training needs none of it.
    return dict(import_module("training.baselines").baselines(fitted, evaluated, data.manifest.num_codes))


@torch.no_grad()
def card(model: SeqSetVAE, split: str, options: TrainOptions, data: Data, world: World) -> dict[str, Any]:
    """What ``--evaluate`` adds: answers after the first hours, quality by length, reconstruction beside the variables'
    means; writes ``latents_<split>.parquet`` (a file a rank) where ``--export_latents`` asks.
    """
    model.eval()
    label, number = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    probability = [torch.zeros(0, 1 + len(EARLY_HOURS), dtype=torch.float64)]
    errors, num_events = torch.zeros(2, dtype=torch.float64, device=world.device), 0
    suffix = "" if world.is_main else f"_rank{world.rank}"
    path = Path(options.output_dir) / f"latents_{split}{suffix}.parquet"
    with pq.ParquetWriter(path, LATENTS) if options.export_latents else contextlib.nullcontext() as latents:
        for batch, counts, _ in timed(open_loader(options, data, world, split, shuffle=False)):
            views = [batch, *(first_hours(batch, hours) for hours in EARLY_HOURS)]
            with autocast(options, world):
                given = [PreparedBatch.build(view).to(world.device) for view in views]
                outputs = [model(view) for view in given]
                errors += reconstruction_sums(model, given[0].batch, outputs[0])
            label.append(batch.label)
            number.append(batch.events_per_patient)
            probability.append(torch.stack([output.probability.cpu().double() for output in outputs], dim=1))
            num_events += counts.num_events
            if latents is not None:
                latents.write_table(latent_rows(batch, outputs[0].posterior))
    shares = world.gather((torch.cat(label), torch.cat(number), torch.cat(probability)))
    labels, numbers, probabilities = (torch.cat(parts).numpy() for parts in zip(*shares, strict=True))
    ours, at_mean = (world.sum(errors) / max(num_events, 1)).tolist()
    early = dict[str, dict[str, float | None]]()
    for column, hours in enumerate(EARLY_HOURS, start=1):
        auroc, auprc = auroc_auprc(labels, probabilities[:, column])
        early[f"{hours} hours"] = {"auroc": auroc, "auprc": auprc}
    return {
        "reconstruction_error": ours,
        "reconstruction_error_at_variable_means": at_mean,
        "after_the_first": early,
        "by_length": by_length(labels, probabilities[:, 0], numbers),
    }


LATENTS = pa.schema(
    [
        ("patient_id", pa.string()),
        ("minute", pa.float32()),
        ("mu", pa.list_(pa.float32())),
        ("logvar", pa.list_(pa.float32())),
    ]
)


def latent_rows(batch: PatientBatch, posterior: Posterior) -> pa.Table:
    """A row a set: whose it is, when, and the posterior of its latent."""
    patient = torch.repeat_interleave(torch.arange(batch.num_patients), batch.sets_per_patient)
    ids = pa.array(batch.patient_id, pa.string()).take(pa.array(patient.numpy()))
    wide = [pa.array(list(part.float().cpu().numpy()), LATENTS.field("mu").type) for part in posterior]
    return pa.table([ids, pa.array(batch.minute.numpy()), *wide], schema=LATENTS)


def inspect(options: TrainOptions, manifest: Manifest) -> int:
    """``--inspect``: for batches of 1, 2, 4 and 8 patients their number, shapes, padding, a forward pass and memory."""
    world = World(0, 1, torch.device("cpu"))
    data = agree_on_data(options, manifest, world, "train")
    model = new_model(options, data).eval()
    print(manifest_line(data.manifest))
    for batch_size in (1, 2, 4, 8):
        loader = open_loader(dataclasses.replace(options, batch_size=batch_size), data, world, "train", shuffle=True)
        batch = next(iter(loader))
        pad_to = loader.longest_patient if options.use_dynamic_padding is False else None
        padded = batch.to_padded(model.events.embedding.detach(), pad_to=pad_to)
        print(f"\nbatch_size {batch_size}: {len(loader)} batches")
        for name, tensor in padded.items():
            print(f"  {name:<13}{tuple(tensor.shape)!s:<20}{str(tensor.dtype).removeprefix('torch.')}")
        mask = padded["padding_mask"]
        print(f"  padding_mask.sum() = {int(mask.sum())} of {mask.numel()} cells ({float(mask.float().mean()):.2%})")
        started = time.perf_counter()
        with torch.no_grad():
            output = model(batch)
        milliseconds = 1000 * (time.perf_counter() - started)
        sizes = f"{batch.num_sets} sets, {batch.num_events} events"
        print(f"  forward: {sizes} -> probabilities {tuple(output.probability.shape)}, {milliseconds:.0f} ms")
        print(f"  memory: {peak_rss_bytes() / 2**20:.0f} MiB at most so far")
    return 0


def step_profiler(training: Training) -> StepProfiler:
    """``--profile``, on the first rank; the others' steps are alike."""
    options, world, loader = training.options, training.world, training.loader
    on = options.profile and world.is_main and loader.epoch < options.max_epochs
    return StepProfiler(
        Path(options.output_dir) / "trace.json.gz" if on else None,
        training.model.config,
        world.device,
        DTYPES[options.precision],
        steps=len(loader) - loader.cursor,
    )


def patients_of(manifest: Manifest) -> dict[str, int]:
    return {split: sum(entry.num_patients for entry in shards) for split, shards in manifest.splits.items()}


def manifest_line(manifest: Manifest) -> str:
    counts = [f"{patients:,} {split}" for split, patients in patients_of(manifest).items()]
    return f"patients: {', '.join(counts)}; {manifest.num_codes - FIRST_CODE} variables"


if __name__ == "__main__":
    sys.exit(main())
