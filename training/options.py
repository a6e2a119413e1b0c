"""All options of ``train.py`` as one tree of sections, and what a resumed run may change of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from model.config import ModelOptions
from model.losses import LossOptions
from pipeline.options import Section, option, parse_options, to_dict
from pipeline.schema import DEFAULT_TASK, UserError
from pipeline.storage.cache import parse_bytes
from training.data import DataOptions
from training.parallel import World
from training.schedule import OptimisationOptions
from training.subgroups import Grouping
from training.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class RunOptions(Section):
    """Run."""

    output_dir: str = option("", "Folder for the run's files.")
    seed: int = option(0, "Random seed for weight initialisation, noise and batch order.", minimum=0)
    devices: int = option(1, "Number of processes, one a GPU or a share of the CPU's cores.", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to compute.")
    threads: int | None = option(
        None, "Number of threads of each process for operations on the CPU; by default OMP_NUM_THREADS, or the idle "
        "cores that it may use, as many as the preset gains from.", minimum=1,
    )  # fmt: skip
    max_memory: str | None = option(
        None, "Maximum memory of its device that each process may hold, e.g. 8GB: the memory of a step is measured, "
        "batches are planned that fit, and one that does not is taken in parts, with the same result.",
    )  # fmt: skip
    resume: bool = option(False, "Go on from checkpoints/last.pt of --output_dir, where there is one.")
    checkpoint_steps: int = option(0, "Number of steps between saves of last.pt within an epoch; 0 = none.", minimum=0)
    validate_steps: int = option(
        0, "Number of steps between validations within an epoch, beside the one at its end; 0 = none.", minimum=0
    )
    validate_patients: int = option(
        0, "Number of patients of the validation split that validations during training look at, always the same ones; "
        "0 = all.", minimum=0,
    )  # fmt: skip
    keep_best: int = option(1, "Number of best checkpoints to keep, as best_<step>.pt; 1 = best.pt alone.", minimum=1)
    monitor: Literal["auto", "auroc", "auprc", "r2", "loss"] = option(
        "auto", "Metric that decides which validation is best, of several tasks its mean. By default AUROC for "
        "classes, R² for numbers, the loss for both.",
    )  # fmt: skip
    patience: int = option(0, "Epochs without a better one after which the run stops early; 0 = never.", minimum=0)
    collapse_steps: int = option(
        50, "Number of training steps between looks at the posterior, each at the sets of the steps since the last; "
        "0 = at validations alone.", minimum=0,
    )  # fmt: skip
    min_active_units: float = option(
        0.02, "Share of active units below which the posterior counts as collapsed.", minimum=0, maximum=1
    )
    stop_on_collapse: bool = option(False, "End the run when the posterior collapses.")
    log_steps: int = option(10, "Number of steps between lines of metrics.jsonl.", minimum=1)
    profile_memory: bool = option(False, "Sample the memory of all processes into memory.csv.")
    profile: bool = option(False, "Record a few steps into trace.json.gz, and show where their time goes.")
    track: tuple[str, ...] = option(
        (), "Experiment trackers that are shown what metrics.jsonl gets: tensorboard, wandb or mlflow, or several.",
        metavar="TRACKER",
    )  # fmt: skip
    verbose: bool = option(False, "Print every line of metrics.jsonl.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.track)
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "--max_memory")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Section):
    """Evaluation."""

    evaluate: str | None = option(None, "Evaluate this checkpoint and do not train.")
    evaluate_split: Literal["train", "valid", "test"] = option("test", "The split that --evaluate evaluates.")
    baselines: bool = option(
        False, "With --evaluate: fit trees and logistic regression to summaries of each variable of the train split, "
        "and evaluate them on the same patients.",
    )  # fmt: skip
    subgroups: tuple[str, ...] = option(
        (), "With --evaluate: evaluate subgroups of patients too, by variables such as Gender ICUType Age=40,65,80, "
        "by value, by range of the edges given, or by ranges of equal mass.",
    )  # fmt: skip
    meds_predictions: bool = option(
        False, "Write predictions in the schema of MEDS too, into predictions_meds; a threshold is chosen on the "
        "validation split.",
    )  # fmt: skip
    patients: tuple[str, ...] = option(
        (), "With --evaluate: a page about each of these patients of the split, by id: answers over time, effects of "
        "variables, sets and their latents.",
    )  # fmt: skip
    recalibrate: bool = option(
        True, "With --evaluate: recalibrate probabilities as cross-fitting found it, where the checkpoint is of one."
    )
    export_latents: bool = option(False, "With --evaluate: write mu and logvar of each set, with patient and minute.")
    export: str | None = option(
        None, "Write the trained model, best.pt of --output_dir or that of --evaluate, to this folder with all that "
        "predicting for new patients needs, and do not train.", metavar="DIR",
    )  # fmt: skip
    inspect: bool = option(False, "Show batches of 1, 2, 4 and 8 patients and a forward pass of each; do not train.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.subgroups:
            try:
                Grouping.parse(text)
            except ValueError as error:
                raise UserError(f"--subgroups {error}") from None


@dataclass(frozen=True, kw_only=True)
class CrossFitOptions(Section):
    """Cross-fitting."""

    folds: int = option(
        0, "Number of folds into which the patients of train and valid are dealt: for each a model learns from the "
        "others and predicts it, which decides the number of epochs and the recalibration of the final models; 0 = no "
        "folds.", minimum=0,
    )  # fmt: skip
    repeats: int = option(1, "Number of times that patients are dealt into --folds.", minimum=1)
    final_seeds: int = option(
        1, "Number of final models, of other seeds, whose predictions are averaged. With --folds, or where there are "
        "several, they learn from all patients of train and valid.", minimum=1,
    )  # fmt: skip
    parallel_models: int = option(
        1, "Number of these models that are trained at the same time, each by a process of its own: with GPUs each on "
        "one, in turn, without on its share of the cores.", minimum=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds == 1:
            raise UserError("--folds 1: a model would have nobody to learn from; give 2 or more, or 0 for none")
        if self.parallel_models > 1 and not self.is_on:
            raise UserError("--parallel_models is for the models of --folds and --final_seeds; leave it out")

    @property
    def is_on(self) -> bool:
        return self.folds > 0 or self.final_seeds > 1


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Every option of ``train.py``, resolved; ``config.yaml`` of a run holds them, and ``--config`` reads them back."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    cross_fit: CrossFitOptions = field(default_factory=CrossFitOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    @property
    def task(self) -> str | None:
        """Return the names of the tasks whose samples are used; None = whole patients."""
        return self.data.task or (DEFAULT_TASK if self.loss.learns_outcome else None)

    def __post_init__(self) -> None:
        if not self.data.data_dir:
            raise UserError("--data_dir is missing: name the data set that preprocess.py made")
        evaluation = self.evaluation
        if not (self.run.output_dir or evaluation.inspect or (evaluation.export and evaluation.evaluate)):
            raise UserError("--output_dir is missing: name a directory for the run's files")
        devices, batch_size = self.run.devices, self.data.batch_size
        if batch_size != "auto" and devices > batch_size:
            raise UserError(f"--devices {devices} is more than --batch_size {batch_size}: some would get nothing")
        if self.optimisation.freeze and (self.optimisation.init_from is None or not self.loss.learns_outcome):
            needed = "name a checkpoint with --init_from, and another --objective"
            raise UserError(f"--freeze trains the head alone: {needed}")
        if self.cross_fit.folds and not self.loss.learns_outcome:
            raise UserError("--folds judges by what is predicted, and --objective pretrain predicts nothing; leave one")
        if self.data.share_windows and self.loss.prefix_weight:
            raise UserError("--share_windows answers at the prediction times of samples; leave --prefix_weight")
        if self.data.sampling == "balanced" and self.loss.class_weights == "balanced":
            raise UserError("--sampling balanced and --class_weights balanced would balance classes twice; leave one")
        if isinstance(self.data.data_dir, tuple) and self.evaluation.meds_predictions:
            raise UserError(
                "--meds_predictions is for one --data_dir, whose patients are called as they were; name one"
            )
        if self.cross_fit.parallel_models > 1 and devices > 1:
            raise UserError("--parallel_models trains each model in one process; leave --devices")
        if self.cross_fit.is_on and (self.run.validate_steps or self.run.validate_patients):
            raise UserError("--folds validates whole epochs; leave --validate_steps and --validate_patients")
        if self.cross_fit.is_on and self.evaluation.meds_predictions:
            raise UserError("--meds_predictions is for one model; with --folds give it to --evaluate afterwards")


def parse_train_options(arguments: Sequence[str] | None) -> TrainOptions:
    """Return the options of a command line; raise UserError where a flag is unknown or has a bad value."""
    return parse_options(TrainOptions, arguments, prog="train.py", description="Train SeqSetVAE, or evaluate it.")


class AtResume(Enum):
    """What ``--resume`` makes of an option that differs from the run's.

    ``SAME``: it is refused by name.  ``OBEYED``: it holds from here on.  ``IRRELEVANT``: it changes no result.
    """

    SAME = "same needed"
    OBEYED = "may change"
    IRRELEVANT = "no matter"


_FLAGS = {
    AtResume.SAME: (
        "task", "batch_size", "max_memory", "max_events", "max_sequence_length", "truncate", "share_windows",
        "bucketing", "bucket_width", "group_events", "seed", "preset", "event_form", "objective", "precision", "folds",
        "repeats", "without", "tree_share", "distill", "sampling", "data_weights",
    ),
    AtResume.OBEYED: (
        "data_dir", "sampling_weights", "on_bad_shard", "use_dynamic_padding", "event_dropout", "dropout",
        "gradient_checkpointing", "freeze", "max_epochs", "stop_after", "final_seeds", "learning_rate", "weight_decay",
        "warmup_steps", "ema_decay", "gradient_clip", "vae_weight", "outcome_weight", "task_weights", "prefix_weight",
        "pos_weight", "class_weights", "beta", "beta_warmup_steps", "beta_schedule", "free_bits", "devices", "device",
        "threads", "checkpoint_steps", "validate_steps", "validate_patients", "keep_best", "monitor", "patience",
        "collapse_steps", "min_active_units", "stop_on_collapse", "log_steps", "profile_memory", "profile", "track",
        "verbose", "cuda_graphs",
    ),
    AtResume.IRRELEVANT: (
        "cache_dir", "cache_bytes", "fetch_ahead", "prefetch", "prefetch_workers", "init_from", "output_dir", "resume",
        "evaluate", "evaluate_split", "baselines", "meds_predictions", "export_latents", "export", "inspect",
        "recalibrate", "subgroups", "patients", "parallel_models",
    ),
}  # fmt: skip
AT_RESUME = {name: what for what, names in _FLAGS.items() for name in names}
"""What may change at ``--resume``, by flag.  Data are compared by their checksums, not by their folder."""


def check_resume(saved: Mapping[str, Mapping[str, Any]], options: TrainOptions, path: Path) -> None:
    """Raise UserError, naming the flag with both values, where an option differs that a resumed run cannot change.

    ``saved`` has the options of the run by section and field, from the checkpoint at ``path``.
    """
    for section, values in to_dict(options).items():
        for name, value in values.items():
            before = saved[section][name]
            if AT_RESUME[name] is AtResume.SAME and value != before:
                advice = f"resume with --{name} {before} or start a new --output_dir"
                raise UserError(
                    f"--{name} {value} cannot be combined with a run saved with --{name} {before} ({path}); {advice}"
                )


OF_A_MACHINE = {"data_dir", "cache_dir", "cache_bytes", "fetch_ahead", "output_dir", "threads"}
"""Options that machines of one run may give in their own way.  What lies in the folders is compared."""


def check_same_options(options: TrainOptions, world: World) -> None:
    """Raise UserError, on all ranks and naming the flag with both values, where ranks were started with other ones."""
    sections = to_dict(options).values()
    mine = {name: value for section in sections for name, value in section.items() if name not in OF_A_MACHINE}
    first, *others = world.gather(mine)
    for rank, other in enumerate(others, start=1):
        for name in (name for name in first if other[name] != first[name]):
            found = f"{other[name]} on rank {rank}, {first[name]} on rank 0"
            raise UserError(f"--{name} differs: {found}; start all machines with the same flags")
