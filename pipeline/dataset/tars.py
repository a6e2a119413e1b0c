"""WebDataset shards: a tar of samples, a sample a patient, three members a sample.

    <shard>-<number>.json         {"patient_id": string, "label": 0, 1 or null}
    <shard>-<number>.sets.npy     [num_sets] of (minute float64, set_size int32)
    <shard>-<number>.events.npy   [num_events] of (code int32, value float32); value is NaN where there is no number

Three members, not one an array: plain ``webdataset`` reads them 1.5 times as fast (set A, 4,700 patients/s for 3,100),
and the tar is a fifth smaller.  Headers hold no time and no owner: equal patients make equal bytes.

Reading walks the headers once and joins the arrays' bytes; nothing is extracted, unpickled or used as a path.
"""

from __future__ import annotations

import json
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import offsets_from_sizes

Structured: TypeAlias = npt.NDArray[np.void]

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
SETS: Final = np.dtype([("minute", "<f8"), ("set_size", "<i4")])
EVENTS: Final = np.dtype([("code", "<i4"), ("value", "<f4")])
SUFFIXES: Final = ("json", "sets.npy", "events.npy")
NPY_HEADER_BYTES: Final = 128
_NO_MEMBER: Final = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def write_tar(table: pa.Table, path: Path, shard: str) -> None:
    """Write the patients of ``table`` (``pipeline.dataset.schemas.SHARD_SCHEMA``) in order; ``shard`` begins their
    keys.
    """
    columns = table.combine_chunks()
    num_sets, num_events = (columns[name].to_numpy() for name in ("num_sets", "num_events"))
    sets = np.empty(num_sets.sum(dtype=np.int64), SETS)
    events = np.empty(num_events.sum(dtype=np.int64), EVENTS)
    for array, names in ((sets, SETS.names), (events, EVENTS.names)):
        for name in names or ():
            flat = columns[name].combine_chunks().flatten()
            array[name] = flat.to_numpy(zero_copy_only=False)  # null becomes NaN
    set_offsets, event_offsets = offsets_from_sizes(num_sets).tolist(), offsets_from_sizes(num_events).tolist()
    with path.open("wb") as file:
        for number, (patient_id, label) in enumerate(
            zip(columns["patient_id"].to_pylist(), columns["label"].to_pylist(), strict=True)
        ):
            facts = json.dumps({"patient_id": patient_id, "label": label}, ensure_ascii=False)
            contents = (
                facts.encode(),
                _npy(sets[set_offsets[number] : set_offsets[number + 1]]),
                _npy(events[event_offsets[number] : event_offsets[number + 1]]),
            )
            for suffix, content in zip(SUFFIXES, contents, strict=True):
                file.write(_header(f"{shard}-{number:07d}.{suffix}".encode(), len(content)))
                file.write(content)
                file.write(bytes(-len(content) % BLOCK))
        file.write(END)


def _header(name: bytes, size: int) -> bytes:
    """As ``tarfile`` makes it, in a sixth of the time."""
    fields = (name.ljust(100, b"\0"), _NO_MEMBER[100:124], b"%011o\0" % size, _NO_MEMBER[136:148], b" " * 8)
    header = b"".join(fields) + _NO_MEMBER[156:]
    return header[:148] + b"%06o\0" % sum(header) + header[155:]


@lru_cache(maxsize=1 << 12)
def _npy_header(dtype: np.dtype[np.void], size: int) -> bytes:
    """As ``numpy.save`` writes it for an array [size]."""
    text = f"{{'descr': {dtype.descr!r}, 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\1\0\x76\0" + text.ljust(NPY_HEADER_BYTES - 11).encode() + b"\n"


def _npy(array: Structured) -> bytes:
    return _npy_header(array.dtype, len(array)) + array.tobytes()


def read_tar(path: Path) -> pa.Table:
    """The table that :func:`write_tar` wrote, but for the order of columns.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tar as ``write_tar`` writes it.
    """
    content = memoryview(path.read_bytes())
    members = _members(content)
    if len(members) % len(SUFFIXES):
        raise ValueError(f"{len(members)} members, {len(SUFFIXES)} make a patient")
    facts = json.loads(b"[" + b",".join(members[0 :: len(SUFFIXES)]) + b"]")
    if len(facts) * len(SUFFIXES) != len(members):
        raise ValueError("the members .json are not one object each")
    sets, num_sets = _join(members[1 :: len(SUFFIXES)], SETS)
    events, num_events = _join(members[2 :: len(SUFFIXES)], EVENTS)
    set_offsets, event_offsets = offsets_from_sizes(num_sets), offsets_from_sizes(num_events)
    return pa.table(
        {
            "patient_id": pa.array([fact["patient_id"] for fact in facts], pa.string()),
            "label": pa.array([fact["label"] for fact in facts], pa.int8()),
            "num_events": num_events,
            "num_sets": num_sets,
            "minute": _lists(set_offsets, sets["minute"]),
            "set_size": _lists(set_offsets, sets["set_size"]),
            "code": _lists(event_offsets, events["code"]),
            "value": _lists(event_offsets, events["value"]),
        }
    )


def _members(content: memoryview) -> list[memoryview]:
    """The content of all members; their names must be those of samples one after the other."""
    members: list[memoryview] = []
    start, key = 0, b""
    while (header := content[start : start + BLOCK]) != END[:BLOCK]:
        name = bytes(header[:100]).rstrip(b"\0")
        size = int(bytes(header[124:135]), 8)
        number, suffix = divmod(len(members), len(SUFFIXES))
        stem, _, rest = name.partition(b".")
        key = key if suffix else stem
        if stem != key or rest != SUFFIXES[suffix].encode() or not key.endswith(b"-%07d" % number):
            raise ValueError(f"member {name!r} stands where the {SUFFIXES[suffix]} of patient {number} should")
        start += BLOCK
        if not 0 <= size <= len(content) - start:
            raise ValueError(f"member {name!r} has {size} bytes, the file {len(content) - start} more")
        members.append(content[start : start + size])
        start += size + -size % BLOCK
    return members


def _join(arrays: list[memoryview], dtype: np.dtype[np.void]) -> tuple[Structured, npt.NDArray[np.int32]]:
    """The arrays of all patients one after another, and [P] int32 the number of items of each."""
    sizes = [(len(array) - NPY_HEADER_BYTES) // dtype.itemsize for array in arrays]
    for array, size in zip(arrays, sizes, strict=True):
        header, values = array[:NPY_HEADER_BYTES], array[NPY_HEADER_BYTES:]
        if header != _npy_header(dtype, size) or len(values) != size * dtype.itemsize:
            raise ValueError(f"an array is not of {dtype.descr}")
    return np.frombuffer(b"".join(array[NPY_HEADER_BYTES:] for array in arrays), dtype), np.array(sizes, np.int32)


def _lists(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.Array:
    """Of one field of all items; NaN becomes null."""
    return pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(np.ascontiguousarray(values), from_pandas=True))
