from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import tars
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import SHARD_SCHEMA
from pipeline.dataset.shards import read_shard, write_shard
from pipeline.dataset.tars import EVENTS, SETS, read_tar, write_tar
from pipeline.loading.loader import make_loader
from pipeline.schema import SPLITS, UserError
from tests.conftest import closing_files, ragged_sizes
from tests.data_dirs import make_patients, shard_table, write_data_dir
from tests.pipeline.loading.test_batch import assert_equal


@pytest.fixture
def table() -> pa.Table:
    return shard_table(make_patients([[1], [2, 3], [1, 1, 40]]))


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 99))
def test_a_tar_gives_back_the_table(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], seed: int
) -> None:
    table = shard_table(make_patients(sizes, seed=seed))
    path = tmp_path_factory.mktemp("tar") / "00000.tar"
    write_tar(table, path, "00000")
    assert read_tar(path).cast(SHARD_SCHEMA).equals(table)


def test_a_static_set_keeps_its_null_minute(tmp_path: Path) -> None:
    table = shard_table(make_patients([[2, 1], [1]]))
    minutes = [[None, *minutes[1:]] for minutes in table["minute"].to_pylist()]
    field = SHARD_SCHEMA.field("minute")
    table = table.set_column(SHARD_SCHEMA.names.index("minute"), field, pa.array(minutes, field.type))
    write_tar(table, tmp_path / "a.tar", "a")
    assert read_tar(tmp_path / "a.tar").cast(SHARD_SCHEMA).equals(table)


def test_a_part_of_a_table_is_written_as_that_part(tmp_path: Path, table: pa.Table) -> None:
    write_tar(table.slice(1), tmp_path / "a.tar", "a")
    assert read_tar(tmp_path / "a.tar").cast(SHARD_SCHEMA).equals(table.slice(1))


def test_both_formats_are_one_data_set(tmp_path: Path) -> None:
    """Read by the loader, batch for batch, and bit for bit."""
    patients = make_patients(ragged_sizes(30))
    splits = {"train": patients, "valid": patients[:3], "test": []}
    loaders = [
        make_loader(write_data_dir(tmp_path / name, splits, suffix=suffix), batch_size=4)
        for name, suffix in (("parquet", ".parquet"), ("tars", ".tar"))
    ]
    for mine, other in zip(*loaders, strict=True):
        assert_equal(mine, other)
    for split in SPLITS[:2]:
        for entry, tar in zip(
            *(Manifest.load(tmp_path / name).splits[split] for name in ("parquet", "tars")), strict=True
        ):
            first, second = read_shard(tmp_path / "parquet", entry), read_shard(tmp_path / "tars", tar)
            assert first.patient_id.equals(second.patient_id)
            for name in set(type(first).__slots__) - {"patient_id"}:
                mine, other = getattr(first, name), getattr(second, name)
                assert mine.dtype == other.dtype
                assert mine.tobytes() == other.tobytes()


def test_headers_are_those_of_tarfile_and_of_numpy(tmp_path: Path, table: pa.Table) -> None:
    write_tar(table, tmp_path / "a.tar", "a")
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == [
        "a-0000000.events.npy", "a-0000000.json", "a-0000000.sets.npy", "a-0000001.events.npy",
    ]  # fmt: skip
    for member in members:
        assert (member.uid, member.gid, member.mtime, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        plain = tarfile.TarInfo(member.name)
        plain.size = member.size
        header = (tmp_path / "a.tar").read_bytes()[member.offset : member.offset + 512]
        assert header == plain.tobuf(tarfile.USTAR_FORMAT)
    for dtype in (SETS, EVENTS):
        for size in (0, 1, 12_345, 123_456_789):
            written = io.BytesIO()
            np.save(written, np.empty(min(size, 12_345), dtype))
            assert tars._npy(np.zeros(min(size, 12_345), dtype))[:128] == written.getvalue()[:128]
            assert len(tars._npy_header(dtype, size)) == 128


def test_the_members_of_a_sample_may_have_another_order(tmp_path: Path, table: pa.Table) -> None:
    """As data sets have that were written before, or by other programs."""
    write_tar(table, tmp_path / "a.tar", "a")
    order = (1, 2, 0, 4, 5, 3, 6, 7, 8)
    (tmp_path / "a.tar").write_bytes(reordered(order)((tmp_path / "a.tar").read_bytes()))
    assert read_tar(tmp_path / "a.tar").cast(SHARD_SCHEMA).equals(table)


def test_parquet_needs_no_webdataset(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['webdataset'] = None\n"
        "from pathlib import Path\n"
        "from pipeline.loading.loader import make_loader\n"
        "print(len(list(make_loader(Path(sys.argv[1]), split='train', batch_size=4))))\n"
    )
    data = write_data_dir(tmp_path, {"train": make_patients([[1]] * 8), "valid": [], "test": []})
    done = subprocess.run([sys.executable, "-c", program, data], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    patients = make_patients([[1], [2, 3], [1, 1, 40]])
    write_shard(shard_table(patients), tmp_path, "train/00007.tar")
    with closing_files():
        samples = list(webdataset.WebDataset(str(tmp_path / "train/00007.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"00007-000000{number}" for number in range(3)]
    for sample, patient in zip(samples, patients, strict=True):
        assert sample["json"] == {"patient_id": patient.patient_id}
        assert sample["sets.npy"].tolist() == [(minute, len(events)) for minute, events in patient.sets]
        expected = [(code, np.nan if value is None else value) for _, events in patient.sets for code, value in events]
        assert sample["events.npy"].dtype == EVENTS
        assert sample["events.npy"].tobytes() == np.array(expected, EVENTS).tobytes()


def member(number: int, content: bytes, name: str | None = None) -> Callable[[bytes], bytes]:
    """Replaces the content, and perhaps the name, of one member."""

    def harm(tar: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=out, mode="w") as new:
            for place, info in enumerate(old.getmembers()):
                file = old.extractfile(info)
                assert file is not None
                body = content if place == number else file.read()
                info.name = name if place == number and name else info.name
                info.size = len(body)
                new.addfile(info, io.BytesIO(body))
        return out.getvalue()

    return harm


def reordered(order: tuple[int, ...]) -> Callable[[bytes], bytes]:
    """Writes the members of these positions alone, in this order."""

    def harm(tar: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=out, mode="w") as new:
            members = old.getmembers()
            for place in order:
                new.addfile(members[place], old.extractfile(members[place]))
        return out.getvalue()

    return harm


def pickled() -> bytes:
    written = io.BytesIO()
    np.save(written, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return written.getvalue()


@pytest.mark.parametrize(
    "harm",
    [
        lambda tar: b"",
        lambda tar: b"no tar",
        lambda tar: tar[:700],
        lambda tar: tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512],  # no blocks that end it
        lambda tar: tar[:156] + b"S" + tar[157:],  # sparse: it may claim any size
        gzip.compress,
        reordered((0, 1, 3, 2)),
        reordered((0, 1, 2, 3, 4)),
        reordered((0, 1, 1)),
        lambda tar: tar[:124] + b"77777777777\0" + tar[136:],  # 8 GiB
        lambda tar: tar[:124] + b"-0000000001\0" + tar[136:],
        lambda tar: tar[:124] + b"xxxxxxxxxxx\0" + tar[136:],
        member(1, b"{}"),
        member(1, b"{},{}"),
        member(1, b"1"),
        member(1, b"[" * 100_000),
        member(1, b'{"patient_id": 7}'),
        member(1, b'{"patient_id": null}'),
        member(1, b'{"patient_id": "p", "event_minute": 7}'),
        member(1, b'{"patient_id": "p"}', "../../etc/x-0000000.json"),
        member(1, b'{"patient_id": "p"}', "y-0000001.json"),
        member(2, b""),
        member(2, pickled()),
        member(0, pickled()),
        member(0, tars._npy(np.zeros(2, EVENTS)) + b"more"),
        member(0, tars._npy_header(EVENTS, 10**9)),
        member(0, tars._npy(np.zeros(2, EVENTS))),
    ],
)  # fmt: skip
def test_a_hostile_tar_is_refused_in_one_line(tmp_path: Path, table: pa.Table, harm: Callable[[bytes], bytes]) -> None:
    entry = write_shard(table, tmp_path, "train/x.tar")
    path = tmp_path / entry.path
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=r"train/x\.tar: ") as caught:
        read_shard(tmp_path, entry, verify=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"checksum differs|has \d+ bytes, the manifest says"):
        read_shard(tmp_path, entry)
    assert sorted(child.name for child in tmp_path.rglob("*")) == ["train", "x.tar"]


def test_no_part_of_a_tar_is_read_as_a_whole(tmp_path: Path, table: pa.Table) -> None:
    """Cut after any byte of the members, an odd part of a header too."""
    entry = write_shard(table, tmp_path, "train/x.tar")
    content = (tmp_path / entry.path).read_bytes()
    size = len(content.rstrip(b"\0"))
    for cut in {*range(0, size, 37), *range(0, 1024), size - 1}:
        (tmp_path / entry.path).write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"train/x\.tar: "):
            read_shard(tmp_path, entry, verify=False)


def test_json_of_any_id_comes_back(tmp_path: Path) -> None:
    ids = ["../ü", 'a"b\n', "\x00", "日本", "a" * 1000]
    rows = shard_table(make_patients([[1]] * len(ids)))
    rows = rows.set_column(0, SHARD_SCHEMA.field("patient_id"), pa.array(ids))
    write_tar(rows, tmp_path / "a.tar", "a")
    assert read_tar(tmp_path / "a.tar")["patient_id"].to_pylist() == ids
