"""The shape of the model, which a checkpoint carries along, and the options that choose it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from pipeline.options import check_section, from_dict, option
from pipeline.schema import Kind, UserError

EventForm = Literal["additive", "product"]
Preset = Literal["reference", "small"]
Part = Literal["nothing", "summary_features", "contexts"]

SMALLEST_PROBABILITY = 1e-12
"""Stands for 0 in a logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Model"""

    preset: Preset = option("small", "Widths of the model.")
    event_form: EventForm = option("additive", "How an event combines its variable and its value.")
    dropout: float = option(
        0.2, "Dropout probability in the transformer and the outcome head.", minimum=0, maximum=0.99
    )
    without: Part = option(
        "nothing", "What the outcome head is denied, to see what it brings: the summary features of variables, or the "
        "contexts that the transformer gives to sets.",
    )  # fmt: skip
    tree_share: float | Literal["auto"] = option(
        "auto",
        "Share of boosted trees on the summary features in the logit of a binary outcome, beside the ensemble heads. "
        "0 = none; auto = 0.25 where one binary task has 500 to 50,000 labelled training samples, else 0.",
        minimum=0,
        maximum=1,
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass instead of storing them.")

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a head of the model predicts: the labels of a task.

    Attributes:
        name: of the task.
        kind: what its labels are.
        classes: names of the classes in order; empty for a regression.
        prior: share of each class in training, or of a regression the mean; the answer for a patient of whom nothing
            is known.  Empty = not known.
        std: standard deviation of a regression's labels in training.
        calibration: of classes the slope of the recalibration and then an intercept for each, see :meth:`recalibrate`;
            empty = none.
        conformal: of classes, for each rate of misses the rate and the least probability of each class in a conformal
            set, see :func:`training.calibration.fit_conformal`; empty = not fitted.
    """

    name: str = "default"
    kind: Kind = "binary"
    classes: tuple[str, ...] = ("0", "1")
    prior: tuple[float, ...] = ()
    std: float = 1.0
    calibration: tuple[float, ...] = ()
    conformal: tuple[tuple[float, ...], ...] = ()

    @property
    def num_outputs(self) -> int:
        """Return the number of logits of a patient; of a regression 1."""
        return max(len(self.classes), 1)

    @property
    def mean(self) -> float:
        """Return the mean of a regression's labels in training, by which its target is standardised."""
        return self.prior[0] if self.prior else 0.0

    def predict(self, logits_BKC: Tensor) -> Tensor:
        """Return [B, C] float32 from the logits of K ensemble heads: the mean probability of each class, or the number
        that a regression predicts, in the units of its labels.

        Probabilities are recalibrated, where a recalibration was fitted.
        """
        if self.kind == "regression":
            return self.mean + self.std * logits_BKC.float().mean(1)
        return self.recalibrate(logits_BKC.float().softmax(2).mean(1))

    def recalibrate(self, probability_BC: Tensor) -> Tensor:
        """Return the softmax of slope · log p + intercepts of classes' probabilities p, which of two classes is
        logistic recalibration (Cox 1958).
        """
        if not self.calibration:
            return probability_BC
        slope, *intercepts = self.calibration
        log_BC = probability_BC.clamp_min(SMALLEST_PROBABILITY).log()
        return (slope * log_BC + log_BC.new_tensor(intercepts)).softmax(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqSetVAEConfig:
    r"""Widths, depths and forms of a SeqSetVAE; the defaults are the reference preset.

    Attributes:
        num_codes: number of rows of the vocabulary, padding and unknown included.
        embedding_dim: width of the embedding e_c of a code, given or learned.
        frozen_embeddings: whether the embeddings are given and not trained.
        event_form: how an event combines variable and value, see :class:`model.events.EventEncoder`.
        width: width of an event, of the latent of a set and of the sequence.
        heads: number of attention heads in every attention block.
        levels: number of levels of the set encoder and of the set decoder.
        inducing_points: number of learned queries of an ISAB.
        set_feed_forward: hidden width of the feed-forward of a MAB.
        layers: number of layers of the causal transformer over sets.
        feed_forward: hidden width of the feed-forward of a transformer layer.
        variable_axis: whether the outcome head pools events per variable as well as per set.
        without: what the outcome head is denied.
        ensemble_heads: number of ensemble heads, whose mean probability predicts.
        tree_share: share of boosted trees in the logit of the one, binary outcome; 0 = there are none.
        outcomes: what is predicted; each has an ensemble of its own over what all share.
        dropout: dropout probability in the transformer and the outcome head.
        max_logvar: bound of \|logvar\| of the posterior.
    """

    num_codes: int
    embedding_dim: int = 768
    frozen_embeddings: bool = False
    event_form: EventForm = "additive"
    width: int = 256
    heads: int = 2
    levels: int = 2
    inducing_points: int = 16
    set_feed_forward: int = 512
    layers: int = 2
    feed_forward: int = 256
    variable_axis: bool = True
    without: Part = "nothing"
    ensemble_heads: int = 8
    tree_share: float = 0.0
    outcomes: tuple[Outcome, ...] = (Outcome(),)
    dropout: float = 0.1
    max_logvar: float = 10.0

    def __post_init__(self) -> None:
        minimum = {"num_codes": 2, "layers": 0}  # padding and unknown are codes
        minimum |= dict.fromkeys(("embedding_dim", "width", "heads", "levels", "inducing_points"), 1)
        minimum |= dict.fromkeys(("set_feed_forward", "feed_forward", "ensemble_heads"), 1)
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise UserError(f"model configuration: {name} must be at least {least}, not {getattr(self, name)}")
        if self.width % (2 * self.heads):
            multiple = f"a multiple of 2 × heads ({2 * self.heads})"
            raise UserError(f"model configuration: width {self.width} must be {multiple}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model configuration: dropout must be in [0, 1), not {self.dropout}")
        if not 0.0 <= self.tree_share <= 1.0:
            raise UserError(f"model configuration: tree_share must be in [0, 1], not {self.tree_share}")
        if self.tree_share and not (self.summary_features and [each.kind for each in self.outcomes] == ["binary"]):
            raise UserError("model configuration: tree_share needs summary features and one binary outcome")
        if self.max_logvar <= 0:
            raise UserError(f"model configuration: max_logvar must be positive, not {self.max_logvar}")
        for name, words in {"event_form": get_args(EventForm), "without": get_args(Part)}.items():
            if getattr(self, name) not in words:
                raise UserError(f"model configuration: {name} must be one of {words}, not {getattr(self, name)!r}")

    @property
    def summary_features(self) -> bool:
        """Return whether the outcome head is given the summary features of variables."""
        return self.variable_axis and self.without != "summary_features"

    @classmethod
    def preset(cls, name: Preset, *, num_codes: int, **changes: Any) -> SeqSetVAEConfig:
        """Return a preset: ``reference`` has the widths of the paper; ``small`` trains on two CPU cores in minutes."""
        shapes: dict[str, dict[str, int]] = {"reference": {}, "small": {"embedding_dim": 64, "width": 64}}
        shapes["small"] |= {"inducing_points": 4, "set_feed_forward": 128, "feed_forward": 128}
        if name not in shapes:
            raise UserError(f"preset must be one of {tuple(shapes)}, not {name!r}")
        return replace(cls(num_codes=num_codes), **{**shapes[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SeqSetVAEConfig:
        """Return the configuration of :meth:`to_dict`, also by way of JSON; TypeError where ``values`` are none."""
        return cls(**{**values, "outcomes": tuple(from_dict(Outcome, outcome) for outcome in values["outcomes"])})
