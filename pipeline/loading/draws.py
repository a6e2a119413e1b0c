"""What epochs draw from a split where samples are not used once each (``--sampling``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.arrays import Floats, Ints, harden, is_labelled, offsets_from_sizes
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.samples import Samples, cut_shards
from pipeline.dataset.tasks import Task, common_times
from pipeline.dataset.weights import SampleWeights
from pipeline.loading.options import LoaderOptions
from pipeline.sampling.draws import Draws, mix_quotas
from pipeline.schema import UserError
from pipeline.storage.folder import Folder


class SampleDraws:
    """Which samples of a split an epoch uses, and how often.

    All labels of the split, and weights, are read once, some shards at a time; no shard is.

    Attributes:
        weights: the table of weights; None = there is none.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        tasks: tuple[Task, ...],
        options: LoaderOptions,
        entries: Sequence[ShardEntry],
        num_samples: Ints,
        read: Callable[[tuple[int, ...]], Samples],
    ) -> None:
        """Look at the samples of the shards ``entries``, ``num_samples`` [n] each, which ``read`` returns."""
        self._entries, self._num_samples, self._read, self._tasks = entries, num_samples, read, tasks
        self._data_set, self.weights = data_sets_of(entries), None
        self._classes = len(tasks[0].classes) if options.sampling == "balanced" else 0
        self._weighs_data, shares = bool(options.data_weights), np.array(options.data_weights or [1.0])
        if options.sampling == "weights":
            path = Path(options.sampling_weights or "")
            self.weights = SampleWeights(path, folder, manifest, common_times(tasks))
        counts, sums = np.zeros((2, len(entries), len(shares) * (self._classes + 1)))
        for shards, samples in self._walk():
            stratum, weight = self._describe(shards, samples)
            cell = np.repeat(np.array(shards, np.int64), num_samples[list(shards)]) * counts.shape[1] + stratum
            counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
            sums += np.bincount(cell, weight, counts.size).reshape(sums.shape)
        of_data = counts.sum(axis=0, dtype=np.int64).reshape(len(shares), -1)
        quotas = mix_quotas(of_data, shares, balanced=self._classes > 0).ravel()
        if (quotas[sums.sum(axis=0) == 0] > 0).any():
            raise UserError(f"--sampling_weights {options.sampling_weights}: all samples have weight 0; raise some")
        if self._weighs_data and not of_data.any(axis=1).all():
            raise UserError("--data_weights: a data set has no samples to draw; leave it out")
        self._draws = Draws(weights=sums, quotas=quotas, seed=options.seed)

    def _walk(self) -> Iterator[tuple[tuple[int, ...], Samples]]:
        """Yield all shards, some at a time, with their samples."""
        for bounds in cut_shards(self._num_samples):
            yield (shards := tuple(range(*bounds))), self._read(shards)

    def _describe(self, shards: tuple[int, ...], samples: Samples) -> tuple[Ints, Floats]:
        """Return stratum and weight [N] of the samples of some shards."""
        stratum, weight = np.zeros(len(samples.patient), np.int64), np.ones(len(samples.patient))
        if self._weighs_data:
            stratum += np.repeat(self._data_set[list(shards)], self._num_samples[list(shards)])
        if self._classes:
            label = harden(samples.label)
            own = np.where(is_labelled(label), np.nan_to_num(label), self._classes).astype(np.int64)
            stratum = stratum * (self._classes + 1) + own
        if self.weights is not None:
            weight = self.weights.of(samples, [self._entries[shard] for shard in shards])
        return stratum, weight

    def per_shard(self, epoch: int) -> Ints:
        """Return [n] int64, the number of samples that an epoch draws from each shard."""
        return self._draws.per_shard(epoch)

    def copies(self, shards: tuple[int, ...], samples: Samples, epoch: int) -> Ints:
        """Return [N] int64, how often an epoch uses each of the samples of some shards."""
        stratum, weight = self._describe(shards, samples)
        ends = offsets_from_sizes(self._num_samples[list(shards)])
        parts = zip(shards, pairwise(ends), strict=True)
        found = [self._draws.copies(shard, stratum[a:b], weight[a:b], epoch) for shard, (a, b) in parts]
        return np.concatenate([*found, np.zeros(0, np.int64)])

    def count(self, epoch: int) -> dict[str, int]:
        """Return how many samples an epoch draws: of each class of a task, of each data set, and different ones."""
        classes = self._tasks[0].classes if [task.kind != "regression" for task in self._tasks] == [True] else ()
        found = dict.fromkeys(("samples", "different_samples", *(f"class_{name}" for name in classes)), 0)
        for shards, samples in self._walk():
            copies, label = self.copies(shards, samples, epoch), harden(samples.label)
            found["samples"] += int(copies.sum())
            found["different_samples"] += int(np.count_nonzero(copies))
            for number, name in enumerate(classes):
                found[f"class_{name}"] += int(copies[label == number].sum())
        of_data = np.bincount(self._data_set, self.per_shard(epoch)).astype(np.int64).tolist()
        return found | {f"data_set_{number}": drawn for number, drawn in enumerate(of_data, 1) if len(of_data) > 1}


def data_sets_of(entries: Sequence[ShardEntry]) -> Ints:
    """Return [n] int64, the data set of each shard, from 0."""
    return np.array([int(entry.data_set[:-1] or 1) - 1 for entry in entries], np.int64)


def check_sampling(options: LoaderOptions, tasks: tuple[Task, ...], num_data_sets: int) -> None:
    """Raise UserError, naming flags, where samples cannot be drawn in this way."""
    if (options.sampling == "weights") != (options.sampling_weights is not None):
        raise UserError("--sampling weights and --sampling_weights FILE go together; give both, or none")
    flag = f"--sampling {options.sampling}"
    if options.sampling == "balanced" and [task.kind for task in tasks] not in (["binary"], ["multiclass"]):
        raise UserError(f"{flag} is for one task of classes; leave it out, or name one with --task")
    if options.data_weights and len(options.data_weights) != num_data_sets:
        given = f"{len(options.data_weights)} weights for {num_data_sets} data sets"
        raise UserError(f"--data_weights: {given}; give --data_dir several times, and a weight for each")
    if (options.sampling != "natural" or options.data_weights) and options.share_windows:
        flag = flag if options.sampling != "natural" else "--data_weights"
        raise UserError(f"{flag} draws sample by sample, --share_windows batches those of a patient; leave one")
