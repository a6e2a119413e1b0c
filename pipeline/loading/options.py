"""The options of a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.options import option
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.sampling.policy import BucketOptions, Policy

FETCH_AHEAD = 4
"""Shards fetched ahead of need: enough to hide latency, and few requests of 16 MB that are in memory at once."""

Truncate = Literal["earliest", "latest", "random"]
Sampling = Literal["natural", "balanced", "weights"]


@dataclass(frozen=True, kw_only=True)
class BatchOptions(BucketOptions):
    """The flags of batches that ``train.py`` shares."""

    max_sequence_length: int | None = option(None, "Maximum number of events kept of each patient.", minimum=1)
    truncate: Truncate | None = option(
        None,
        "Which events of a patient longer than --max_sequence_length are kept. Default: the latest before a prediction "
        "time, the earliest where there is none.",
    )
    share_windows: bool = option(
        False,
        "Batch the samples of a patient together and make what they have in common once: encoder and transformer run "
        "for the longest, the outcome head for each. Batches are then counted in patients, not in samples.",
    )
    sampling: Sampling = option(
        "natural",
        "How often an epoch of training uses each sample: natural = once, balanced = so that all classes of the task "
        "are equally frequent, weights = in proportion to --sampling_weights. Epochs stay as long.",
    )
    sampling_weights: str | None = option(
        None,
        "CSV or Parquet file of weights for --sampling weights: columns patient_id and weight, and prediction_time or "
        "prediction_minute where the samples of a patient differ.",
        metavar="FILE",
    )
    data_weights: tuple[float, ...] = option(
        (),
        "Where several data sets are one, the proportions in which an epoch of training draws from them, one each. By "
        "default samples of all are used alike.",
        above=0,
    )
    fetch_ahead: int = option(
        FETCH_AHEAD,
        "Number of shards of a URL that are fetched, or wait in the cache, ahead of the one being read; 0 = none.",
        minimum=0,
    )
    group_events: int = option(
        GROUP_EVENTS,
        "Number of events of a split that are read and mixed together; two such groups are in memory.",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(BatchOptions, Policy):
    """Batches and how they are loaded; ``verify`` compares checksums of index and shards with the manifest's."""

    seed: int = option(0, "Random seed of batch order and truncation.", minimum=0)
    prefetch: int = option(2, "Number of batches that a thread prepares in advance; 0 = no thread.", minimum=0)
    verify: bool = True
