"""A run: what surrounds its steps.  It begins or resumes, logs, saves, hears signals, and decides when it is over."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from model.losses import Losses, beta_at
from pipeline.machine import HeapTrimmer, peak_rss_bytes, release_free_memory, usable_memory
from pipeline.options import to_dict
from pipeline.storage.cache import parse_bytes
from training.checkpoint import Checkpoint
from training.collapse import is_collapsed
from training.console import EpochBar, format_memory, log_main, measure_memory
from training.data import DataSet, ReadyBatch, sample_patients
from training.evaluation import Evaluator
from training.folds import Member
from training.memory import StepMemory
from training.metrics import Meters, task_losses
from training.monitor import MemoryMonitor
from training.options import TrainOptions
from training.parallel import StopSignal, World
from training.prepare_pool import PreparePool
from training.profiling import StepProfiler
from training.run_files import memory_file, open_directory, open_metrics_log, remove_other_best
from training.schedule import learning_rate_at
from training.state import TrainState
from training.step import StepSettings
from training.trackers import open_trackers, show_line
from training.validation import Validation, is_better, rank_validations

SPARE = 1 / 64
"""Share of the memory that is free, without ``--max_memory``, that gaps of the heap may take: getting back what was
given back takes time."""


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
        watched = sample_patients(self.data, "valid", self.options.run.validate_patients)
        self._validator = dataclasses.replace(self.evaluator, data=watched)
        max_memory = self.options.run.max_memory
        spare = 0 if max_memory else int(SPARE * usable_memory() / self.world.local_size)
        self._heap = HeapTrimmer(parse_bytes(max_memory) if max_memory else None, spare=spare)
        self._meters = Meters(self.world, self.state.progress, self.state.model.config.outcomes)
        self._began = time.perf_counter() - self.state.progress.seconds
        self._step_ended = self._step_started = time.perf_counter()

    def __enter__(self) -> Self:
        open_directory(self.directory, self.options, self.world, self.memory, self.settings.preparer.teacher)
        self._stack = contextlib.ExitStack()
        enter, options = self._stack.enter_context, self.options.run
        if self.pool is not None:
            self._stack.callback(self.pool.close)
        self._signal = enter(StopSignal(self.world))
        self._lines = enter(open_metrics_log(self.directory, self.world, self.state.progress.log_lines))
        step, names = self.state.progress.step, self.options.run.track if self.world.is_main else ()
        self.trackers = open_trackers(names, self.directory, to_dict(self.options), step)
        path = memory_file(self.directory, self.world) if options.profile_memory else None
        self.monitor = enter(MemoryMonitor(path))
        self.bar = enter(EpochBar(self.world, self.options.optimisation.num_epochs))
        self.profiler = enter(self._make_profiler())
        if self.data.options.on_bad_shard == "quarantine" and not self.resumed:
            patients = {f"{split}_patients": number for split, number in self.data.quarantined_patients.items()}
            self.log("event", step=self.state.progress.step, event="quarantine", **patients)
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:  # whatever a tracker raises
            for tracker in self.trackers:
                tracker.close(finished=error[0] is None and self.stop_reason is not None)

    def log(self, kind: str, **numbers: Any) -> None:
        """Add a line to metrics.jsonl; on the first rank alone."""
        if self._lines is not None:
            self._lines.write({"kind": kind, **numbers})
            show_line(self.trackers, kind, numbers)

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
        """Show the bar, count what the epoch draws, and let the clock of the next step begin."""
        loader = self.state.loader
        if loader.cursor == 0 and self.world.is_main and (drawn := loader.count_draws(loader.epoch)):
            self.log("event", step=self.state.progress.step, event="sampling", epoch=loader.epoch, **drawn)
            counts = ", ".join(f"{name.replace('_', ' ')}: {number:,}" for name, number in drawn.items())
            log_main(self.world, f"epoch {loader.epoch + 1} draws {counts}")
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
        if self.settings.has_gauges and step % options.collapse_steps == 0:
            self._look_at_posterior()
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
            **(memory := measure_memory(self.world.device)),
        }
        self.log("train", **line)
        if self.options.run.verbose:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in line.items() if name not in memory)
            log_main(self.world, f"{numbers}, memory {format_memory(memory)}")

    def save_last(self) -> None:
        """Save ``last.pt``, if losses and weights are finite; all ranks take part, the first writes."""
        progress = self.state.progress
        self._meters.store(progress)
        progress.log_lines = 0 if self._lines is None else self._lines.num_lines
        progress.seconds = self.seconds
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, peak_rss_bytes())
        self.state.check_finite(last_loss=progress.loss_sums["loss"])
        self.state.gauges.combine(self.world)
        self._save("last")
        if self.world.is_main:
            remove_other_best(self.directory / "checkpoints", progress)
        self.monitor.mark("checkpoint")
        release_free_memory()

    @property
    def is_validation_due(self) -> bool:
        """Whether it is time for a validation within the epoch, or a run that goes on was stopped during it."""
        progress, loader, every = self.state.progress, self.state.loader, self.options.run.validate_steps
        if not every or progress.step % every or progress.step_validated == progress.step:
            return False
        return 0 < loader.cursor < len(loader)

    def validate(self) -> Validation:
        """Validate the EMA weights, on the patients that ``--validate_patients`` chooses."""
        self.monitor.mark("validation")
        return self._validator.validate(self.state.ema_model, "valid")

    def validate_within_epoch(self) -> None:
        """Validate between two steps; the state is saved before, so that a run that is killed meanwhile is whole."""
        self.save_last()
        self._note_validation(self.validate().rank(), step=self.state.progress.step)
        self.state.progress.step_validated = self.state.progress.step
        self.save_last()
        self._step_ended = time.perf_counter()

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Note the validation of an epoch, and save the state that goes on with the next."""
        progress, epoch = self.state.progress, self.state.progress.epochs_validated
        self._note_validation(metrics)
        assert self.best is not None
        progress.epochs_validated = epoch + 1
        progress.epochs_since_best = 0 if self.best["epoch"] == epoch else progress.epochs_since_best + 1
        self.save_last()
        if (graphs := self.settings.graphs) is not None:
            log_main(self.world, f"{graphs.replayed:,} of {progress.step:,} steps ran as CUDA graphs")

    def _note_validation(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log a validation, of an epoch or at a ``step`` within it; save what is best, and say how it went."""
        progress, epoch = self.state.progress, self.state.progress.epochs_validated
        self.log("valid", step=progress.step, epoch=epoch, seconds=self.seconds, **metrics)
        metrics = {**metrics, "epoch": epoch, "step": progress.step}
        improved = is_better(metrics, self.best, self.settings.monitor)
        if self.options.run.keep_best > 1:
            progress.best_saved = rank_validations([*progress.best_saved, metrics], self.settings.monitor)
            progress.best_saved = progress.best_saved[: self.options.run.keep_best]
            if any(each["step"] == progress.step for each in progress.best_saved):
                self._save(f"best_{progress.step}", metrics)
        if improved:
            self.best, progress.best_step = metrics, progress.step
            self._save("best", metrics)
        self._note_posterior(metrics)
        self.bar.end(epoch, metrics, step=step, improved=improved)

    def _look_at_posterior(self) -> None:
        """Log the gauges of the sets of the steps since the last look."""
        gauge = self.state.gauges.read(self.world)
        found = dataclasses.asdict(gauge) | {"collapsed": is_collapsed(gauge, self.options.run.min_active_units)}
        self.log("posterior", step=self.state.progress.step, epoch=self.bar.epoch, seconds=self.seconds, **found)
        self._note_posterior(found)

    def _note_posterior(self, metrics: dict[str, Any]) -> None:
        """Warn, and save a checkpoint, where the posterior has just collapsed."""
        progress = self.state.progress
        if metrics["collapsed"] and not progress.collapsed:
            self._save("collapsed", metrics)
            active = f"{metrics['active_units']} of {self.state.model.config.width} units are active"
            log_main(self.world, f"warning: the posterior has collapsed at step {progress.step}, {active}")
        progress.collapsed = bool(metrics["collapsed"])

    def _save(self, name: str, metrics: dict[str, Any] | None = None) -> None:
        if self.world.is_main:
            Checkpoint(
                config=self.state.model.config.to_dict(),
                vocabulary_fingerprint=self.data.manifest.vocabulary_fingerprint,
                options=to_dict(self.options),
                state=self.state.state_dict(),
                metrics=metrics,
            ).save(self.directory / "checkpoints" / f"{name}.pt")
