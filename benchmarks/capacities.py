"""How many training batches have room in the capacities of ``--cuda_graphs``, and what their fillers cost.

    python -m benchmarks.capacities DATA [--batch_sizes 16 64] [--epochs 3] [--output FILE.json]

Capacities are fitted to the first batches of the first epoch, as ``train.py`` does it; all batches are counted, those
included.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from benchmarks.machine import describe, publish
from benchmarks.steps import endless_batches, num_codes
from model.capacity import BatchShape, fill_batch, fit_capacities
from pipeline import make_loader
from training.begin import CAPACITY_BATCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [measure(options.data_dir, size, options.epochs) for size in options.batch_sizes]
    publish({**describe(), "rows": rows}, options.output)


def measure(data_dir: str, batch_size: int, epochs: int) -> dict[str, float]:
    """Return figures of the batches of some epochs, event dropout included."""
    number = epochs * len(make_loader(data_dir, split="train", batch_size=batch_size))
    batches = [ready.batch for ready in itertools.islice(endless_batches(data_dir, batch_size, prefetch=0), number)]
    shapes = [BatchShape.of(batch) for batch in batches]
    capacities = fit_capacities(shapes[:CAPACITY_BATCHES], num_codes=num_codes(data_dir))
    filled = [(own, found[1]) for own, batch in zip(shapes, batches, strict=True)
              if (found := fill_batch(batch, capacities))]  # fmt: skip
    return {
        "batch_size": batch_size,
        "batches": number,
        "different_shapes": len(set(shapes)),
        "capacities": len(capacities),
        "share_with_room": round(len(filled) / number, 4),
        "events": round(sum(room.events for _, room in filled) / sum(own.events for own, _ in filled), 3),
        "sets": round(sum(room.num_sets for _, room in filled) / sum(own.num_sets for own, _ in filled), 3),
    }


if __name__ == "__main__":
    main()
