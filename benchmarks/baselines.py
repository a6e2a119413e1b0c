"""Trees and logistic regression on a data set's test split: what a model must beat.

python -m benchmarks.baselines DATA [--output FILE.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, publish
from model.config import Outcome
from pipeline.loading.loader import make_loader
from training.baselines import fit_baselines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    publish({**describe(), **of_data(options.data)}, options.output)


def of_data(data: Path) -> dict[str, Any]:
    train, test = (make_loader(data, split=split, batch_size=64, shuffle=False) for split in ("train", "test"))
    return fit_baselines(train, test, train.manifest.num_codes, (Outcome(),))[0]


if __name__ == "__main__":
    main()
