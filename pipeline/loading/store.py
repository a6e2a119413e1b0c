"""Patients in memory, those of a split or of a group of its shards, and batches gathered from them.

A batch is gathered with a fixed number of array operations, whatever its size: index arithmetic on offsets, no loop
over patients, sets or events.  Suffixes as in ``pipeline.loading.batch``; P patients in memory, K batches gathered
at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.arrays import offsets_of, ranges
from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.shards import read_set_sizes, read_shard
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UserError
from pipeline.storage.folder import Folder

Truncate = Literal["earliest", "latest", "random"]
Flat = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The events of each patient that an epoch uses: a run of them, whole where nothing is truncated.

    Attributes:
        event_start: [P] int64, the first event, counted over all P.
        num_events: [P] int64, at least 1.
        set_start: [P] int64, the set of the first event, counted over all P.
        num_sets: [P] int64; the first and the last set may be cut.
    """

    event_start: npt.NDArray[np.int64]
    num_events: npt.NDArray[np.int64]
    set_start: npt.NDArray[np.int64]
    num_sets: npt.NDArray[np.int64]


class Outline:
    """Where the sets of patients and the events of sets begin: all that a plan needs, without the events.

    Attributes:
        set_offsets: [S+1] int64, into the events.
    """

    def __init__(self, patient_offsets: npt.NDArray[np.int64], set_offsets: npt.NDArray[np.int64]) -> None:
        """Of patients whose sets are given by ``patient_offsets`` [P+1]."""
        self.set_offsets = set_offsets
        event_offsets = set_offsets[patient_offsets]
        self._whole = Windows(
            event_start=event_offsets[:-1],
            num_events=np.diff(event_offsets),
            set_start=patient_offsets[:-1],
            num_sets=np.diff(patient_offsets),
        )

    @classmethod
    def read(cls, directory: Path | Folder, entries: Sequence[ShardEntry]) -> Outline:
        """The outline of the patients of some shards, at least one; a small part of the files is read."""
        num_sets, set_size = zip(*(read_set_sizes(directory, entry) for entry in entries), strict=True)
        return cls(offsets_of(np.concatenate(num_sets)), offsets_of(np.concatenate(set_size)))

    @property
    def num_patients(self) -> int:
        return len(self._whole.num_events)

    def windows(
        self,
        max_sequence_length: int | None = None,
        truncate: Truncate = "earliest",
        rng: np.random.Generator | None = None,
    ) -> Windows:
        """The events to use of each patient.

        Args:
            max_sequence_length: most events of a patient, at least 1, or None for all; by whole events, so a set may
                be cut.
            truncate: keep the ``earliest`` or the ``latest`` events, or a run from a ``random`` place.
            rng: for ``random``.
        """
        whole = self._whole
        if max_sequence_length is None or not (whole.num_events > max_sequence_length).any():
            return whole
        num_events = np.minimum(whole.num_events, max_sequence_length)
        skipped = whole.num_events - num_events
        if truncate == "earliest":
            skipped[:] = 0
        elif truncate == "random":
            assert rng is not None, "a random run needs a generator"
            skipped = rng.integers(skipped, endpoint=True)
        event_start = whole.event_start + skipped
        set_start = np.searchsorted(self.set_offsets, event_start, side="right") - 1
        set_stop = np.searchsorted(self.set_offsets, event_start + num_events, side="left")
        return Windows(
            event_start=event_start, num_events=num_events, set_start=set_start, num_sets=set_stop - set_start
        )


class PatientStore(Outline):
    """All patients of some shards as flat arrays, one shard after another.

    Attributes:
        label: [P] int64, -1 where unlabelled.
        patient_id: [P] strings.
        minute: [S] float32.
        code, value, has_value: [E + margin] int32, float32, bool.  The margin is zeros, at least as many as the
            longest patient has events, so that a rectangle can be read from any start.
    """

    def __init__(self, directory: Path | Folder, entries: Sequence[ShardEntry], *, verify: bool = True) -> None:
        """Read the shards.

        Args:
            directory: the data directory.
            entries: of the shards, as its manifest has them; there may be none.
            verify: compare the shards' checksums with the manifest's.

        Raises:
            UserError: a shard is missing, damaged or unlike the manifest.
        """
        num_patients = sum(entry.num_patients for entry in entries)
        num_sets = sum(entry.num_sets for entry in entries)
        num_events = sum(entry.num_events for entry in entries)
        try:  # memory is taken as shards that keep to the claim fill it
            self.label = np.empty(num_patients, np.int64)
            self.patient_id = np.empty(num_patients, object)
            self.minute = np.empty(num_sets, np.float32)
            patient_offsets = np.zeros(num_patients + 1, np.int64)
            set_offsets = np.zeros(num_sets + 1, np.int64)
            margin = max((entry.num_events for entry in entries), default=0)  # never written: takes no memory
            self.code = np.zeros(num_events + margin, np.int32)
            self.value = np.zeros(num_events + margin, np.float32)
            self.has_value = np.zeros(num_events + margin, np.bool_)
        except (MemoryError, ValueError):
            raise UserError(
                f"{directory}: {num_events:,} events do not fit into memory; lower --group_events, or mend the manifest"
            ) from None

        patient = set_ = event = 0
        for entry in entries:  # one after another into place: the most memory is all shards and one more
            shard = read_shard(directory, entry, verify=verify)
            patients = slice(patient, patient := patient + entry.num_patients)
            sets = slice(set_, set_ := set_ + entry.num_sets)
            events = slice(event, event := event + entry.num_events)
            self.label[patients] = shard.label
            self.patient_id[patients] = shard.patient_id.to_numpy(zero_copy_only=False)
            self.minute[sets] = shard.minute
            patient_offsets[patients.start + 1 : patients.stop + 1] = shard.patient_offsets[1:] + sets.start
            set_offsets[sets.start + 1 : sets.stop + 1] = shard.set_offsets[1:] + events.start
            self.code[events] = shard.code
            self.value[events] = shard.value
            self.has_value[events] = shard.has_value
        super().__init__(patient_offsets, set_offsets)

    @cached_property
    def _set_of_event(self) -> npt.NDArray[np.int32]:
        """[E + margin] int32, the set of each event, counted over all; only the padded layout needs it."""
        return self._of_event(np.arange(len(self.minute), dtype=np.int32))

    @cached_property
    def _minute_of_event(self) -> npt.NDArray[np.float32]:
        """[E + margin] float32, as above."""
        return self._of_event(self.minute)

    def _of_event(self, of_set: Flat) -> Flat:
        flat = np.zeros(len(self.code), of_set.dtype)
        flat[: self.set_offsets[-1]] = np.repeat(of_set, np.diff(self.set_offsets))
        return flat

    def ragged(
        self, windows: Windows, patients: npt.NDArray[np.int64], batch_offsets: npt.NDArray[np.int64]
    ) -> list[PatientBatch]:
        """Gather K batches at once; they are views of shared arrays.

        Args:
            windows: the events to use.
            patients: [N] the patients of all K batches, one after another.
            batch_offsets: [K+1] batch ``k`` has ``patients[batch_offsets[k]:batch_offsets[k+1]]``.
        """
        # Every index is in range; mode="clip" says so, and saves the third of a gather that checking takes.
        event_start = windows.event_start[patients]
        num_events = windows.num_events[patients]
        num_sets = windows.num_sets[patients]
        events = ranges(event_start, num_events)
        sets = ranges(windows.set_start[patients], num_sets)
        event_offsets = offsets_of(num_events)
        patient_offsets = offsets_of(num_sets)

        set_offsets = np.empty(len(sets) + 1, np.int64)
        np.take(self.set_offsets, sets, mode="clip", out=set_offsets[:-1])
        set_offsets[:-1] -= np.repeat(event_start - event_offsets[:-1], num_sets)
        set_offsets[patient_offsets] = event_offsets  # a cut first set begins, and a cut last set ends, with its window

        code = self.code.take(events, mode="clip").astype(np.int64)
        value = self.value.take(events, mode="clip")
        has_value = self.has_value.take(events, mode="clip")
        minute = self.minute.take(sets, mode="clip")
        label = self.label[patients]
        patient_id = self.patient_id[patients].tolist()

        first_set = patient_offsets[batch_offsets].tolist()
        first_event = event_offsets[batch_offsets].tolist()
        first_patient = batch_offsets.tolist()
        batches = []
        for b0, b1, s0, s1, e0, e1 in zip(
            first_patient, first_patient[1:], first_set, first_set[1:], first_event, first_event[1:], strict=False
        ):
            batches.append(
                PatientBatch(
                    code=torch.from_numpy(code[e0:e1]),
                    value=torch.from_numpy(value[e0:e1]),
                    has_value=torch.from_numpy(has_value[e0:e1]),
                    set_offsets=torch.from_numpy(set_offsets[s0 : s1 + 1] - e0),
                    minute=torch.from_numpy(minute[s0:s1]),
                    patient_offsets=torch.from_numpy(patient_offsets[b0 : b1 + 1] - s0),
                    label=torch.from_numpy(label[b0:b1]),
                    patient_id=patient_id[b0:b1],
                )
            )
        return batches

    def padded(self, windows: Windows, patients: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """What ``PatientBatch.to_padded()`` gives for ``patients`` [B], read straight into rectangles [B, L]."""
        event_start = windows.event_start[patients]
        num_events = windows.num_events[patients]
        width = int(num_events.max(initial=0))
        padding = np.arange(width) >= num_events[:, None]
        padded_cells = np.flatnonzero(padding)

        def rows(flat: Flat) -> Flat:
            # Row i of the strided view is flat[i : i + width], so that picking rows copies whole runs of memory.
            # (as_strided makes the same view at three times the price.)
            shape = (len(flat) - width + 1, width)
            return np.ndarray(shape, flat.dtype, flat, strides=flat.strides * 2)[event_start]

        def blank(rectangle: Flat) -> Tensor:
            rectangle.reshape(-1)[padded_cells] = 0
            return torch.from_numpy(rectangle)

        set_id = rows(self._set_of_event)
        set_id -= windows.set_start[patients].astype(np.int32)[:, None]
        return {
            "code": blank(rows(self.code).astype(np.int64)),
            "val": blank(rows(self.value)[..., None]),
            "has_value": blank(rows(self.has_value)),
            "minute": blank(rows(self._minute_of_event)[..., None]),
            "set_id": blank(set_id.astype(np.int64)[..., None]),
            "label": torch.from_numpy(self.label[patients]),
            "padding_mask": torch.from_numpy(padding),
        }
