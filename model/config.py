"""The model's shape, in one frozen place that a checkpoint carries along."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from pipeline.schema import UserError

EventForm = Literal["additive", "product"]
Preset = Literal["reference", "small"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqSetVAEConfig:
    r"""Widths, depths and forms of a SeqSetVAE; defaults are the reference preset.

    Attributes:
        num_codes: rows of the vocabulary, padding and unknown included.
        embedding_dim: width of a code's embedding e_c, given or learned.
        frozen_embeddings: whether the embeddings are given (and not trained) rather than learned.
        event_form: how an event joins variable and value, see :class:`model.events.EventEncoder`.
        width: width of an event, a set's latent and the sequence.
        heads: attention heads, everywhere.
        levels: levels of the set encoder and of the set decoder.
        inducing_points: learned queries of an ISAB.
        set_feed_forward: hidden width of the feed-forward of a MAB.
        layers: layers of the causal transformer over sets.
        feed_forward: hidden width of their feed-forward.
        variable_axis: whether the head sees each variable across time beside each set in time.
        members: ends of the outcome head, whose mean predicts.
        dropout: probability, in the transformer and the outcome head.
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
    members: int = 8
    dropout: float = 0.1
    max_logvar: float = 10.0

    def __post_init__(self) -> None:
        for name in (
            "embedding_dim",
            "width",
            "heads",
            "levels",
            "inducing_points",
            "set_feed_forward",
            "feed_forward",
            "members",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model configuration: {name} must be at least 1, not {getattr(self, name)}")
        if self.num_codes < 2:
            raise UserError(
                f"model configuration: num_codes must count padding and unknown, so 2 or more, not {self.num_codes}"
            )
        if self.layers < 0:
            raise UserError(f"model configuration: layers must be at least 0, not {self.layers}")
        if self.width % (2 * self.heads):
            raise UserError(
                f"model configuration: width {self.width} must be a multiple of 2 × heads ({2 * self.heads})"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model configuration: dropout must be in [0, 1), not {self.dropout}")
        if self.max_logvar <= 0:
            raise UserError(f"model configuration: max_logvar must be positive, not {self.max_logvar}")
        if self.event_form not in get_args(EventForm):
            raise UserError(
                f"model configuration: event_form must be one of {get_args(EventForm)}, not {self.event_form!r}"
            )

    @classmethod
    def preset(cls, name: Preset, *, num_codes: int, **changes: Any) -> SeqSetVAEConfig:
        """``reference`` is the widths of the paper's setting; ``small`` trains on two CPU cores in minutes."""
        shapes: dict[str, dict[str, int]] = {
            "reference": {},
            "small": {
                "embedding_dim": 64,
                "width": 64,
                "inducing_points": 4,
                "set_feed_forward": 128,
                "feed_forward": 128,
            },
        }
        if name not in shapes:
            raise UserError(f"preset must be one of {tuple(shapes)}, not {name!r}")
        return replace(cls(num_codes=num_codes), **{**shapes[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
