"""Train SeqSetVAE, or evaluate it: ``python train.py --help``.

Read top to bottom: :func:`main` parses and starts one process a device, :func:`train` is the loop, :func:`finish`
writes what a run leaves, :func:`cross_fit` trains several models and joins them.  The state of a run is
``training/state.py``, a step ``training/step.py``, validation ``training/validation.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from torch.profiler import record_function

from model.losses import LossOptions
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import has_task
from pipeline.options import from_dict
from pipeline.schema import PRIVATE_UMASK, UserError
from pipeline.storage.files import write_atomically
from training.begin import begin_run, set_threads
from training.card import is_summary_of, summarize_run, write_model_cards, write_summary
from training.checkpoint import Checkpoint, load_model
from training.console import format_metric, format_quality, log_main
from training.crossfit import check_cross_fit, finish_cross_fit, join_folds, keep_predictions
from training.data import agree_on_data
from training.evaluation import Evaluator, evaluate_checkpoint
from training.folds import Member, final_members, fold_members
from training.inspection import inspect_batches
from training.meds_predictions import check_meds_task
from training.memory import is_out_of_memory
from training.options import TrainOptions, check_same_options, parse_train_options
from training.parallel import World, run
from training.patients import write_patient_pages
from training.peers import end_with_line
from training.profiling import format_table
from training.report import write_run_report
from training.run import Run, Stopped
from training.side_by_side import train_side_by_side
from training.step import train_step
from training.trackers import show_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend, 128 + n = stopped by signal n."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    try:
        options = parse_train_options(arguments)
        manifest = Manifest.load(options.data.open_folder())
        if options.evaluation.inspect:
            return inspect_batches(options, manifest)
        if options.evaluation.export:
            # Imported here: training needs no safetensors.
            return import_module("training.export").export_checkpoint(options, manifest)
        several = cross_fit if options.cross_fit.is_on else train
        command = evaluate if options.evaluation.evaluate else several
        worker = functools.partial(start, command, options, manifest)
        return run(worker, devices=options.run.devices, device=options.run.device)
    except (UserError, OSError, MemoryError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            advice = "lower --batch_size, or give --max_memory or --gradient_checkpointing"
            end_with_line(f"train.py: out of memory; {advice}")
        elif isinstance(error, UserError | OSError):  # such as a full disk
            end_with_line(f"train.py: {error}")
        else:
            raise
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from the last checkpoint, where there is one", file=sys.stderr)
        return 128 + signal.SIGINT


def start(
    command: Callable[[TrainOptions, Manifest, World], int], options: TrainOptions, manifest: Manifest, world: World
) -> int:
    """Call one of the functions below, where all ranks were started alike."""
    check_same_options(options, world)
    return command(options, manifest, world)


def train(options: TrainOptions, manifest: Manifest, world: World, member: Member | None = None) -> int:
    """Train until the last epoch, early stopping or a signal; then evaluate the best checkpoint on the test split."""
    job = begin_run(options, manifest, world, member)
    state, summary = job.state, job.directory / "summary.json"
    if job.resumed and job.stop_reason and is_summary_of(summary, state.progress.step):
        log_main(world, f"{job.directory}: this run is finished ({job.stop_reason}); nothing to do, {summary} has it")
        if world.is_main and member is None and not (job.directory / "report.html").exists():  # killed right before
            write_run_report(job.directory)
        return 0
    with job:
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        devices = f"{world.size} × {world.device.type}, {state.progress.threads} threads each"
        log_main(world, f"{job.data.describe()}; {parameters:,} parameters; {devices}")
        try:
            while job.stop_reason is None:
                if state.progress.epochs_validated == state.loader.epoch:  # else its steps are done already
                    is_whole = train_epoch(job)
                    job.save_last()
                    if not is_whole:  # the posterior has collapsed
                        break
                found = job.validate()
                if world.is_main and member is not None and member.fold is not None:
                    keep_predictions(job.directory, state.progress.epochs_validated, found)
                job.end_epoch(found.rank())
            if job.best is None:  # collapsed before the first validation
                job.validate_within_epoch()
            job.log_interval()
            job.save_last()
            finish(job)
        except Stopped as stopped:
            step = state.progress.step
            log_main(world, f"stopped by signal {stopped.number} at step {step}; go on with --resume")
            return 128 + stopped.number
    return 0


def train_epoch(job: Run) -> bool:
    """Train from the loader's position to the end of its epoch; return whether the run came there, or is to stop."""
    state = job.state
    state.model.train()
    job.begin_epoch()
    batches = iter(state.loader)
    while job.stop_reason is None:
        if job.is_validation_due:
            job.validate_within_epoch()
        with record_function("data"):
            ready = next(batches, None)
        if ready is None:
            return True
        job.begin_step(ready)
        losses, grad_norm = train_step(state, ready, job.settings)
        job.end_step(ready, losses, grad_norm)
    return False


def finish(job: Run) -> None:
    """Evaluate the best checkpoint on the test split, write summary, model card and report, and say where they are."""
    world, data, directory, test = job.world, job.data, job.directory, None
    if data.manifest.splits.get("test") and job.member is None:
        model = load_model(directory / "checkpoints" / "best.pt", data.manifest.vocabulary_fingerprint)
        quality = job.evaluator.evaluate_split(model.to(world.device), "test")
        test = quality.flatten() if world.is_main else None
    if job.profiler.table is not None:
        log_main(world, "\n".join(["where the time goes:", *format_table(job.profiler.table)]))
    if not world.is_main:
        return
    summary = summarize_run(job) | {"test": test}
    if job.member is not None:
        write_summary(directory, summary)
        return
    for name, card in write_model_cards(job.state.model.config, job.options, data.num_samples, summary, data.unit):
        write_atomically(directory / name, card.encode())
    write_summary(directory, summary)
    report = write_run_report(directory)
    show_line(job.trackers, "test", {"step": job.state.progress.step, **(test or {})})
    for tracker in job.trackers:
        tracker.add_report(report)
    if test is not None and job.options.loss.learns_outcome:
        print(f"test {format_quality(test)}")
    ragged = "; batches travelled ragged, without any" if job.options.data.use_dynamic_padding is None else ""
    print(f"padding waste {summary['event_padding_waste']:.2%} of events in the padded layout{ragged}")
    print(f"report {report}")


def cross_fit(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """Train a model for each fold, then the final models on all patients of train and valid, and join these."""
    check_cross_fit(options, world)
    set_threads(options, world, options.run.threads)
    data = agree_on_data(options.data, manifest, world, options.task, *manifest.splits)
    if code := train_members(options, manifest, world, fold_members(options)):
        return code
    world.wait()  # the first rank writes what is predicted
    found = join_folds(options, data) if options.cross_fit.folds else None
    epochs = found.epochs if found else 0
    if code := train_members(options, manifest, world, final_members(options), stop_after=epochs):
        return code
    return finish_cross_fit(options, data, world, found)


def train_members(
    options: TrainOptions, manifest: Manifest, world: World, members: Sequence[Member], *, stop_after: int = 0
) -> int:
    """Train models of cross-fitting, each as a run of its own; return 0, or the code of one that stopped."""
    runs = {member: member.options_of(options, stop_after=stop_after) for member in members}
    processes = min(options.cross_fit.parallel_models, len(members))
    if processes > 1:
        return train_side_by_side(train, manifest, runs, processes=processes, device=options.run.device)
    for member, own in runs.items():
        log_main(world, f"{member.name}:")
        if code := train(own, manifest, world, member):
            return code
    return 0


def evaluate(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """Evaluate a checkpoint on one split: metrics with intervals, predictions and a report (``--evaluate``)."""
    evaluation, split = options.evaluation, options.evaluation.evaluate_split
    others = {"train"} if evaluation.baselines else set()
    splits = sorted({split, *others, *(["valid"] if evaluation.meds_predictions else [])})
    path = Path(evaluation.evaluate or "")
    saved = Checkpoint.load(path)
    loss = from_dict(
        LossOptions, saved.options["loss"]
    )  # what the model was trained for, not what this command line says
    options, folder = dataclasses.replace(options, loss=loss), options.data.open_folder()
    saved.check_same_vocabulary(path, manifest.vocabulary_fingerprint)
    model = saved.build_model(path, manifest.vocabulary_fingerprint, recalibrated=evaluation.recalibrate)
    model = model.to(world.device)
    task, outcomes = options.data.task, model.config.outcomes
    if task is None and loss.learns_outcome:
        missing = [outcome.name for outcome in outcomes if not has_task(folder, outcome.name)]
        if missing:
            log_main(world, f"{folder}: has no task {missing[0]}; whole patients are evaluated, without labels")
        else:
            task = ",".join(outcome.name for outcome in outcomes)
    data = agree_on_data(options.data, manifest, world, task, *splits)
    if data.tasks and [each.classes for each in data.tasks] != [outcome.classes for outcome in outcomes]:
        learned = ", ".join(f"{outcome.name} ({outcome.kind})" for outcome in outcomes)
        advice = "name tasks like those, or add one with --label_classes"
        raise UserError(f"--task {task}: of other classes than {path} predicts: {learned}; {advice}")
    if evaluation.meds_predictions:
        check_meds_task(data.manifest, data.tasks)
    if evaluation.patients and not loss.learns_outcome:
        raise UserError(f"--patients shows answers, and {path} predicts nothing; leave it out")
    if not data.manifest.splits.get(split):
        nobody = f"has no patients in split {split}; choose another with --evaluate_split"
        raise UserError(f"{options.data.data_dir}: {nobody}")
    set_threads(options, world, options.run.threads)
    content = evaluate_checkpoint(Evaluator(options, data, world), model)
    if world.is_main:
        print(f"{split} {format_quality(content)}, loss {format_metric(content['loss'])}")
        directory = Path(options.run.output_dir)
        print(f"report {write_run_report(directory)}")
        if evaluation.patients:
            print(f"patients {write_patient_pages(model, data, evaluation.patients, split, directory)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
