"""A run: what surrounds its steps.  It begins or resumes, logs, saves, hears signals, and decides when it is over."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import Tensor

from model.losses import Losses, beta_at
from pipeline.machine import HeapTrimmer, peak_rss_bytes, release_free_memory, rss_bytes
from pipeline.options import to_dict
from pipeline.schema import UserError
from pipeline.storage.cache import parse_bytes
from pipeline.storage.files import remove_leftovers, write_atomically
from training.checkpoint import Checkpoint
from training.console import EpochBar, log_main, memory_file, open_metrics_log
from training.data import DataSet, ReadyBatch
from training.evaluation import Evaluator
from training.folds import Member
from training.memory import StepMemory
from training.metrics import Meters, Throughput, task_losses
from training.monitor import MemoryMonitor
from training.options import TrainOptions
from training.parallel import StopSignal, World
from training.prepare_pool import PreparePool
from training.profiling import StepProfiler
from training.schedule import learning_rate_at
from training.state import TrainState
from training.step import StepSettings
from training.targets import TEACHER_FILE
from training.validation import is_better


class Stopped(Exception):  # no error: a signal asked for it
    """The signal of a ``number`` asked the run to stop, and its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Run:
    """A run under way, as a context: files, bar, monitor, profiler and signal handlers are its own while it lasts.

    ``best`` has the metrics of the best validation so far, ``resumed`` says whether the state was restored; ``pool``
    prepares batches, where the loader's thread does not; ``member`` says which model of cross-fitting is trained.
    """

    options: TrainOptions
    data: DataSet
    world: World
    memory: StepMemory | None
    state: TrainState
    settings: StepSettings
    best: dict[str, Any] | None
    resumed: bool
    pool: PreparePool | None
    member: Member | None = None

    def __post_init__(self) -> None:
        self.directory = Path(self.options.run.output_dir)
        self.evaluator = Evaluator(self.options, self.data, self.world, self.memory, self.check_stop)
        max_memory = self.options.run.max_memory
        self._heap = HeapTrimmer(parse_bytes(max_memory) if max_memory else None)
        self._meters = Meters(self.world, self.state.progress, self.state.model.config.outcomes)
        self._began = time.perf_counter() - self.state.progress.seconds
        self._step_ended = self._step_started = time.perf_counter()

    def __enter__(self) -> Self:
        self._open_directory()
        self._stack = contextlib.ExitStack()
        enter, options = self._stack.enter_context, self.options.run
        if self.pool is not None:
            self._stack.callback(self.pool.close)
        self._signal = enter(StopSignal(self.world))
        self._lines = enter(open_metrics_log(self.directory, self.world, self.state.progress.log_lines))
        path = memory_file(self.directory, self.world) if options.profile_memory else None
        self.monitor = enter(MemoryMonitor(path))
        self.bar = enter(EpochBar(self.world, self.options.optimisation.num_epochs))
        self.profiler = enter(self._make_profiler())
        if self.data.options.on_bad_shard == "quarantine" and not self.resumed:
            patients = {f"{split}_patients": number for split, number in self.data.quarantined_patients.items()}
            self.log("event", step=self.state.progress.step, event="quarantine", **patients)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def log(self, kind: str, **numbers: Any) -> None:
        """Add a line to metrics.jsonl; on the first rank alone."""
        if self._lines is not None:
            self._lines.write({"kind": kind, **numbers})

    def _open_directory(self) -> None:
        """Write what the run is; nothing was written before, so that a command that is refused changes no file."""
        checkpoints, path = self.directory / "checkpoints", self.directory / "config.yaml"
        config = yaml.safe_dump(to_dict(self.options), sort_keys=False).encode()
        if self.world.is_main:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.directory, checkpoints):  # not below: other runs may be going on there
                remove_leftovers(folder)
            write_atomically(path, config)
            if self.memory is not None:
                self.memory.save(self.directory / "memory_model.json")
            if (teacher := self.settings.preparer.teacher) is not None:
                teacher.save(self.directory / TEACHER_FILE)
        self.world.wait()
        same = self.world.gather(path.exists() and path.read_bytes() == config)
        if not all(same):
            unseen = f"rank {same.index(False)} does not see the files of rank 0; name a folder that all machines share"
            raise UserError(f"--output_dir {self.directory}: {unseen}")

    def _make_profiler(self) -> StepProfiler:
        """Return a profiler, which is on where ``--profile`` asks for it, on the first rank alone."""
        loader, optimisation = self.state.loader, self.options.optimisation
        on = self.options.run.profile and self.world.is_main and loader.epoch < optimisation.num_epochs
        steps = len(loader) - loader.cursor if on else 0
        path = self.directory / "trace.json.gz" if on else None
        return StepProfiler(path, self.state.model, self.options.loss, optimisation.dtype, steps=steps)

    @property
    def stop_reason(self) -> str | None:
        """Why there is nothing left to train; None = there is."""
        progress, options = self.state.progress, self.options.run
        if progress.collapsed and options.stop_on_collapse:
            return "collapse"
        if options.patience and progress.epochs_since_best >= options.patience:
            return "patience"
        optimisation, epochs = self.options.optimisation, progress.epochs_validated
        if epochs < optimisation.num_epochs:
            return None
        return "max_epochs" if epochs >= optimisation.max_epochs else "stop_after"

    @property
    def seconds(self) -> float:
        """Wall time spent, over all resumed parts of the run."""
        return time.perf_counter() - self._began

    def begin_epoch(self) -> None:
        """Show the bar, and let the clock of the next step begin."""
        loader = self.state.loader
        self.bar.begin(loader.epoch, len(loader), loader.cursor)
        self._step_ended = time.perf_counter()

    def begin_step(self, ready: ReadyBatch) -> None:
        """Note that the launching thread has its batch."""
        self._step_started = time.perf_counter()
        self._heap.begin_step(ready.batch.num_events)

    def end_step(self, ready: ReadyBatch, losses: Losses, grad_norm: Tensor) -> None:
        """Count a step; log and save where it is time, and raise Stopped where a signal asked for it."""
        now, step, options = time.perf_counter(), self.state.progress.step, self.options.run
        waited, seconds = self._step_started - self._step_ended, now - self._step_ended
        self._step_ended = now
        self._meters.add(ready.amounts, losses, grad_norm, seconds=seconds, waited=waited)
        self._heap.end_step(ready.batch.num_events)
        self.profiler.step(ready.parts)
        if step == 1:
            self.monitor.mark("first step")
        self.bar.advance(self._meters.interval)
        if step % options.log_steps == 0:
            self.log_interval()
        number = self._signal.poll()
        if number or (options.checkpoint_steps and step % options.checkpoint_steps == 0):
            self.save_last()
        if number:
            raise Stopped(number)

    def check_stop(self) -> None:
        """Raise Stopped where a signal asked for it; the state is saved already, and all ranks ask alike."""
        if number := self._signal.poll():
            raise Stopped(number)

    def log_interval(self) -> None:
        """Write a line of the steps since the last one, if their losses and gradients are finite, and begin anew."""
        step, optimisation = self.state.progress.step, self.options.optimisation
        interval, means = self._meters.end_interval()
        if not interval.num_steps:
            return
        # With fp16 the scaler leaves out steps whose gradients overflow.
        watched = means["loss"] + (0.0 if optimisation.precision == "fp16" else means["grad_norm"])
        if not math.isfinite(watched):
            self.state.check_finite(last_loss=watched)
        loss = self.options.loss
        unused = [] if loss.learns_sets else ["reconstruction", "kl"]
        names = task_losses(self.state.model.config.outcomes)
        unused += names if loss.learns_outcome and len(names) == 1 else []
        unused += [] if loss.learns_outcome else ["outcome", *names]
        line = {
            "step": step,
            "epoch": self.bar.epoch,
            "seconds": self.seconds,
            **{name: value for name, value in means.items() if name not in unused},
            **interval.rates(),
            "learning_rate": learning_rate_at(optimisation, step - 1, self.settings.total_steps),
            "beta": beta_at(loss, step - 1),
            "rss_bytes": rss_bytes(),
        }
        self.log("train", **line)
        if self.options.run.verbose:
            log_main(self.world, ", ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def save_last(self) -> None:
        """Save ``last.pt``, if losses and weights are finite; all ranks take part, the first writes."""
        progress = self.state.progress
        self._meters.store(progress)
        progress.log_lines = 0 if self._lines is None else self._lines.num_lines
        progress.seconds = self.seconds
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, peak_rss_bytes())
        self.state.check_finite(last_loss=progress.loss_sums["loss"])
        self._save("last")
        self.monitor.mark("checkpoint")
        release_free_memory()

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Log a validation, save the best checkpoint first and then the last, and say how it went."""
        progress, epoch = self.state.progress, self.state.progress.epochs_validated
        self.log("valid", step=progress.step, epoch=epoch, seconds=self.seconds, **metrics)
        metrics = {**metrics, "epoch": epoch, "step": progress.step}
        improved = is_better(metrics, self.best, self.settings.monitor)
        if improved:
            self.best = metrics
            self._save("best", metrics)
        if metrics["collapsed"]:
            self._save("collapsed", metrics)
            active = f"{metrics['active_units']} of {self.state.model.config.width} units are active"
            log_main(self.world, f"warning: the posterior has collapsed, {active}")
        progress.epochs_validated = epoch + 1
        progress.epochs_since_best = 0 if improved else progress.epochs_since_best + 1
        progress.collapsed = bool(metrics["collapsed"])
        self.save_last()
        self.bar.end(epoch, metrics, improved=improved)
        if (graphs := self.settings.graphs) is not None:
            log_main(self.world, f"{graphs.replayed:,} of {progress.step:,} steps ran as CUDA graphs")

    def _save(self, name: str, metrics: dict[str, Any] | None = None) -> None:
        if self.world.is_main:
            Checkpoint(
                config=self.state.model.config.to_dict(),
                vocabulary_fingerprint=self.data.manifest.vocabulary_fingerprint,
                options=to_dict(self.options),
                state=self.state.state_dict(),
                metrics=metrics,
            ).save(self.directory / "checkpoints" / f"{name}.pt")

    def summarize(self) -> dict[str, Any]:
        """Return what the training was, for ``summary.json``: totals over all resumed parts of the run."""
        progress = self.state.progress
        summary: dict[str, Any] = {
            "steps": progress.step,
            "seconds": round(progress.seconds, 2),
            "stopped_by": self.stop_reason,
            **Throughput(**progress.totals).rates(),
            "threads": progress.threads,
            "steps_in_graphs": 0 if self.settings.graphs is None else self.settings.graphs.replayed,
            "peak_rss_bytes": max(progress.peak_rss_bytes, peak_rss_bytes()),
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else None,
        }
        if self.options.run.profile_memory:  # of this process and those below it; each rank has a profile of its own
            summary["profiled_peak_rss_bytes"] = self.monitor.peak_rss_bytes
            summary["profiled_peak_uss_bytes"] = self.monitor.peak_uss_bytes
        if self.profiler.table is not None:
            summary["profile"] = self.profiler.table
        quarantined = {"quarantined_patients": self.data.quarantined_patients}
        return summary | quarantined | {"quarantined_shards": self.data.quarantined_shards, "best": self.best}
