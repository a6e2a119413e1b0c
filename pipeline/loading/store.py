"""Patients in memory, of a split or of a group of its shards, and batches gathered from them.

A batch is gathered with a fixed number of array operations, whatever its size: index arithmetic on offsets, no loop
over patients, sets or events.  Of P patients, N are gathered in K batches at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import from_numpy

from pipeline.arrays import Ints, concatenate_ranges, offsets_from_sizes
from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.shards import read_shard
from pipeline.loading.batch import PatientBatch
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import GlobalBatch
from pipeline.schema import UserError
from pipeline.storage.folder import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The events of each patient [P] that an epoch uses: a run of them, all if nothing is truncated."""

    event_start: Ints  # the first event, counted over all P patients
    num_events: Ints  # at least 1
    set_start: Ints  # the set of the first event, counted over all P patients
    num_sets: Ints  # the first and the last set may be cut


class PatientStore:
    """All patients of some shards as flat arrays, one shard after another.

    Attributes as in :class:`pipeline.dataset.shards.FlatPatients`; ``patient_id`` holds Python's strings.
    """

    def __init__(self, directory: Path | Folder, entries: Sequence[ShardEntry], *, verify: bool = True) -> None:
        """Read the shards ``entries``, of which there may be none; ``verify`` compares their checksums too.

        Raises:
            UserError: a shard is missing, damaged or unlike the manifest, or there is too little memory.
        """
        sizes = ("num_patients", "num_sets", "num_events")
        num_patients, num_sets, num_events = (sum(getattr(entry, size) for entry in entries) for size in sizes)
        try:  # memory is only used as shards fill it, which keep to the manifest's claim
            self.label, self.patient_id = np.empty(num_patients, np.int64), np.empty(num_patients, object)
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
            self.label[patients], self.minute[sets], self.code[events] = shard.label, shard.minute, shard.code
            self.value[events], self.has_value[events] = shard.value, shard.has_value
            self.patient_id[patients] = shard.patient_id.to_numpy(zero_copy_only=False)
            patient_offsets[patients.start + 1 : patients.stop + 1] = shard.patient_offsets[1:] + sets.start
            self.set_offsets[sets.start + 1 : sets.stop + 1] = shard.set_offsets[1:] + events.start
        event_offsets = self.set_offsets[patient_offsets]
        lengths = {"num_events": np.diff(event_offsets), "num_sets": np.diff(patient_offsets)}
        self._whole = Windows(event_start=event_offsets[:-1], set_start=patient_offsets[:-1], **lengths)

    @property
    def num_patients(self) -> int:
        return len(self.label)

    def select_windows(self, options: LoaderOptions, rng: np.random.Generator) -> Windows:
        """Return the events to use of each patient; a set may be cut.  ``rng`` draws the positions of random cuts."""
        whole, limit = self._whole, options.max_sequence_length
        if limit is None or not (whole.num_events > limit).any():
            return whole
        num_events = np.minimum(whole.num_events, limit)
        skipped = whole.num_events - num_events
        if options.truncate == "earliest":
            skipped[:] = 0
        elif options.truncate == "random":
            skipped = rng.integers(skipped, endpoint=True)
        start = whole.event_start + skipped
        set_start = np.searchsorted(self.set_offsets, start, side="right") - 1
        num_sets = np.searchsorted(self.set_offsets, start + num_events, side="left") - set_start
        return Windows(event_start=start, num_events=num_events, set_start=set_start, num_sets=num_sets)

    def gather_batches(self, windows: Windows, patients: Ints, batch_offsets: Ints) -> list[PatientBatch]:
        """Return K batches, gathered at once; they are views of shared arrays.

        Batch ``k`` has the patients [N] ``patients[batch_offsets[k]:batch_offsets[k+1]]``.
        """
        sets, set_offsets, patient_offsets, event_offsets = self._gather_sets(windows, patients)
        events = concatenate_ranges(windows.event_start[patients], windows.num_events[patients])
        # Every index is in range; mode="clip" says so, and saves the third of a gather that checking takes.
        code = self.code.take(events, mode="clip").astype(np.int64)
        value = self.value.take(events, mode="clip")
        has_value = self.has_value.take(events, mode="clip")
        minute = self.minute.take(sets, mode="clip")
        label, patient_id = self.label[patients], self.patient_id[patients].tolist()

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
            )
            for (b0, s0, e0), (b1, s1, e1) in pairwise(borders)
        ]

    def gather_global_batch(self, windows: Windows, patients: Ints) -> GlobalBatch:
        """Return the lengths of ``patients`` [B] and of their sets."""
        set_size, patient_id = np.diff(self._gather_sets(windows, patients)[1]), self.patient_id[patients].tolist()
        return GlobalBatch(patient_id=patient_id, num_sets=windows.num_sets[patients], set_size=set_size)

    def _gather_sets(self, windows: Windows, patients: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return which sets [S] ``patients`` [N] have, and the offsets of their sets [S+1], of patients into sets [N+1]
        and of patients into events [N+1].
        """
        event_start, num_sets = windows.event_start[patients], windows.num_sets[patients]
        sets = concatenate_ranges(windows.set_start[patients], num_sets)
        patient_offsets = offsets_from_sizes(num_sets)
        event_offsets = offsets_from_sizes(windows.num_events[patients])
        set_offsets = np.empty(len(sets) + 1, np.int64)
        np.take(self.set_offsets, sets, mode="clip", out=set_offsets[:-1])
        set_offsets[:-1] -= np.repeat(event_start - event_offsets[:-1], num_sets)
        set_offsets[patient_offsets] = event_offsets  # a cut first set begins, and a cut last set ends, with its window
        return sets, set_offsets, patient_offsets, event_offsets
