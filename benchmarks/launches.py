"""How many operations a training step hands to the device, which is what bounds a small step on a GPU.

    python -m benchmarks.launches DATA [--preset small] [--batch_size 16] [--by_operation]

A step (forward, losses, backward, clipping, optimiser, EMA) runs on the ``meta`` device, by the path that a GPU takes,
and every operation that is neither a view nor an allocation is counted.  An operation over a list of tensors
(``_foreach_…``, ``_fused_…``) counts as one: a GPU takes it in a few launches of hundreds of tensors each.

Beside it stand the bytes that the step's one copy takes to the device, and how many of them are events: what would not
be copied if the data set lay there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import steps
from model.config import Preset

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})


class LaunchCounter(TorchDispatchMode):
    """Counts operations by the part of the step that ran them; views and allocations launch nothing.

    Attributes:
        counts: number of launches by (part, operation).
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts = [""]
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "_record_function_enter_new":
            self._parts.append(args[0])
        elif name == "_record_function_exit":
            self._parts.pop()
        elif is_launch(func, name) and any(getattr(of, "is_meta", False) for of in tree_leaves((args, result))):
            self.counts[self._parts[-1], name] += 1
        return result

    def by_part(self) -> dict[str, int]:
        parts: Counter[str] = Counter()
        for (part, _), count in self.counts.items():
            parts[part] += count
        return dict(parts)


def is_launch(func: Any, name: str) -> bool:
    """Return whether an operation does more than to allocate memory or return views of its arguments."""
    returns = func._schema.returns
    is_view = bool(returns) and all(of.alias_info is not None and not of.alias_info.is_write for of in returns)
    return not is_view and name not in ALLOCATIONS


def count_launches(data_dir: Path, preset: Preset, batch_size: int) -> LaunchCounter:
    """Return the launches of a training step on the first batch of a data directory."""
    batch = next(steps.endless_batches(data_dir, batch_size, prefetch=0))
    # The optimiser's one operation for all parameters has a form for ``meta``, which its check does not know of.
    with mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=["meta"]):
        stepper = steps.Stepper(steps.new_model(preset, steps.num_codes(data_dir)), device="meta")
        stepper.step(batch)  # the optimiser's state is made in the first step
        with LaunchCounter() as counter:
            stepper.step(batch)
    return counter


def count_bytes(data_dir: Path, batch_size: int) -> dict[str, int]:
    """Return the events of the first batch of a data directory, and the bytes of its copy: of all and of its events."""
    ready = next(steps.endless_batches(data_dir, batch_size, prefetch=0))
    (part,) = ready.parts
    buffer, batch = part.pack(pin=False).buffer, part.batch
    assert buffer is not None
    events = (batch.code, batch.value, batch.has_value, part.value, part.has_number)
    return {
        "events": batch.num_events,
        "copied_bytes": buffer.nbytes,
        "copied_bytes_of_events": sum(tensor.nbytes for tensor in events),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--preset", choices=("small", "reference"), default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--by_operation", action="store_true", help="also list the operations of each part")
    options = parser.parse_args()
    counter = count_launches(options.data, options.preset, options.batch_size)
    result = {
        "launches": counter.counts.total(),
        "parts": counter.by_part(),
        "preset": options.preset,
        "batch_size": options.batch_size,
        **count_bytes(options.data, options.batch_size),
    }
    if options.by_operation:
        result["operations"] = {f"{part}: {name}": n for (part, name), n in counter.counts.most_common()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
