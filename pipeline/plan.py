"""``python -m pipeline.plan DIR``: print what each policy of batching would do to a data directory."""

from __future__ import annotations

import sys

from pipeline.reports.plan_table import main

if __name__ == "__main__":
    sys.exit(main())
