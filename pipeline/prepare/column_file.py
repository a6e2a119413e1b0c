"""Files of named flat arrays and texts, of which any range is read without the rest.

A file begins with the length of its header, the header as JSON (of each array the dtype, the number of elements and
the place), and the arrays one after another.  Texts are two arrays: their bytes, and where each begins.  Nothing is
mapped into memory: the system maps megabytes around what is touched, in each of a thousand files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.files import replace_atomically

HEAD_BYTES: Final = 4096
"""What is read at first, in which most headers lie."""

FEW: Final = 512
"""Elements that are read at once where a sorted array is searched: a page."""

Array = npt.NDArray[Any]


class ColumnFile:
    """Reads ranges of the arrays of a file; close it, or use :func:`open_columns`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        head = os.pread(self._file, HEAD_BYTES, 0)
        size = int.from_bytes(head[:8], "little")
        if size + 8 > len(head):
            head += _read(self._file, size + 8 - len(head), len(head))
        self._columns: dict[str, tuple[np.dtype[Any], int, int]] = {
            name: (np.dtype(dtype), length, place)
            for name, (dtype, length, place) in json.loads(head[8 : 8 + size]).items()
        }

    def close(self) -> None:
        os.close(self._file)

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._columns[name][0]

    def length(self, name: str) -> int:
        """Return the number of elements of an array."""
        return self._columns[name][1]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return elements ``start`` to ``stop`` of an array, which is read-only."""
        dtype, length, place = self._columns[name]
        stop = length if stop is None else stop
        content = _read(self._file, (stop - start) * dtype.itemsize, place + start * dtype.itemsize)
        return np.frombuffer(content, dtype)

    def read_texts(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """Return texts ``start`` to ``stop``, as large strings."""
        begins = self.read(f"{name}.begins", start, None if stop is None else stop + 1)
        content = self.read(f"{name}.bytes", int(begins[0]), int(begins[-1]))
        return pa.LargeStringArray.from_buffers(
            len(begins) - 1, pa.py_buffer(begins - begins[0]), pa.py_buffer(content)
        )

    def search(self, name: str, value: int) -> int:
        """Return the position of the first element of a sorted array that is not below ``value``."""
        low, high = 0, self.length(name)
        while high - low > FEW:
            middle = (low + high) // 2
            low, high = (low, middle) if self.read(name, middle, middle + 1)[0] >= value else (middle, high)
        found = self.read(name, low, high)
        return low + int(np.searchsorted(found, np.array(value, found.dtype)))


def _read(file: int, size: int, place: int) -> bytes:
    content = os.pread(file, size, place)
    while len(content) < size:  # the system gives 2 GiB at the most
        more = os.pread(file, size - len(content), place + len(content))
        if not more:
            raise OSError(f"a file of the work folder ends {size - len(content)} bytes too early")
        content += more
    return content


@contextmanager
def open_columns(path: Path) -> Iterator[ColumnFile]:
    """Open a file of arrays for reading."""
    file = ColumnFile(path)
    try:
        yield file
    finally:
        file.close()


class ColumnWriter:
    """Writes arrays of known dtypes and lengths, each piece by piece."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[Any, int]]) -> None:
        """Begin the file ``path``; ``columns`` are dtype and number of elements by name."""
        dtypes = {name: np.dtype(dtype) for name, (dtype, _) in columns.items()}
        sizes = [dtypes[name].itemsize * length for name, (_, length) in columns.items()]
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
        size = 96 + sum(len(json.dumps(name)) + 64 for name in columns)  # no header is longer
        places = {name: 8 + size + offset for name, offset in zip(columns, offsets[:-1], strict=True)}
        header = {name: (dtypes[name].str, length, places[name]) for name, (_, length) in columns.items()}
        self._file = path.open("wb")
        self._file.write(size.to_bytes(8, "little") + json.dumps(header).encode().ljust(size))
        self._file.truncate(8 + size + offsets[-1])
        self._dtypes, self._places = dtypes, places

    def append(self, name: str, values: Array) -> None:
        """Write the next elements of an array."""
        content = np.ascontiguousarray(values, self._dtypes[name])
        self._file.seek(self._places[name])
        self._file.write(content.data if content.size else b"")
        self._places[name] += content.nbytes

    def append_texts(self, name: str, texts: pa.Array) -> None:
        """Write all texts under a name, whose arrays are of :func:`measure_texts`."""
        begins, content = split_texts(texts)
        self.append(f"{name}.begins", begins)
        self.append(f"{name}.bytes", content)

    def close(self) -> None:
        self._file.close()


def measure_texts(name: str, texts: pa.Array) -> dict[str, tuple[Any, int]]:
    """Return dtypes and lengths of the arrays in which texts are kept."""
    begins, content = split_texts(texts)
    return {f"{name}.begins": (np.int64, len(begins)), f"{name}.bytes": (np.uint8, len(content))}


def split_texts(texts: pa.Array) -> tuple[Array, Array]:
    """Return where each text begins, and the end of the last, and the bytes of all texts in UTF-8."""
    large = texts.cast(pa.large_string())
    begins = np.frombuffer(large.buffers()[1], np.int64)[large.offset : large.offset + len(large) + 1]
    content = large.buffers()[2]
    found = np.frombuffer(content, np.uint8) if content is not None and content.size else np.zeros(0, np.uint8)
    return begins - begins[0], found[begins[0] : begins[-1]]


def write_columns(path: Path, arrays: Mapping[str, Array], texts: Mapping[str, pa.Array] | None = None) -> None:
    """Write a file of arrays and texts, whole or not at all, unless power is lost."""
    columns: dict[str, tuple[Any, int]] = {name: (array.dtype, len(array)) for name, array in arrays.items()}
    for name, values in (texts or {}).items():
        columns |= measure_texts(name, values)
    with replace_atomically(path, is_synced=False) as temporary:
        writer = ColumnWriter(temporary, columns)
        try:
            for name, array in arrays.items():
                writer.append(name, array)
            for name, values in (texts or {}).items():
                writer.append_texts(name, values)
        finally:
            writer.close()
