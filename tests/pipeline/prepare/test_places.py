"""Prepare from a store and to a store: the bytes of local folders, whole or absent after any stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import preprocess
from pipeline.prepare.places import COMMAND, UPLOAD_FILE
from pipeline.schema import MANIFEST_FILE, UserError
from pipeline.storage.object_store import ObjectStore
from tests.object_store import BUCKET
from tests.object_store import ObjectStore as Server
from tests.pipeline.prepare.test_build import shard_bytes

HEADER = "patient_id,minute,variable,value\n"
TABLES = {
    f"{name}.csv": HEADER + "".join(f"{name}{number},{number % 7},v{number % 3},{number}\n" for number in range(40))
    for name in "ab"
}


@pytest.fixture(autouse=True)
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that takes no second to draw."""
    monkeypatch.setattr("preprocess.write_data_report", lambda output: (output / "report.html").write_text("report"))


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    (folder / "more").mkdir(parents=True)
    for name, content in TABLES.items():
        (folder / ("more" if name == "b.csv" else "") / name).write_text(content)
    return folder


def run(*arguments: object) -> int:
    return preprocess.main([str(argument) for argument in (*arguments, "--workers", 1, "--events_per_shard", 20)])


def contents(url: str, into: Path) -> dict[str, bytes]:
    """What lies at a URL, as ``shard_bytes`` has it of a folder."""
    found = ObjectStore(url)
    shutil.rmtree(into, ignore_errors=True)
    for name, stored in found.list_files().items():
        found.fetch(name, into / name, stored.num_bytes)
    return shard_bytes(into)


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_from_url_to_url_the_bytes_are_those_of_folders(
    store: Server, tables: Path, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tables, "--output", tmp_path / "local") == 0
    root = {"s3": f"{BUCKET}/{tmp_path.name}", "memory": tmp_path.name, "file": f"{tmp_path}/far"}[scheme]
    given, output, work = f"{scheme}://{root}/tables", f"{scheme}://{root}/data", tmp_path / "work"
    ObjectStore(given)._system.put(
        f"{tables}/", f"{root if scheme != 'memory' else '/' + root}/tables/", recursive=True
    )
    assert run(given, "--output", output, "--work_dir", work) == 0
    assert contents(output, tmp_path / "back") == shard_bytes(tmp_path / "local")
    assert {path.name for path in work.iterdir()} == {COMMAND}
    assert UPLOAD_FILE not in ObjectStore(output).list_files()
    capsys.readouterr()
    assert run(given, "--output", output, "--work_dir", work) == 0
    assert "here already" in capsys.readouterr().err
    assert run(given, "--output", output, "--work_dir", work, "--split_seed", 1) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert run(given, "--output", output, "--work_dir", work, "--split_seed", 1, "--overwrite") == 0
    assert run(tables, "--output", tmp_path / "local", "--split_seed", 1, "--overwrite") == 0
    assert contents(output, tmp_path / "back") == shard_bytes(tmp_path / "local")


def test_stopped_at_any_request_the_same_command_ends_it(
    store: Server, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tables, "--output", tmp_path / "local") == 0
    given = store.upload(tables, f"{tmp_path.name}/tables")
    left = 0

    def limit(request: Any) -> Any:
        def limited(self: ObjectStore, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("stopped")
            return request(self, *arguments)

        return limited

    output = f"s3://{BUCKET}/{tmp_path.name}/data"
    earlier: set[str] = set()
    done: list[bool] = []
    with monkeypatch.context() as patched:
        for name in ("fetch", "put", "put_bytes", "remove"):
            patched.setattr(ObjectStore, name, limit(getattr(ObjectStore, name)))
        while not any(done):
            left = 3 * len(done)
            done.append(run(given, "--output", output, "--work_dir", tmp_path / "work") == 0)
            there = set(ObjectStore(output).list_files())
            assert done[-1] == (MANIFEST_FILE in there and UPLOAD_FILE not in there)
            assert done[-1] or earlier <= there  # nothing is taken away that was copied
            earlier = there
    assert len(done) > 3
    assert contents(output, tmp_path / "back") == shard_bytes(tmp_path / "local")


def test_what_changed_in_the_store_is_fetched_again_and_what_is_gone_is_left_out(
    store: Server, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = store.upload(tables, f"{tmp_path.name}/tables")
    with monkeypatch.context() as patched:
        patched.setattr("preprocess.resolve_options", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        assert run(given, "--output", tmp_path / "data", "--work_dir", tmp_path / "work") == 2
    store.client.delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/tables/more/b.csv")
    changed = TABLES["a.csv"].replace("v1", "w1")
    store.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/tables/a.csv", Body=changed.encode())
    store.requests.clear()
    assert run(given, "--output", tmp_path / "data", "--work_dir", tmp_path / "work") == 0
    assert {key.rpartition("/")[2] for method, key in store.requests if method == "GET"} == {"a.csv"}
    (tables / "a.csv").write_text(changed)
    (tables / "more" / "b.csv").unlink()
    assert run(tables, "--output", tmp_path / "local") == 0
    assert shard_bytes(tmp_path / "data") == shard_bytes(tmp_path / "local")


def test_what_is_not_ours_is_left_alone(
    store: Server, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    store.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/letter.txt", Body=b"dear")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for arguments, why in (
        ((tables, "--output", url), "name a folder of this machine for the work with --work_dir"),
        ((tables, "--output", url, "--work_dir", tmp_path / "home"), "holds 'thesis.tex'"),
        ((tables, "--output", url, "--work_dir", tmp_path / "work"), "holds 'letter.txt' and no data set"),
        ((tables, "--output", tmp_path / "data", "--work_dir", tmp_path / "work"), "has no effect"),
        ((f"{url}/nothing", "--output", tmp_path / "data", "--work_dir", tmp_path / "work"), "no files here"),
    ):
        assert run(*arguments) == 2
        assert why in capsys.readouterr().err
    assert set(ObjectStore(url).list_files()) == {"letter.txt"}
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_a_name_that_leads_elsewhere_is_refused(store: Server, tmp_path: Path) -> None:
    store.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/a/../../b.csv", Body=b"x")
    with pytest.raises(UserError, match="no name of a file"):
        ObjectStore(f"s3://{BUCKET}/{tmp_path.name}").list_files()
