"""What a training run can be told: one field a flag, its default and its help in one place."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.config import EventForm, Preset
from model.losses import BetaSchedule, LossOptions, Objective
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.sampling.policy import BUCKET_WIDTH
from pipeline.schema import UserError
from pipeline.storage.cache import CACHE_BYTES, parse_bytes

Precision = Literal["fp32", "bf16", "fp16"]
Monitor = Literal["auroc", "auprc", "loss"]

LEAST_STEPS = 50
"""Steps an epoch that ``--batch_size auto`` leaves: fewer would train another model, not the same one faster."""


DEFAULT_BATCH_SIZE = 16


def _flag(default: Any, text: str, *, least: float | None = None, most: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Every flag of ``train.py``; ``config.yaml`` of a run holds them resolved."""

    data_dir: str = _flag("", "data set made by preprocess.py: a folder, or a URL such as s3://bucket/prefix")
    output_dir: str = _flag("", "where the run's files go")
    cache_dir: str | None = _flag(
        None,
        "where files of a URL are kept: a new folder, or an older cache; left out, one in the user's cache directory",
    )
    cache_bytes: str = _flag(CACHE_BYTES, "the most of them, such as 8GB; the longest unused are removed")
    on_bad_shard: Literal["fail", "quarantine"] = _flag(
        "fail", "where a shard is missing or damaged: stop; or check all before, and leave out the patients of bad ones"
    )
    # batches
    batch_size: int | Literal["auto"] = _flag(
        DEFAULT_BATCH_SIZE,
        "patients of a global batch, over all devices; auto = the largest power of two that fits the memory and leaves "
        f"at least {LEAST_STEPS} steps an epoch",
        least=1,
    )
    max_memory: str | None = _flag(
        None,
        "the most that each process may hold of its device's memory, such as 8GB: the memory of a step is measured and "
        "batches are planned that fit; a batch that does not is taken in parts, with the same result",
    )
    max_events: int | None = _flag(None, "most events of a global batch, whatever its number of patients", least=1)
    max_sequence_length: int | None = _flag(None, "events kept of a patient, the earliest", least=1)
    bucketing: bool = _flag(True, "batch patients of like length")
    bucket_width: float = _flag(
        BUCKET_WIDTH, "how far apart in length they may be, in batches: less pads less, more mixes more", least=0
    )
    use_dynamic_padding: bool | None = _flag(
        None,
        "pad each batch to its longest patient, or (--no-…) all to one size; left out, batches stay ragged and nothing "
        "is padded. The model's results are the same",
    )
    group_events: int = _flag(
        GROUP_EVENTS,
        "a split of more events is read, and mixed, in groups of about so many; two are in memory",
        least=1,
    )
    prefetch: int = _flag(4, "batches made ahead of the step; 0 = none", least=0)
    # model
    preset: Preset = _flag("small", "widths of the model")
    event_form: EventForm = _flag("additive", "how an event joins variable and value")
    dropout: float = _flag(0.2, "of transformer and head", least=0, most=0.99)
    event_dropout: float = _flag(
        0.3, "share of a patient's events left out of a training step, another at each", least=0, most=0.5
    )
    # optimisation
    objective: Objective = _flag(
        "joint", "what is learned: sets alone (pretrain, needs no labels), the outcome alone (supervised), or both"
    )
    init_from: str | None = _flag(None, "begin with the weights of this checkpoint")
    freeze: bool = _flag(False, "train the outcome head alone; the rest stays as --init_from gives it")
    max_epochs: int = _flag(8, "epochs", least=1)
    learning_rate: float = _flag(1e-3, "of AdamW, at its highest", least=0)
    weight_decay: float = _flag(0.1, "of AdamW, on matrices", least=0)
    warmup_steps: int = _flag(50, "steps over which the learning rate rises; a cosine takes it down after", least=0)
    weight_averaging: float = _flag(
        0.99,
        "decay a step of the averaged weights, which are validated and kept; 0 = the last step's",
        least=0,
        most=0.9999,
    )
    gradient_clip: float = _flag(1.0, "largest norm of the gradient", least=0)
    beta: float = _flag(0.1, "weight of the KL divergence after warm-up", least=0)
    beta_warmup_steps: int = _flag(5000, "steps over which it rises from 0", least=0)
    beta_schedule: BetaSchedule = _flag(
        "linear", "whether it rises once, or (cyclical) again after as many steps at its height"
    )
    free_bits: float = _flag(0.1, "nats a dimension may diverge at no cost", least=0)
    vae_weight: float = _flag(0.3, "of reconstruction + beta × KL divergence in the loss", least=0)
    classification_weight: float = _flag(1.0, "of the outcome's cross-entropy in the loss", least=0)
    positive_weight: float = _flag(
        1.0, "of patients with the outcome in the cross-entropy; other than 1 it shifts probabilities", least=0
    )
    seed: int = _flag(0, "of weights, noise and the order of patients", least=0)
    # running
    devices: int = _flag(1, "processes, one a GPU or a share of the CPU's cores", least=1)
    device: Literal["auto", "cpu", "cuda"] = _flag("auto", "where to compute")
    precision: Precision = _flag("fp32", "of matrix products; losses, softmax sums and the posterior stay in float32")
    gradient_checkpointing: bool = _flag(False, "compute activations again rather than keep them")
    compile: bool = _flag(
        False,
        "compile what follows each attention, where all is dense; some 10 graphs at most, counted in summary.json",
    )
    resume: bool = _flag(False, "go on from checkpoints/last.pt of --output_dir, where there is one")
    checkpoint_steps: int = _flag(0, "save last.pt every so many steps too; 0 = at the end of epochs", least=0)
    monitor: Monitor = _flag("auroc", "what decides the best checkpoint, on the validation split")
    patience: int = _flag(0, "epochs without a better one before stopping early; 0 = never", least=0)
    least_active_units: float = _flag(
        0.02, "share of active units below which the posterior counts as collapsed", least=0, most=1
    )
    stop_on_collapse: bool = _flag(False, "end the run when it does")
    log_steps: int = _flag(10, "steps between lines of metrics.jsonl", least=1)
    profile_memory: bool = _flag(False, "sample the memory of all processes into memory.csv")
    profile: bool = _flag(False, "record a few steps into trace.json.gz, and show where their time goes")
    verbose: bool = _flag(False, "say more")
    # other jobs
    evaluate: str | None = _flag(None, "no training: evaluate this checkpoint")
    evaluate_split: Literal["train", "valid", "test"] = _flag("test", "the split that is evaluated")
    baselines: bool = _flag(
        False, "with --evaluate: beside it, trees and logistic regression on summaries of each variable, same splits"
    )
    export_latents: bool = _flag(False, "with --evaluate: write mu and logvar of each set, with patient and minute")
    inspect: bool = _flag(False, "no training: show batches of 1, 2, 4 and 8 patients and a forward pass of each")

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise UserError("--data_dir is missing: name the data set that preprocess.py made")
        if not self.output_dir and not self.inspect:
            raise UserError("--output_dir is missing: name a directory for the run's files")
        parse_bytes(self.cache_bytes)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
        for option in dataclasses.fields(self):
            value, least, most = getattr(self, option.name), option.metadata["least"], option.metadata["most"]
            if value is None or isinstance(value, str):
                continue
            too_little = least is not None and not value >= least
            too_much = most is not None and not value <= most
            if too_little or too_much:
                bound = f"at least {least}" if most is None else f"from {least} to {most}"
                raise UserError(f"--{option.name} must be {bound}, not {value}")
        if self.batch_size != "auto" and self.devices > self.batch_size:
            raise UserError(
                f"--devices {self.devices} is more than --batch_size {self.batch_size}: some would get nothing"
            )
        if self.freeze and (self.init_from is None or self.objective == "pretrain"):
            raise UserError(
                "--freeze trains the head alone: name a checkpoint with --init_from, and another --objective"
            )

    def loss_options(self) -> LossOptions:
        """Return the section of the loss."""
        names = {field.name: field.name for field in dataclasses.fields(LossOptions)} | {
            "pos_weight": "positive_weight"
        }
        return LossOptions(**{name: getattr(self, flag) for name, flag in names.items()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def _number_or(*words: str) -> Callable[[str], int | str]:
    def number(text: str) -> int | str:
        return text if text in words else int(text)

    return number


def parse_options(arguments: list[str] | None) -> TrainOptions:
    """Options from a command line.

    Raises:
        UserError: a flag is unknown, of the wrong type or out of range.
    """
    parser = _Parser(prog="train.py", description="Train SeqSetVAE, or evaluate it.", allow_abbrev=False)
    hints = get_type_hints(TrainOptions)
    for option in dataclasses.fields(TrainOptions):
        kind, text = (
            hints[option.name],
            option.metadata["help"] + ("" if option.default in (None, "") else f" (default: {option.default})"),
        )
        members = [member for member in get_args(kind) if member is not type(None)]
        flag = f"--{option.name}"
        if get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), default=option.default, help=text)
        elif kind is bool or members == [bool]:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        else:
            words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
            of = _number_or(*words) if words else members[0] if members else kind
            parser.add_argument(flag, type=of, default=option.default, help=text)
    return TrainOptions(**vars(parser.parse_args(arguments)))
