"""Damage to files, drawn from a generator."""

from __future__ import annotations

import os
import random
from pathlib import Path

KINDS = ("flip", "truncate", "swap", "delete")


def harm(path: Path, rng: random.Random, kind: str, other: bytes) -> str:
    """Damage the file; ``other`` is the content of another of its kind.  Says what was done."""
    content = bytearray(path.read_bytes())
    if kind == "flip":
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {place} of {path.name}"
    if kind == "truncate":
        size = rng.randrange(len(content))
        os.truncate(path, size)
        return f"{path.name} cut to {size}"
    if kind == "swap":
        path.write_bytes(other)
        return f"another {path.name}"
    path.unlink()
    return f"no {path.name}"
