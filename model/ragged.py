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


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLayout:
    """The slots of the events and sets of a batch.

    Attributes:
        classes: size classes, by ascending size.
        event_of_slot: [R] int64; padding slots repeat an event of their own set, so that every slot holds an event.
        mask: [R] bool, False = padding.
        position_in_set: [R] int64, 0, 1, 2 … within the set.
        set_of_slot: [R] int64, the set of each slot, as its position in the sorted order.
        set_order: [S] int64, the set at each position of the sorted order.
        set_rank: [S] int64, the position of each set in the sorted order; inverse of ``set_order``.
    """

    classes: tuple[SizeClass, ...]
    event_of_slot: Tensor
    mask: Tensor
    position_in_set: Tensor
    set_of_slot: Tensor
    set_order: Tensor
    set_rank: Tensor

    @property
    def num_slots(self) -> int:
        return self.event_of_slot.shape[0]

    @classmethod
    def build(cls, set_offsets: Tensor) -> SetLayout:
        """Lay out the sets of a batch.

        Args:
            set_offsets: [S+1] int64 on the CPU: sizes decide shapes, so a GPU would have to be waited for.

        Raises:
            ValueError: a set is empty.
        """
        offsets = set_offsets.numpy()
        sizes = np.diff(offsets)
        if sizes.size and sizes.min() < 1:
            raise ValueError("a set has no events")
        order = np.argsort(sizes, kind="stable")
        sorted_sizes = sizes[order]
        padded = round_up(sorted_sizes)
        ends = np.cumsum(padded)
        num_slots = int(ends[-1]) if sizes.size else 0
        position = np.arange(num_slots) - np.repeat(ends - padded, padded)
        size_of_slot = np.repeat(sorted_sizes, padded)
        event_of_slot = np.repeat(offsets[:-1][order], padded) + np.minimum(position, size_of_slot - 1)

        classes = []
        for size, first, count in zip(*np.unique(padded, return_index=True, return_counts=True), strict=True):
            is_padded = bool(sorted_sizes[first] < size)  # ascending: the first set is the smallest of its class
            classes.append(SizeClass(num_sets=int(count), size=int(size), is_padded=is_padded))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(
            classes=tuple(classes),
            event_of_slot=torch.from_numpy(event_of_slot),
            mask=torch.from_numpy(position < size_of_slot),
            position_in_set=torch.from_numpy(position),
            set_of_slot=torch.from_numpy(np.repeat(np.arange(len(order)), padded)),
            set_order=torch.from_numpy(order),
            set_rank=torch.from_numpy(rank),
        )

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
        if not self.classes:
            return ()
        single = self.classes[0].num_sets if self.classes[0].size == 1 else 0
        several = self.set_order.shape[0] - single
        points = (x.shape[0] - single) // several if several else 1
        return x.split([c.num_sets if c.size == 1 else c.num_sets * points for c in self.classes])

    def mean(self, x_RD: Tensor) -> Tensor:
        """Return [S, D], the mean over the events of each set, without padding, in the sorted order of sets."""
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
