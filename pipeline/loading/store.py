"""Patients in memory, of a split or of a group of its shards, which are read one by one, and batches of them.

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
from pipeline.dataset.shards import FlatPatients, read_shard
from pipeline.loading.batch import PatientBatch
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import GlobalBatch
from pipeline.loading.samples import BatchSamples, PredictionTime, sample_keys
from pipeline.schema import UserError
from pipeline.storage.folder import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The events of each sample [N] that an epoch uses: a run of its patient's.

    Lengths are known at once.  Where a window lies is known when its shard has been read: see
    :meth:`PatientStore.locate`.
    """

    samples: Samples
    num_events: Ints  # at least 1
    skipped: Ints | None  # events of the patient before the first one; None = no sample is cut
    is_static: npt.NDArray[np.bool_]  # whether a sample has the static set alone
    event_start: Ints  # the first event, as a position in the store
    set_start: Ints  # the set of the first event, likewise
    num_sets: Ints  # the first and the last set may be cut

    @classmethod
    def of(cls, samples: Samples, options: LoaderOptions, rng: np.random.Generator) -> Windows:
        """Return the windows of samples, of which none is located; ``rng`` draws the positions of random cuts."""
        num_events, limit, skipped = samples.num_events, options.max_sequence_length, None
        if limit is not None and (num_events > limit).any():
            num_events = np.minimum(num_events, limit)
            skipped = samples.num_events - num_events
            if options.truncate == "earliest":
                skipped[:] = 0
            elif options.truncate == "random":
                skipped = rng.integers(skipped, endpoint=True)
        number = len(num_events)
        start, set_start, num_sets = (np.empty(number, np.int64) for _ in range(3))
        places = {"event_start": start, "set_start": set_start, "num_sets": num_sets}
        is_static = np.zeros(number, np.bool_)
        return cls(samples=samples, num_events=num_events, skipped=skipped, is_static=is_static, **places)


class PatientStore:
    """The patients of some shards as flat arrays, one shard after another; a shard is there when it has been read.

    Arrays as in :class:`pipeline.dataset.shards.FlatPatients`; ``patient_id`` holds Python's strings.  A shard has its
    place from the beginning, with one more entry for offsets and sets than the manifest says, so that its last offset
    is its own, and reading one touches no other.

    Attributes:
        unread: numbers of the shards that have not been read.
    """

    def __init__(
        self, directory: Path | Folder, entries: Sequence[ShardEntry], *, excluded_codes: Sequence[int] = ()
    ) -> None:
        """Make room for the shards ``entries``, of which there may be none.

        Events of ``excluded_codes`` are left out, and so are sets that have no others; a patient may then have none.

        Raises:
            UserError: there is too little memory.
        """
        self._entries, self._excluded, self.unread = (
            entries,
            np.array(excluded_codes, np.int64),
            set(range(len(entries))),
        )
        of_entries = ((entry.num_patients, entry.num_sets, entry.num_events) for entry in entries)
        sizes = np.array([*of_entries], np.int64).reshape(-1, 3)
        self._patient, self._set, self._event = (offsets_from_sizes(size) for size in sizes.T)
        num_patients, num_sets, num_events = (int(bounds[-1]) for bounds in (self._patient, self._set, self._event))
        more = len(entries)
        try:  # memory is only used as shards fill it, which keep to the manifest's claim
            self.patient_id, self._has_static = np.empty(num_patients, object), np.empty(num_patients, np.bool_)
            self._patient_offsets = np.empty(num_patients + more, np.int64)
            self.set_offsets, self.minute = np.empty(num_sets + more, np.int64), np.empty(num_sets + more, np.float32)
            self.code, self.value = np.empty(num_events, np.int32), np.empty(num_events, np.float32)
            self.has_value = np.empty(num_events, np.bool_)
        except (MemoryError, ValueError):
            problem = f"{num_events:,} events do not fit into memory"
            raise UserError(f"{directory}: {problem}; lower --group_events, or repair the manifest") from None

    @property
    def num_shards(self) -> int:
        return len(self._entries)

    @property
    def num_patients(self) -> int:
        return len(self.patient_id)

    def shard_of(self, patients: Ints) -> Ints:
        """Return the numbers of the shards in which patients lie."""
        return np.searchsorted(self._patient, patients, side="right") - 1

    def read(self, number: int, folder: Path | Folder, *, verify: bool = True) -> None:
        """Read one shard into its place; ``verify`` compares its checksum too.

        Raises:
            UserError: the shard is missing, damaged or unlike the manifest.
        """
        shard = _exclude(read_shard(folder, self._entries[number], verify=verify), self._excluded)
        patients = slice(self._patient[number], self._patient[number + 1])
        set_, event = self._set[number] + number, self._event[number]
        sets, events = slice(set_, set_ + len(shard.minute)), slice(event, event + len(shard.code))
        self.minute[sets], self.code[events] = shard.minute, shard.code
        self.value[events], self.has_value[events] = shard.value, shard.has_value
        self.set_offsets[sets.start : sets.stop + 1] = shard.set_offsets + event
        self.patient_id[patients] = shard.patient_id.to_numpy(zero_copy_only=False)
        self._has_static[patients] = shard.has_static
        self._patient_offsets[patients.start + number : patients.stop + number + 1] = shard.patient_offsets + set_
        self.unread.discard(number)

    def locate(self, windows: Windows, number: int) -> None:
        """Note where the windows of samples of one shard lie, which has been read; a set may be cut.

        Raises:
            UserError: a sample's lengths are not those of its patient's first events.
        """
        samples, bounds = windows.samples, self._patient[number : number + 2]
        rows = slice(*np.searchsorted(samples.patient, bounds).tolist())
        patient, num_events, num_sets = samples.patient[rows], samples.num_events[rows], samples.num_sets[rows]
        place = patient + number
        set_start, set_stop = self._patient_offsets[place], self._patient_offsets[place + 1]
        start, stop = self.set_offsets[set_start], self.set_offsets[set_stop]
        left = stop - start - num_events
        is_inside = left == 0 if samples.prediction_time is None else left >= 0
        # The sets of an event and of the one after it say where a window's last set ends.
        first = self._set[number] + number
        offsets = self.set_offsets[first : self._patient_offsets[bounds[1] + number] + 1]
        if not (is_inside & (first + np.searchsorted(offsets, start + num_events) - set_start == num_sets)).all():
            raise UserError("index.parquet, or the task: contradicts the shards; run preprocess.py, or add it, again")
        windows.is_static[rows] = self._has_static[patient] & (num_sets == 1)
        if windows.skipped is not None:
            start = start + windows.skipped[rows]
            set_start = first + np.searchsorted(offsets, start, side="right") - 1
            num_sets = first + np.searchsorted(offsets, start + windows.num_events[rows]) - set_start
        windows.event_start[rows], windows.set_start[rows], windows.num_sets[rows] = start, set_start, num_sets

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
        # A static set has the minute of the next one, but not of one that is not seen.
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


def _exclude(shard: FlatPatients, codes: Ints) -> FlatPatients:
    """Return the patients of a shard without the events of ``codes`` and without sets that have no others."""
    if not len(codes):
        return shard
    keep = ~np.isin(shard.code, codes)
    starts = offsets_from_sizes(keep)[shard.set_offsets]
    is_left = np.diff(starts) > 0
    has_static = shard.has_static & np.append(is_left, False)[shard.patient_offsets[:-1]]
    minute, offsets = shard.minute[is_left], offsets_from_sizes(is_left)[shard.patient_offsets]
    static = offsets[:-1][has_static]
    is_alone = static + 1 == offsets[1:][has_static]
    following = minute[np.minimum(static + 1, max(len(minute) - 1, 0))]
    minute[static] = np.where(is_alone, 0, following)
    return FlatPatients(
        patient_offsets=offsets,
        set_offsets=np.append(starts[:-1][is_left], starts[-1]),
        minute=minute,
        code=shard.code[keep],
        value=shard.value[keep],
        has_value=shard.has_value[keep],
        has_static=has_static,
        patient_id=shard.patient_id,
    )


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
