"""Patients in memory, of a split or of a group of its shards, and batches gathered from them.

A batch is gathered with a fixed number of array operations, whatever its size: index arithmetic on offsets, no loop
over patients, sets or events.  A patient is in memory once, however many samples it has.  P patients have N samples, of
which M are gathered in K batches at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import from_numpy

from pipeline.arrays import Ints, concatenate_ranges, offsets_from_sizes
from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.samples import Samples
from pipeline.dataset.shards import read_shard
from pipeline.loading.batch import PatientBatch
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import GlobalBatch
from pipeline.loading.samples import BatchSamples, PredictionTime, sample_keys
from pipeline.schema import UserError
from pipeline.storage.folder import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The events of each sample [N] that an epoch uses: a run of its patient's."""

    samples: Samples
    is_static: npt.NDArray[np.bool_] | None  # whether a sample has the static set alone; None = none has
    event_start: Ints  # the first event, counted over all P patients
    num_events: Ints  # at least 1
    set_start: Ints  # the set of the first event, counted over all P patients
    num_sets: Ints  # the first and the last set may be cut


class PatientStore:
    """All patients of some shards as flat arrays, one shard after another.

    Attributes as in :class:`pipeline.dataset.shards.FlatPatients`; ``patient_id`` holds Python's strings.
    """

    def __init__(
        self,
        directory: Path | Folder,
        entries: Sequence[ShardEntry],
        *,
        verify: bool = True,
        excluded_codes: Sequence[int] = (),
    ) -> None:
        """Read the shards ``entries``, of which there may be none; ``verify`` compares their checksums too.

        Events of ``excluded_codes`` are left out, and so are sets that have no others; a patient may then have none.

        Raises:
            UserError: a shard is missing, damaged or unlike the manifest, or there is too little memory.
        """
        sizes = ("num_patients", "num_sets", "num_events")
        num_patients, num_sets, num_events = (sum(getattr(entry, size) for entry in entries) for size in sizes)
        try:  # memory is only used as shards fill it, which keep to the manifest's claim
            self.patient_id, self.has_static = np.empty(num_patients, object), np.empty(num_patients, np.bool_)
            patient_offsets, self.set_offsets = np.zeros(num_patients + 1, np.int64), np.zeros(num_sets + 1, np.int64)
            self.minute, self.code = np.empty(num_sets, np.float32), np.empty(num_events, np.int32)
            self.value, self.has_value = np.empty(num_events, np.float32), np.empty(num_events, np.bool_)
        except (MemoryError, ValueError):
            problem = f"{num_events:,} events do not fit into memory"
            raise UserError(f"{directory}: {problem}; lower --group_events, or repair the manifest") from None

        patient = set_ = event = 0
        for entry in entries:  # one after another into place: the peak of memory is all shards and one more
            shard = read_shard(directory, entry, verify=verify)
            patients = slice(patient, patient := patient + entry.num_patients)
            sets = slice(set_, set_ := set_ + entry.num_sets)
            events = slice(event, event := event + entry.num_events)
            self.minute[sets], self.code[events] = shard.minute, shard.code
            self.value[events], self.has_value[events] = shard.value, shard.has_value
            self.patient_id[patients] = shard.patient_id.to_numpy(zero_copy_only=False)
            self.has_static[patients] = shard.has_static
            patient_offsets[patients.start + 1 : patients.stop + 1] = shard.patient_offsets[1:] + sets.start
            self.set_offsets[sets.start + 1 : sets.stop + 1] = shard.set_offsets[1:] + events.start
        if len(excluded_codes):
            patient_offsets = self._exclude(np.array(excluded_codes), patient_offsets)
        self._patient_offsets, self._event_offsets = patient_offsets, self.set_offsets[patient_offsets]

    def _exclude(self, codes: Ints, patient_offsets: Ints) -> Ints:
        """Leave out events of ``codes`` and return the offsets [P+1] of patients into the sets that remain."""
        keep = ~np.isin(self.code, codes)
        self.code, self.value, self.has_value = self.code[keep], self.value[keep], self.has_value[keep]
        starts = offsets_from_sizes(keep)[self.set_offsets]
        is_left = np.diff(starts) > 0
        kept_before = offsets_from_sizes(is_left)
        first = patient_offsets[:-1]
        self.has_static &= np.append(is_left, False)[first]
        self.set_offsets = np.append(starts[:-1][is_left], starts[-1])
        self.minute, offsets = self.minute[is_left], kept_before[patient_offsets]
        static = offsets[:-1][self.has_static]
        is_alone = static + 1 == offsets[1:][self.has_static]
        following = self.minute[np.minimum(static + 1, max(len(self.minute) - 1, 0))]
        self.minute[static] = np.where(is_alone, 0, following)
        return offsets

    @property
    def num_patients(self) -> int:
        return len(self.patient_id)

    def select_windows(self, samples: Samples, options: LoaderOptions, rng: np.random.Generator) -> Windows:
        """Return the events to use of each sample; a set may be cut.  ``rng`` draws the positions of random cuts.

        Raises:
            UserError: a sample's lengths are not those of its patient's first events.
        """
        patient, limit = samples.patient, options.max_sequence_length
        start, set_start = self._event_offsets[patient], self._patient_offsets[patient]
        left = self._event_offsets[patient + 1] - start - samples.num_events
        is_inside = left == 0 if samples.prediction_time is None else left >= 0
        # The sets of an event and of the one after it say where a window's last set ends.
        stop = np.searchsorted(self.set_offsets, start + samples.num_events, side="left")
        if not (is_inside & (stop - set_start == samples.num_sets)).all():
            raise UserError("index.parquet, or the task: contradicts the shards; run preprocess.py, or add it, again")
        is_static = (self.has_static[patient] & (samples.num_sets == 1)) if self.has_static.any() else None
        num_events, num_sets = samples.num_events, samples.num_sets
        if limit is not None and (num_events > limit).any():
            num_events = np.minimum(num_events, limit)
            skipped = samples.num_events - num_events
            if options.truncate == "earliest":
                skipped[:] = 0
            elif options.truncate == "random":
                skipped = rng.integers(skipped, endpoint=True)
            start = start + skipped
            set_start = np.searchsorted(self.set_offsets, start, side="right") - 1
            num_sets = np.searchsorted(self.set_offsets, start + num_events, side="left") - set_start
        lengths = {"num_events": num_events, "num_sets": num_sets}
        return Windows(samples=samples, is_static=is_static, event_start=start, set_start=set_start, **lengths)

    def gather_batches(self, windows: Windows, chosen: Ints, batch_offsets: Ints) -> list[PatientBatch]:
        """Return K batches, gathered at once; they are views of shared arrays.

        Batch ``k`` has the samples ``chosen[batch_offsets[k]:batch_offsets[k+1]]`` of all [M] that are ``chosen``.
        """
        sets, set_offsets, patient_offsets, event_offsets = self._gather_sets(windows, chosen)
        events = concatenate_ranges(windows.event_start[chosen], windows.num_events[chosen])
        # Every index is in range; mode="clip" says so, and saves the third of a gather that checking takes.
        code = self.code.take(events, mode="clip").astype(np.int64)
        value = self.value.take(events, mode="clip")
        has_value = self.has_value.take(events, mode="clip")
        minute = self.minute.take(sets, mode="clip")
        if (
            windows.is_static is not None
        ):  # a static set has the minute of the next one, but not of one that is not seen
            minute[patient_offsets[:-1][windows.is_static[chosen]]] = 0.0
        label, (patient_id, time) = windows.samples.label[chosen], self._describe_windows(windows, chosen)

        first_set, first_event = patient_offsets[batch_offsets].tolist(), event_offsets[batch_offsets].tolist()
        borders = zip(batch_offsets.tolist(), first_set, first_event, strict=True)
        return [
            PatientBatch.unchecked(
                code=from_numpy(code[e0:e1]),  # slicing tensors takes twice as long
                value=from_numpy(value[e0:e1]),
                has_value=from_numpy(has_value[e0:e1]),
                set_offsets=from_numpy(set_offsets[s0 : s1 + 1] - e0),
                minute=from_numpy(minute[s0:s1]),
                patient_offsets=from_numpy(patient_offsets[b0 : b1 + 1] - s0),
                label=from_numpy(label[b0:b1]),
                patient_id=patient_id[b0:b1],
                prediction_time=time and time[b0:b1],
                samples=_gather_samples(windows, chosen[b0:b1]),
            )
            for (b0, s0, e0), (b1, s1, e1) in pairwise(borders)
        ]

    def gather_global_batch(self, windows: Windows, chosen: Ints) -> GlobalBatch:
        """Return the lengths of the samples ``chosen`` [B] and of their sets."""
        set_size, keys = np.diff(self._gather_sets(windows, chosen)[1]), self._describe_windows(windows, chosen)
        return GlobalBatch(sample_key=sample_keys(*keys), num_sets=windows.num_sets[chosen], set_size=set_size)

    def _describe_windows(self, windows: Windows, chosen: Ints) -> tuple[list[str], list[PredictionTime] | None]:
        """Return the ids and the prediction times of the samples ``chosen``, as a batch has them."""
        patient_id = self.patient_id[windows.samples.patient[chosen]].tolist()
        return patient_id, _list_times(windows.samples.prediction_time, chosen)

    def _gather_sets(self, windows: Windows, chosen: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return which sets [S] the samples ``chosen`` [M] have, and the offsets of their sets [S+1], of samples into
        sets [M+1] and of samples into events [M+1].
        """
        event_start, num_sets = windows.event_start[chosen], windows.num_sets[chosen]
        sets = concatenate_ranges(windows.set_start[chosen], num_sets)
        patient_offsets = offsets_from_sizes(num_sets)
        event_offsets = offsets_from_sizes(windows.num_events[chosen])
        set_offsets = np.empty(len(sets) + 1, np.int64)
        np.take(self.set_offsets, sets, mode="clip", out=set_offsets[:-1])
        set_offsets[:-1] -= np.repeat(event_start - event_offsets[:-1], num_sets)
        set_offsets[patient_offsets] = event_offsets  # a cut first set begins, and a cut last set ends, with its window
        return sets, set_offsets, patient_offsets, event_offsets


def _gather_samples(windows: Windows, chosen: Ints) -> BatchSamples | None:
    """Return the samples of some windows; None = each window is a sample."""
    if (shared := windows.samples.shared) is None:
        return None
    samples, position = shared.of_windows(chosen)
    num_sets = np.minimum(shared.num_sets[samples], windows.num_sets[chosen][position])
    return BatchSamples(
        patient=from_numpy(position),
        num_sets=from_numpy(num_sets),
        label=from_numpy(shared.label[samples]),
        prediction_time=_list_times(shared.prediction_time, samples),
    )


def _list_times(prediction_time: npt.NDArray[Any] | None, chosen: Ints) -> list[PredictionTime] | None:
    """Return the prediction times of chosen samples as a batch has them; None where a sample is a whole patient."""
    if prediction_time is None:
        return None
    time = prediction_time[chosen]
    times = time.astype(object)
    times[np.isnat(time) if time.dtype.kind == "M" else np.isnan(time)] = None
    listed: list[PredictionTime] = times.tolist()
    return listed
