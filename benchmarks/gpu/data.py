"""Write the made-up data directory on which ``benchmarks/gpu.sh`` measures where it is given none.

    python -m benchmarks.gpu.data DIRECTORY [--quick]

It is written with pyarrow alone, seeded, and its outcome can be learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.synthetic import write_synthetic_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quick", action="store_true", help="write few, short patients")
    options = parser.parse_args()
    size = {"num_patients": 60, "sets": 12} if options.quick else {"num_patients": 2000}
    write_synthetic_data(options.directory, **size)


if __name__ == "__main__":
    main()
