"""The feed-forward over inducing rows, forward and backward: whole against in pieces, as shares of the matrix rate.

python -m benchmarks.feed_forward [--output FILE.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.machine import describe, measure_matrix_rate, publish
from model import feed_forward
from model.feed_forward import FeedForward

ROWS, WIDTH, HIDDEN = 18_000, 256, 512  # a batch of 16 intensive-care stays at the reference preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    block, x, weight = (
        FeedForward(WIDTH, HIDDEN),
        torch.randn(ROWS, WIDTH, requires_grad=True),
        torch.randn(ROWS, WIDTH),
    )
    flops = 3 * 2 * 2 * ROWS * WIDTH * HIDDEN

    def whole() -> None:
        block.contract(F.relu(block.expand(x))).backward(weight)

    def pieces() -> None:
        block(x).backward(weight)

    result: dict[str, object] = {**describe(), "rows": ROWS, "width": WIDTH, "hidden": HIDDEN}
    result["float32_matrix_gflops"] = round(measure_matrix_rate(torch.float32) / 1e9, 1)
    result["whole_gflops"] = round(flops / seconds(whole) / 1e9, 1)
    for rows in (512, 1024, 2048, 4096):
        feed_forward.PIECE_ROWS = rows
        result[f"pieces_of_{rows}_gflops"] = round(flops / seconds(pieces) / 1e9, 1)
    publish(result, options.output)


def seconds(work: Callable[[], None], repeats: int = 12) -> float:
    """Median time of ``work``."""
    runs = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return sorted(runs[2:])[repeats // 2]


if __name__ == "__main__":
    main()
