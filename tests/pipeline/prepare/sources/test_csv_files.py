from __future__ import annotations

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.sources import csv_files as module
from pipeline.prepare.sources import table as table_module
from pipeline.prepare.sources.csv_files import cut_csv
from pipeline.prepare.sources.reading import FILE, ROW, Piece
from pipeline.prepare.sources.table import Table

cells = st.sampled_from(["", "1", "a,b", 'say "x"', "two\nlines", '"', "\n", '\n"\n', "ü" * 20])
rows = st.lists(st.tuples(cells, cells, cells, cells), min_size=1, max_size=30)
NAMES = ("patient_id", "minute", "variable", "value")


@given(rows, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.integers(1, 80), st.integers(1, 40))
def test_pieces_together_are_the_file(
    rows: list[tuple[str, ...]], end: str, quote_all: bool, last_end: bool, piece_bytes: int, block_bytes: int
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerows([NAMES, *rows])
    content = text.getvalue() if last_end else text.getvalue().removesuffix(end)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "rows.csv"
        path.write_text(content, newline="")
        source = Table(path=path)
        (whole,) = source.pieces()
        expected = next(source.read(whole)).rows
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        patch.setattr(table_module, "PIECE_BYTES", 0)
        pieces = source.pieces()
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == path.stat().st_size
        read = [next(source.read(piece)).rows for piece in pieces]
    together = pl.concat(frame for frame in read if frame.height)
    assert together.rows() == expected.rows()
    assert together[ROW].to_list() == list(range(1, len(rows) + 1))
    assert (together[FILE] == 0).all()


def test_a_cut_is_after_a_row_and_not_within_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4)
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"\n\n\n\n\n"\n2,3\n')
    assert cut_csv(tmp_path / "a.csv", "a.csv") == [
        Piece(files=("a.csv",), start=0, stop=4),
        Piece(files=("a.csv",), start=4, stop=14, first_row=1),
        Piece(files=("a.csv",), start=14, stop=18, first_row=2),
    ]
