"""Train SeqSetVAE, or evaluate it: ``python train.py --help``.

How training works, top to bottom: :func:`main` parses and starts one process a device, :func:`train` is the loop,
:func:`validate` and :func:`evaluate` measure, :func:`inspect` shows batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import Checkpoint
from model.collapse import CollapseGauges, is_collapsed
from model.config import SeqSetVAEConfig
from model.evaluation import auroc_auprc, evaluate_predictions
from model.losses import LossCounts
from model.options import TrainOptions, parse_options
from model.parallel import World, run
from model.seqsetvae import Losses, ModelInput, SeqSetVAE, losses
from pipeline.batch import PatientBatch
from pipeline.loader import PatientLoader, make_loader
from pipeline.monitor import JsonLines, MemoryMonitor, Throughput, peak_rss_bytes
from pipeline.report import write_run_report
from pipeline.schema import EMBEDDINGS_FILE, UserError
from pipeline.shards import Manifest, check_file, write_atomically

console = Console(stderr=True, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend, 128 + n = stopped by signal n."""
    try:
        options = parse_options(arguments)
        manifest = Manifest.load(Path(options.data_dir))
        if options.inspect:
            return inspect(options, manifest)
        worker = evaluate if options.evaluate else train
        return run(functools.partial(worker, options, manifest), devices=options.devices, device=options.device)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------------------ training


def train(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """Train until the last epoch, early stopping or a signal; then evaluate the best checkpoint on the test split."""
    run_dir = Path(options.output_dir)
    last, best = run_dir / "checkpoints" / "last.pt", run_dir / "checkpoints" / "best.pt"
    resumed = load_resumed(options, last)
    started = time.perf_counter()

    loader = open_loader(options, world, "train", shuffle=True)
    model = new_model(options, manifest)
    config = model.config
    model.to(world.device)
    model.gradient_checkpointing = options.gradient_checkpointing
    optimizer = torch.optim.AdamW(parameter_groups(model, options), lr=options.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
    progress: dict[str, Any] = {
        "step": 0,
        "best": None,
        "epochs_since_best": 0,
        "seconds": 0.0,
        "first_epoch_waste": None,
    }
    if resumed is not None:
        resumed.check_same_model(last, config)
        if resumed.vocabulary_fingerprint != manifest.vocabulary_fingerprint:
            raise UserError(
                f"{last}: trained with another vocabulary than {options.data_dir} has; resume on its own data"
            )
        model.load_state_dict(resumed.model)
        optimizer.load_state_dict(resumed.optimizer)
        scaler.load_state_dict(resumed.scaler)
        loader.load_state_dict(resumed.loader)
        progress = dict(resumed.progress)
    stepper: torch.nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    total_steps = max(len(loader) * options.max_epochs, 1)

    def save(*paths: Path) -> None:
        progress["seconds"] = spent()
        if world.is_main:
            Checkpoint(
                config=config.to_dict(),
                vocabulary_fingerprint=manifest.vocabulary_fingerprint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                loader=loader.state_dict(),
                progress=dict(progress),
            ).save(*paths)

    spent_before = progress["seconds"]

    def spent() -> float:
        return spent_before + time.perf_counter() - started

    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        resolved = {"options": dataclasses.asdict(options), "model": config.to_dict()}
        write_atomically(run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
        say(
            world,
            f"{manifest_line(manifest)}; {sum(p.numel() for p in model.parameters()):,} parameters; {world.device}",
        )

    stopping = StopSignal()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopping)
        memory = stack.enter_context(MemoryMonitor(run_dir / "memory.csv")) if is_profiling(options, world) else None
        log = (
            stack.enter_context(JsonLines(run_dir / "metrics.jsonl", resume_step=progress["step"]))
            if world.is_main
            else None
        )
        bar = stack.enter_context(EpochBar(world, options.max_epochs))
        mark = memory.mark if memory else lambda name: None
        stop: str | None = None
        while loader.epoch < options.max_epochs and stop is None:
            epoch, throughput, sums = loader.epoch, Throughput(), LossSums(config.levels, world.device)
            bar.start(epoch, len(loader), loader.cursor)
            model.train()
            for batch, counts, waited in timed(loader):
                # The schedule is a function of the step alone, so that a resumed run needs none of its state.
                step = progress["step"]
                rate, beta = learning_rate(options, step, total_steps), kl_weight(options, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                step_started = time.perf_counter()
                given = ModelInput.of(lay_out(batch, options, loader)).to(world.device)
                optimizer.zero_grad(set_to_none=True)
                with autocast(options, world):
                    output = stepper(given, seed=options.seed, step=step)
                    loss = losses(output, given.batch.label, options.loss_weights(), counts, beta=beta)
                backward(loss.total, model, scaler, world)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip or math.inf)
                scaler.step(optimizer)
                scaler.update()
                progress["step"] = step + 1
                sums.add(loss, norm)
                throughput.add(batch, waited=waited, step_seconds=time.perf_counter() - step_started)
                if step == 0:
                    mark("first step")

                if progress["step"] % options.log_steps == 0:
                    line = {**sums.means(world), **throughput.rates(), "learning_rate": rate, "beta": beta}
                    check_finite(line["loss"], progress["step"])
                    if log:
                        log.write(
                            {"kind": "train", "step": progress["step"], "epoch": epoch, "seconds": spent(), **line}
                        )
                bar.advance(throughput)
                if options.checkpoint_steps and progress["step"] % options.checkpoint_steps == 0:
                    save(last)
                    mark("checkpoint")
                # Ranks agree on stopping at steps that all of them reach.
                if (world.size == 1 or progress["step"] % options.log_steps == 0) and world.any(
                    stopping.number is not None
                ):
                    stop = "signal"
                    break
            if stop:
                break
            if progress["first_epoch_waste"] is None:
                progress["first_epoch_waste"] = loader.plan.event_padding_waste
            mark("validation")
            metrics, _ = validate(model, open_loader(options, world, "valid", shuffle=False), options, world)
            line = {"kind": "valid", "step": progress["step"], "epoch": epoch, "seconds": spent(), **metrics}
            if log:
                log.write(line)
            better = is_better(options, metrics, progress["best"])
            if better:
                progress |= {"best": {**metrics, "epoch": epoch, "step": progress["step"]}, "epochs_since_best": 0}
            else:
                progress["epochs_since_best"] += 1
            save(last, *([best] if better else []))
            mark("checkpoint")
            bar.epoch_line(metrics, better)
            if metrics["collapsed"]:
                say(
                    world,
                    f"warning: the posterior has collapsed: {metrics[f'active_units_{config.levels}']} active units",
                )
                save(run_dir / "checkpoints" / "collapsed.pt")
                stop = "collapse" if options.stop_on_collapse else None
            if options.patience and progress["epochs_since_best"] >= options.patience:
                stop = "patience"
        if stop == "signal":
            save(last)
            say(world, f"stopped by signal {stopping.number} at step {progress['step']}; go on with --resume")
            return 128 + (stopping.number or signal.SIGTERM)
    finish(options, manifest, world, progress, stop, spent())
    return 0


def finish(
    options: TrainOptions, manifest: Manifest, world: World, progress: dict[str, Any], stop: str | None, seconds: float
) -> None:
    """Evaluate the best checkpoint on the test split, write summary and report, say where they are."""
    run_dir = Path(options.output_dir)
    best = run_dir / "checkpoints" / "best.pt"
    test = None
    if manifest.splits.get("test"):
        model = Checkpoint.load(best).build_model(best, manifest).to(world.device)
        test, predictions = validate(model, open_loader(options, world, "test", shuffle=False), options, world)
        if world.is_main:
            test |= evaluate_predictions(predictions["label"].to_numpy(), predictions["probability"].to_numpy())
            pq.write_table(predictions, run_dir / "predictions_test.parquet")
    if not world.is_main:
        return
    waste = progress["first_epoch_waste"]
    summary = {
        "steps": progress["step"],
        "stopped_by": stop or "max_epochs",
        "seconds": round(seconds, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None,
        "event_padding_waste": waste,
        "best": progress["best"],
        "test": test,
    }
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    report = write_run_report(run_dir)
    if test:
        print(f"test AUROC {shown(test['auroc'])}, AUPRC {shown(test['auprc'])}")
    print(f"event padding waste of the padded layout {shown(waste)}; batches travel ragged, without padding")
    print(f"report {report}")


def load_resumed(options: TrainOptions, last: Path) -> Checkpoint | None:
    """The checkpoint to go on from; None = begin anew.

    Raises:
        UserError: the directory holds a run and ``--resume`` was not given.
    """
    if last.exists():
        if options.resume:
            return Checkpoint.load(last)
        raise UserError(
            f"--output_dir {options.output_dir} holds a run already; --resume goes on with it, or name another"
        )
    return None


def new_model(options: TrainOptions, manifest: Manifest) -> SeqSetVAE:
    """An untrained model for this data; the same weights for the same seed on every rank and device."""
    changes: dict[str, Any] = {"event_form": options.event_form, "dropout": options.dropout}
    embeddings = None
    if manifest.embedding_dim is not None:
        check_file(Path(options.data_dir), manifest, EMBEDDINGS_FILE)
        embeddings = torch.from_numpy(np.load(Path(options.data_dir) / EMBEDDINGS_FILE, allow_pickle=False))
        changes |= {"embedding_dim": manifest.embedding_dim, "frozen_embeddings": True}
    torch.manual_seed(options.seed)
    return SeqSetVAE(SeqSetVAEConfig.preset(options.preset, num_codes=manifest.num_codes, **changes), embeddings)


def open_loader(options: TrainOptions, world: World, split: str, *, shuffle: bool) -> PatientLoader:
    return make_loader(
        options.data_dir,
        split=split,
        batch_size=options.batch_size,
        max_events=options.max_events,
        max_sequence_length=options.max_sequence_length,
        shuffle=shuffle,
        seed=options.seed,
        bucketing=options.bucketing,
        rank=world.rank,
        world_size=world.size,
        prefetch=options.prefetch,
        pin_memory=world.device.type == "cuda",
    )


def lay_out(batch: PatientBatch, options: TrainOptions, loader: PatientLoader) -> PatientBatch:
    """The batch as it came, or through the padded layout where the user asks for that."""
    if options.use_dynamic_padding is None:
        return batch
    pad_to = None if options.use_dynamic_padding else loader.longest_patient
    return PatientBatch.from_padded(batch.to_padded(pad_to=pad_to), batch.patient_id)


def parameter_groups(model: SeqSetVAE, options: TrainOptions) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases, norms and single vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth (Loshchilov & Hutter 2017)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def kl_weight(options: TrainOptions, step: int) -> float:
    """Linear warm-up of beta."""
    return options.beta * min(1.0, (step + 1) / max(options.beta_warmup_steps, 1))


def autocast(options: TrainOptions, world: World) -> torch.autocast:
    dtype = torch.float16 if options.precision == "fp16" else torch.bfloat16
    return torch.autocast(world.device.type, dtype=dtype, enabled=options.precision != "fp32")


def backward(loss: Tensor, model: SeqSetVAE, scaler: torch.amp.GradScaler, world: World) -> None:
    """Gradients of the global batch's loss on every rank."""
    if world.size > 1:
        # Losses are shares of a sum and DDP averages; and every parameter takes part, also on a rank that got no
        # patients or only sets of one event, because the others wait for its gradient.
        loss = loss * world.size + sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
    scaler.scale(loss).backward()


def timed(loader: PatientLoader) -> Iterator[tuple[PatientBatch, LossCounts, float]]:
    """Batches with the counts of their global batch and the seconds waited for each."""
    batches = iter(loader)
    while True:
        started = time.perf_counter()
        step = loader.cursor
        batch = next(batches, None)
        if batch is None:
            return
        counts = loader.step_counts(step)
        waited = time.perf_counter() - started
        yield (
            batch,
            LossCounts(num_events=counts.num_events, num_sets=counts.num_sets, num_labelled=counts.num_labelled),
            waited,
        )


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}: lower --learning_rate, or use --precision bf16 or fp32; "
            "the last checkpoint is untouched"
        )


def is_better(options: TrainOptions, metrics: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Whether ``metrics`` beat the best so far; by the loss where a split without both outcomes has no AUROC."""
    name = options.monitor if metrics[options.monitor] is not None else "loss"
    if best is None or best[name] is None:
        return True
    return bool(metrics[name] < best[name] if name == "loss" else metrics[name] > best[name])


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
    sums = LossSums(model.config.levels, world.device)
    gauges = CollapseGauges(model.config.levels, model.config.width, world.device)
    ids: list[str] = []
    labels, probabilities = [], []
    one = LossCounts(num_events=1, num_sets=1, num_labelled=1)
    totals = np.zeros(3, dtype=np.int64)
    for batch, counts, _ in timed(loader):
        given = ModelInput.of(lay_out(batch, options, loader)).to(world.device)
        with autocast(options, world):
            output = model(given)
            sums.add(losses(output, given.batch.label, options.loss_weights(), one, beta=options.beta), None)
        gauges.update(output.posteriors)
        ids += batch.patient_id
        labels.append(batch.label)
        probabilities.append(output.probability)
        totals += (counts.num_events, counts.num_sets, counts.num_labelled)
    world.sum(gauges.sums)
    label = torch.cat(labels).numpy() if labels else np.zeros(0, np.int64)
    probability = torch.cat(probabilities).cpu().numpy() if probabilities else np.zeros(0, np.float32)
    shares = world.gather((ids, label, probability))
    ids = [name for share in shares for name in share[0]]
    label = np.concatenate([share[1] for share in shares])
    probability = np.concatenate([share[2] for share in shares]).astype(np.float64)

    summed = sums.totals(world)
    metrics: dict[str, Any] = {
        "reconstruction": summed["reconstruction"] / max(int(totals[0]), 1),
        "kl": summed["kl"] / max(int(totals[1]), 1),
        "classification": summed["classification"] / max(int(totals[2]), 1),
    }
    weights = options.loss_weights()
    metrics["loss"] = (
        weights.reconstruction * metrics["reconstruction"]
        + weights.beta * metrics["kl"]
        + weights.classification * metrics["classification"]
    )
    metrics["auroc"], metrics["auprc"] = auroc_auprc(label, probability)
    levels = gauges.compute()
    for number, gauge in enumerate(levels, start=1):
        metrics[f"kl_level_{number}"] = gauge.kl
        metrics[f"active_units_{number}"] = gauge.active_units
        metrics[f"mean_posterior_variance_{number}"] = gauge.mean_posterior_variance
    metrics["collapsed"] = is_collapsed(levels, options.least_active_units)
    table = pa.table(
        {
            "patient_id": pa.array(ids, pa.string()),
            "label": pa.array(label, pa.int8(), mask=label < 0),
            "probability": pa.array(probability, pa.float64()),
        }
    ).sort_by("patient_id")
    return metrics, table


def evaluate(options: TrainOptions, manifest: Manifest, world: World) -> int:
    """``--evaluate``: metrics with intervals, predictions and a report for one split."""
    path, run_dir, split = Path(options.evaluate or ""), Path(options.output_dir), options.evaluate_split
    if not manifest.splits.get(split):
        raise UserError(f"{options.data_dir}: has no {split} split; choose another with --evaluate_split")
    model = Checkpoint.load(path).build_model(path, manifest).to(world.device)
    metrics, predictions = validate(model, open_loader(options, world, split, shuffle=False), options, world)
    if not world.is_main:
        return 0
    labels = predictions["label"].fill_null(-1).to_numpy()
    metrics |= evaluate_predictions(labels, predictions["probability"].to_numpy())
    run_dir.mkdir(parents=True, exist_ok=True)
    pq.write_table(predictions, run_dir / f"predictions_{split}.parquet")
    content = {"checkpoint": str(path), "split": split, **metrics}
    write_atomically(run_dir / f"evaluation_{split}.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"{split} AUROC {shown(metrics['auroc'])}, AUPRC {shown(metrics['auprc'])}, loss {metrics['loss']:.4f}")
    print(f"report {write_run_report(run_dir)}")
    return 0


def inspect(options: TrainOptions, manifest: Manifest) -> int:
    """``--inspect``: for batches of 1, 2, 4 and 8 patients, their number, every shape, padding, a forward pass and
    memory.
    """
    world = World(0, 1, torch.device("cpu"))
    model = new_model(options, manifest).eval()
    print(manifest_line(manifest))
    for batch_size in (1, 2, 4, 8):
        loader = open_loader(dataclasses.replace(options, batch_size=batch_size), world, "train", shuffle=True)
        batch = next(iter(loader))
        padded = lay_out(batch, options, loader).to_padded(
            model.events.embedding.detach(),
            pad_to=loader.longest_patient if options.use_dynamic_padding is False else None,
        )
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
        print(f"  forward: {sizes} -> logits {tuple(output.logits.shape)}, {milliseconds:.0f} ms")
        print(f"  memory: {peak_rss_bytes() / 2**20:.0f} MiB at most so far")
    return 0


# ------------------------------------------------------------------------------------------------ in front of the user


class LossSums:
    """Losses gathered on the device; it is waited for when they are read, not at each step."""

    def __init__(self, levels: int, device: torch.device) -> None:
        self.names = ["loss", "reconstruction", "kl", "classification", "grad_norm"]
        self.names += [f"kl_level_{number + 1}" for number in range(levels)]
        self.values = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, loss: Losses, grad_norm: Tensor | None) -> None:
        parts = [loss.total.detach(), loss.reconstruction, loss.kl, loss.classification]
        parts += [loss.total.new_zeros(()) if grad_norm is None else grad_norm, *loss.kl_levels]
        self.values += torch.stack([part.double() for part in parts])
        self.steps += 1

    def totals(self, world: World) -> dict[str, float]:
        """Sums over steps and ranks; starts again from nothing."""
        summed = dict(zip(self.names, world.sum(self.values).tolist(), strict=True))
        self.values, self.steps = torch.zeros_like(self.values), 0
        return summed

    def means(self, world: World) -> dict[str, float]:
        """Means over steps since the last reading; ranks hold shares of a loss, and the same norm of the gradient."""
        steps = max(self.steps, 1)
        means = {name: value / steps for name, value in self.totals(world).items()}
        means["grad_norm"] /= world.size
        return means


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave between two steps."""

    number: int | None = None

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number


class EpochBar:
    """One progress bar an epoch with patients/s, waste and memory; lines alone where there is no terminal."""

    def __init__(self, world: World, max_epochs: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.world, self.max_epochs = world, max_epochs
        self.bar = Progress(*columns, console=console, disable=not world.is_main or not console.is_terminal)
        self.task: Any = None

    def __enter__(self) -> EpochBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, epoch: int, steps: int, done: int) -> None:
        self.epoch = epoch
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"epoch {epoch + 1}/{self.max_epochs}", total=steps, completed=done, now="")

    def advance(self, throughput: Throughput) -> None:
        if not self.bar.disable:
            rates = throughput.rates(reset=False)
            now = (
                f"{rates['patients_per_second']:.1f} patients/s, padding {rates['event_padding_waste']:.1%}, "
                f"{peak_rss_bytes() / 2**30:.2f} GiB"
            )
            self.bar.update(self.task, advance=1, now=now)

    def epoch_line(self, metrics: dict[str, Any], better: bool) -> None:
        quality = f"AUROC {shown(metrics['auroc'])}, AUPRC {shown(metrics['auprc'])}"
        text = f"epoch {self.epoch + 1}/{self.max_epochs}: loss {metrics['loss']:.4f}, {quality}"
        say(self.world, text + (" (best so far)" if better else ""))


def is_profiling(options: TrainOptions, world: World) -> bool:
    return options.profile_memory and world.is_main


def shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def say(world: World, text: str) -> None:
    if world.is_main:
        console.print(text, markup=False)


def manifest_line(manifest: Manifest) -> str:
    counts = [f"{sum(s.num_patients for s in shards):,} {split}" for split, shards in manifest.splits.items()]
    return f"patients: {', '.join(counts)}; {manifest.num_codes - 2} variables"


if __name__ == "__main__":
    sys.exit(main())
