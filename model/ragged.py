"""The layout of ragged sets in dense groups of similar size.

Sets hold 6 events on average and hundreds at worst.  Padding all to the largest multiplies the work; a loop over sets
is slower still.  So the events of a batch are laid out once in *slots*: sets are sorted by size and each is rounded up
to its *size class*.  A class is then a plain view ``[sets, size, width]`` of the slots, dense layers run over all slots
at once, and only attention looks at one class after another.  There are four classes per doubling of size and sizes up
to eight are exact, so a batch has few classes and, on intensive-care data, about 1 % padding slots.

Shape suffixes: S sets, E events, R slots, G sets of a class, N slots of one of its sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.kernels.ops import TILE, uses_kernels
from model.segments import Segments, attention_pool, permute_rows
from pipeline.arrays import concatenate_ranges, offsets_from_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeClass:
    """Sets of similar size, which lie next to one another in the slots.

    Attributes:
        num_sets: G.
        size: N, slots of a set.
        is_padded: whether any of the slots is padding.
    """

    num_sets: int
    size: int
    is_padded: bool

    @property
    def num_slots(self) -> int:
        return self.num_sets * self.size


@dataclass(frozen=True, slots=True)
class LayoutRoom:
    """The fixed shapes of a layout that is made for a capacity; see :mod:`model.capacity`.

    Attributes:
        num_counted: sets that losses count; fillers come after them in the batch.
        positions, tiles: as many as there is room for.
    """

    num_counted: int
    positions: int
    tiles: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLayout:
    """The slots of the events and sets of a batch.

    Attributes:
        classes: size classes, by ascending size.
        event_of_slot: [R] int64; padding slots repeat an event of their own set, so that every slot holds an event.
        mask: [R] bool, False = padding.
        slots_of_position: the slots of each position 0, 1, 2 … within a set.
        set_of_slot: [R] int64, the set of each slot, as its position in the sorted order.
        set_order: [S] int64, the set at each position of the sorted order.
        set_rank: [S] int64, the position of each set in the sorted order; inverse of ``set_order``.
        slot_offsets: [S+1] int64, the first slot of each set, in the sorted order.
        sizes: [S] int64, the number of events of each set, in the sorted order.
        counted: [S] int64, the number of events that losses count, in the sorted order: 0 for fillers.
        num_counted: [1] int64, the number of sets that losses count; they come first in the batch.
        num_single: [1] int64, the number of sets of one slot; they come first.
        tile_set, tile_begin: [T] int64, the set and the first position of tiles of ``TILE`` slots of one set.
    """

    classes: tuple[SizeClass, ...]
    event_of_slot: Tensor
    mask: Tensor
    slots_of_position: Segments
    set_of_slot: Tensor
    set_order: Tensor
    set_rank: Tensor
    slot_offsets: Tensor
    sizes: Tensor
    counted: Tensor
    num_counted: Tensor
    num_single: Tensor
    tile_set: Tensor
    tile_begin: Tensor

    @property
    def num_slots(self) -> int:
        return self.event_of_slot.shape[0]

    @classmethod
    def build(cls, set_offsets: Tensor, room: LayoutRoom | None = None) -> SetLayout:
        """Lay out the sets of a batch.

        Args:
            set_offsets: [S+1] int64 on the CPU: sizes decide shapes, so a GPU would have to be waited for.
            room: the shapes that the layout is to have, for which no set is rounded up; by default it has its own.

        Raises:
            ValueError: a set is empty.
        """
        offsets = set_offsets.numpy()
        sizes = np.diff(offsets)
        if sizes.size and sizes.min() < 1:
            raise ValueError("a set has no events")
        order = np.argsort(sizes, kind="stable")
        sorted_sizes = sizes[order]
        padded = round_up(sorted_sizes) if room is None else sorted_sizes
        num_counted = len(sizes) if room is None else room.num_counted
        position = concatenate_ranges(np.zeros_like(padded), padded)
        size_of_slot = np.repeat(sorted_sizes, padded)
        event_of_slot = np.repeat(offsets[:-1][order], padded) + np.minimum(position, size_of_slot - 1)

        classes = []
        for size, first, count in zip(*np.unique(padded, return_index=True, return_counts=True), strict=True):
            is_padded = bool(sorted_sizes[first] < size)  # ascending: the first set is the smallest of its class
            classes.append(SizeClass(num_sets=int(count), size=int(size), is_padded=is_padded))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        num_tiles = -(-padded // TILE)
        tile = concatenate_ranges(np.zeros_like(num_tiles), num_tiles)
        tile_set = np.repeat(np.arange(len(order)), num_tiles)
        if room is not None:  # the other tiles lie behind the end of the first set
            tile_set, tile = (np.append(x, np.zeros(room.tiles - len(tile), np.int64)) for x in (tile_set, tile))
            tile[num_tiles.sum() :] = num_tiles[0]
        return cls(
            classes=tuple(classes),
            slot_offsets=torch.from_numpy(offsets_from_sizes(padded)),
            sizes=torch.from_numpy(sorted_sizes),
            counted=torch.from_numpy(np.where(order < num_counted, sorted_sizes, 0)),
            num_counted=torch.tensor([num_counted]),
            num_single=torch.from_numpy(np.count_nonzero(padded == 1, keepdims=True)),
            tile_set=torch.from_numpy(tile_set),
            tile_begin=torch.from_numpy(TILE * tile),
            event_of_slot=torch.from_numpy(event_of_slot),
            mask=torch.from_numpy(position < size_of_slot),
            slots_of_position=Segments.build(torch.from_numpy(position), room.positions if room else 0),
            set_of_slot=torch.from_numpy(np.repeat(np.arange(len(order)), padded)),
            set_order=torch.from_numpy(order),
            set_rank=torch.from_numpy(rank),
        )

    @property
    def sets(self) -> list[Tensor]:
        """What the kernels of attention need to know of the sets."""
        return [self.slot_offsets, self.sizes, self.num_single]

    @property
    def tiles(self) -> list[Tensor]:
        """What the kernels of distances need to know of the tiles."""
        return [self.tile_set, self.tile_begin, self.slot_offsets, self.counted]

    @property
    def counted_slots(self) -> Tensor:
        """[R] bool, the events that losses count."""
        return self.mask & (self.counted > 0).index_select(0, self.set_of_slot)

    @property
    def slots(self) -> Segments:
        """The slots of each set, in the sorted order."""
        return Segments(self.set_of_slot, self.slot_offsets)

    def sort_sets(self, x_SD: Tensor) -> Tensor:
        """Return rows of the batch's order of sets in the sorted order."""
        return permute_rows(x_SD, self.set_order, self.set_rank)

    def unsort_sets(self, x_SD: Tensor) -> Tensor:
        """Return rows of the sorted order of sets in the batch's order."""
        return permute_rows(x_SD, self.set_rank, self.set_order)

    def split(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """Return the slots of each class, as views of one operation, so that its gradient is one concatenation."""
        return x_RD.split([c.num_slots for c in self.classes]) if self.classes else ()

    def split_mask(self) -> list[Tensor | None]:
        """Return the mask [G, N] of each class, None for a class without padding."""
        masks = zip(self.classes, self.split(self.mask), strict=True)
        return [mask.view(c.num_sets, c.size) if c.is_padded else None for c, mask in masks]

    def split_shared(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each class of what :meth:`model.attention.MAB.shared_queries` returns.

        A set of one slot has one row there, every other set the same number.
        """
        points = self.points_of(x.shape[0])
        rows = [c.num_sets if c.size == 1 else c.num_sets * points for c in self.classes]
        return x.split(rows) if rows else ()

    def num_rows(self, points: int) -> int:
        """Return the number of rows that :meth:`model.attention.MAB.shared_queries` returns for ``points`` queries."""
        return sum(c.num_sets * (1 if c.size == 1 else points) for c in self.classes)

    def points_of(self, num_rows: int) -> int:
        """Return the number of queries whose ``num_rows`` rows these are; 1 where all sets have one slot."""
        single = self.num_rows(0)
        several = self.set_order.shape[0] - single
        return (num_rows - single) // several if several else 1

    def mean(self, x_RD: Tensor) -> Tensor:
        """Return [S, D], the mean over the events of each set, without padding, in the sorted order of sets."""
        if uses_kernels(x_RD.device):
            every_event = self.mask.float().log()[:, None]  # of weight 1, padding of weight 0
            return attention_pool(x_RD, every_event, self.slots).to(x_RD.dtype)
        means = []
        for c, mask, x in zip(self.classes, self.split_mask(), self.split(x_RD), strict=True):
            x_GND = x.view(c.num_sets, c.size, -1)
            if mask is None:
                means.append(x_GND.mean(1))
            else:
                weight = mask.to(x.dtype)
                means.append((x_GND * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
        return torch.cat(means) if means else x_RD[:0]


def round_up(sizes: np.ndarray) -> np.ndarray:
    """Return the size class of each size: itself up to 8, then four classes per doubling (10, 12, 14, 16, 20, …)."""
    step = 1 << np.maximum(np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64) - 3, 0)
    return -(-sizes // step) * step
