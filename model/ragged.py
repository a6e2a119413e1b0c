"""Flat sets to dense groups of like size, and back.

Sets hold 6 events on average and hundreds at worst.  Padding all to the largest multiplies the work; a loop over sets
is slower still.  So the events of a batch are laid out once in *rows*, sets sorted by size, every set rounded up to
its *size class*.  Then a class is a plain view ``[sets, size, width]`` of the rows, dense layers run over all rows at
once, and only attention looks at one class after another.  There are four classes per doubling of size and sizes up
to eight are exact, so a batch has few classes and, on intensive-care data, about 1 % padding rows.

Shape suffixes: S sets, E events, R rows, G sets of a class, N rows a set of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeClass:
    """Sets of like size, next to one another in the rows.

    Attributes:
        first_row: where the class begins.
        num_sets: G.
        size: N, rows a set.
        real: [G, N] bool, False = padding; None where no set of the class is padded.
    """

    first_row: int
    num_sets: int
    size: int
    real: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.num_sets * self.size


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLayout:
    """Where each event and each set of a batch stands among the rows.

    Attributes:
        classes: by size, ascending.
        event_of_row: [R] int64; padding rows repeat an event of their own set, so that no row holds nonsense.
        real_row: [R] float32, 1 for an event and 0 for padding.
        place_in_set: [R] int64, 0, 1, 2 … within the set.
        set_of_row: [R] int64, the place in the sorted order of the set that each row belongs to.
        set_order: [S] int64, the set that stands at each place of the sorted order.
        set_rank: [S] int64, the place of each set in the sorted order; inverse of ``set_order``.
        size: [S] int64, events of each set, in the sorted order.
    """

    classes: tuple[SizeClass, ...]
    event_of_row: Tensor
    real_row: Tensor
    place_in_set: Tensor
    set_of_row: Tensor
    set_order: Tensor
    set_rank: Tensor
    size: Tensor

    @property
    def num_rows(self) -> int:
        return self.event_of_row.shape[0]

    @classmethod
    def build(cls, set_offsets: Tensor) -> SetLayout:
        """The layout of a batch's sets.

        Args:
            set_offsets: [S+1] int64.  Should lie on the CPU: sizes decide shapes, so a GPU would have to be waited for.

        Raises:
            ValueError: a set is empty.
        """
        offsets = set_offsets.cpu().numpy()
        sizes = np.diff(offsets)
        if sizes.size and sizes.min() < 1:
            raise ValueError("a set has no events")
        order = np.argsort(sizes, kind="stable")
        sorted_sizes = sizes[order]
        padded = round_up(sorted_sizes)
        row_ends = np.cumsum(padded)
        num_rows = int(row_ends[-1]) if sizes.size else 0
        place = np.arange(num_rows) - np.repeat(row_ends - padded, padded)
        size_of_row = np.repeat(sorted_sizes, padded)
        event_of_row = np.repeat(offsets[:-1][order], padded) + np.minimum(place, size_of_row - 1)
        real_row = place < size_of_row

        class_sizes, first_set, counts = np.unique(padded, return_index=True, return_counts=True)
        real = torch.from_numpy(real_row)
        classes = []
        for size, first, count in zip(class_sizes.tolist(), first_set.tolist(), counts.tolist(), strict=True):
            first_row = int(row_ends[first] - padded[first])
            mask = real[first_row : first_row + count * size].view(count, size)
            exact = int(sorted_sizes[first]) == size  # ascending: the first set is the smallest of its class
            classes.append(SizeClass(first_row=first_row, num_sets=count, size=size, real=None if exact else mask))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(
            classes=tuple(classes),
            event_of_row=torch.from_numpy(event_of_row),
            real_row=real.float(),
            place_in_set=torch.from_numpy(place),
            set_of_row=torch.from_numpy(np.repeat(np.arange(len(order)), padded)),
            set_order=torch.from_numpy(order),
            set_rank=torch.from_numpy(rank),
            size=torch.from_numpy(sorted_sizes),
        )

    def to(self, device: torch.device | str) -> SetLayout:
        """The same layout with every tensor on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return SetLayout(
            classes=tuple(
                SizeClass(
                    first_row=c.first_row,
                    num_sets=c.num_sets,
                    size=c.size,
                    real=None if c.real is None else move(c.real),
                )
                for c in self.classes
            ),
            event_of_row=move(self.event_of_row),
            real_row=move(self.real_row),
            place_in_set=move(self.place_in_set),
            set_of_row=move(self.set_of_row),
            set_order=move(self.set_order),
            set_rank=move(self.set_rank),
            size=move(self.size),
        )

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each class, as views; one operation, so that its gradient is one concatenation."""
        return rows.split([c.num_rows for c in self.classes]) if self.classes else ()

    def split_shared(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Like :meth:`split` for what :meth:`model.attention.MAB.shared_queries` gives: a set of one row has one
        row there, every other set the same number.
        """
        if not self.classes:
            return ()
        alone = self.classes[0].num_sets if self.classes[0].size == 1 else 0
        several = self.size.shape[0] - alone
        points = (rows.shape[0] - alone) // several if several else 1
        return rows.split([c.num_sets if c.size == 1 else c.num_sets * points for c in self.classes])

    def mean(self, rows_RD: Tensor) -> Tensor:
        """[S, D], the mean of each set's real rows, in the sorted order of sets."""
        means = []
        for c, rows in zip(self.classes, self.split(rows_RD), strict=True):
            members = rows.view(c.num_sets, c.size, -1)
            if c.real is None:
                means.append(members.mean(1))
            else:
                weight = c.real.to(members.dtype)
                means.append((members * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
        return torch.cat(means) if means else rows_RD[:0]


def round_up(sizes: np.ndarray) -> np.ndarray:
    """The size class of each size: itself up to 8, then four classes per doubling (10, 12, 14, 16, 20, 24, …)."""
    step = 1 << np.maximum(np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64) - 3, 0)
    return -(-sizes // step) * step
