from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess
from pipeline.prepare import inputs
from pipeline.prepare.inputs import compute_fingerprint
from pipeline.prepare.sources import csv_files as module
from pipeline.prepare.sources import table as table_module
from pipeline.prepare.sources.csv_files import cut_csv, parse_separator
from pipeline.prepare.sources.reading import FILE, ROW, Piece
from pipeline.prepare.sources.row_ends import find_row_ends
from pipeline.prepare.sources.table import Table
from pipeline.schema import UserError
from pipeline.storage.files import file_sha256

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
        patch.setattr(Table, "_find_numbers", lambda *_: set())  # texts are compared
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
    pieces, checksum = cut_csv(tmp_path / "a.csv", "a.csv")
    assert pieces == [
        Piece(files=("a.csv",), start=0, stop=4),
        Piece(files=("a.csv",), start=4, stop=14, first_row=1),
        Piece(files=("a.csv",), start=14, stop=18, first_row=2),
    ]
    assert checksum == file_sha256(tmp_path / "a.csv")


@given(st.lists(st.sampled_from([b"\n", b"\r\n", b'"', b"a", b",", b"\xc3\xbc"]), max_size=40), st.booleans())
def test_row_ends_are_line_feeds_outside_of_quotes(parts: list[bytes], inside: bool) -> None:
    content, quotes, ends = b"".join(parts), int(inside), []
    for at, byte in enumerate(content, start=1):
        quotes += byte == ord('"')
        if byte == ord("\n") and quotes % 2 == 0:
            ends.append(at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.prepare.sources.row_ends.COUNTED_BYTES", 3)
        for block in (content, bytearray(content)):
            assert find_row_ends(block, inside=inside) == (len(ends), max(ends, default=0))


def test_a_file_that_was_cut_is_not_read_again_for_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "PIECE_BYTES", 40)
    for name, rows in (("large.csv", 9), ("small.csv", 0)):
        (tmp_path / name).write_text("patient_id,minute,variable,value\n" + "p,0,hr,80\n" * rows)
    source = Table(path=tmp_path)
    pieces, checksums = source.cut()
    assert pieces == source.pieces()
    assert checksums == {"events/large.csv": file_sha256(tmp_path / "large.csv")}
    hashed: list[Path] = []
    monkeypatch.setattr(inputs, "file_sha256", lambda path: (hashed.append(path), file_sha256(path))[1])
    fingerprint = compute_fingerprint(source, {}, checksums=checksums)
    assert hashed == [tmp_path / "small.csv"]
    assert fingerprint == compute_fingerprint(source, {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "shift_jis", "cp037", "latin-1", "utf-8-sig"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("small", [True, False])
def test_texts_of_every_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, packed: str, small: bool
) -> None:
    text = "patient_id,minute,variable,value\r\n" + "".join(f'p{at},{at},"a\nu",{at}\r\n' for at in range(40))
    content = text.encode(encoding)
    (tmp_path / f"a.csv{packed}").write_bytes(gzip.compress(content) if packed else content)
    if small:
        monkeypatch.setattr("pipeline.prepare.sources.csv_files.PIECE_BYTES", 100)
        monkeypatch.setattr("pipeline.prepare.sources.csv_files.BLOCK_BYTES", 64)
        monkeypatch.setattr("pipeline.prepare.sources.table.PIECE_BYTES", 100)
    said = {} if encoding in ("utf-16", "utf-32", "utf-8-sig") else {"encoding": encoding}
    source = Table(path=tmp_path, **said)  # type: ignore[arg-type]
    rows = pl.concat(raw.rows for piece in source.pieces() for raw in source.read(piece))
    assert rows["patient_id"].to_list() == [f"p{at}" for at in range(40)]
    assert rows["row"].to_list() == list(range(1, 41))
    assert set(rows["variable"]) == {"a\nu"}


def test_a_text_that_is_cut_within_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("patient_id,minute,variable,value\np,0,hr,80\n".encode("utf-16")[:-1])
    source = Table(path=tmp_path)
    with pytest.raises(UserError, match=r"a.csv: cannot be read \(byte \d+ is no UTF-16"):
        list(source.read(source.pieces()[0]))
    (tmp_path / "a.csv").write_bytes("patient_id,minute,variable,value\np,0,hr,80\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"bytes of zero, as UTF-16 has\); say which it is, e.g. --encoding utf-16-le"):
        source.describe()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoding", "foo"], "'foo' is no encoding"),
        (["--encoding", "base64"], "'base64' is no encoding"),
        (["--separator", ";;"], "';;' is not one character"),
        (["--separator", ""], "'' is not one character"),
    ],
)
def test_encodings_and_separators_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "a.csv").write_text("patient_id,minute,variable,value\np,0,hr,80\n")
    assert preprocess.main([str(tmp_path / "a.csv"), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_tab_may_be_written_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient_id\tminute\tvariable\tvalue\np\t0\thr\t80\n")
    source = Table(path=tmp_path, separator=parse_separator("\\t"))
    assert [raw.rows.height for raw in source.read(source.pieces()[0])] == [1]
