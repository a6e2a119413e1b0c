"""INPUT and ``--output`` in object storage: the work is done in a folder of this machine, between two copies.

Files of an input are copied to ``WORK_DIR/input`` before anything is read, and the data directory is made in
``WORK_DIR/output`` as it would be anywhere.  It is then copied to the URL: a note that an upload is under way, all
files, the manifest last.  So a data set is there whole or not at all, and the same command goes on after a kill: it
fetches what it has not, and copies what is not there yet.  In the end WORK_DIR is empty.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.dataset.manifest import Manifest
from pipeline.prepare.publish import FILES, WORK, check_same
from pipeline.schema import MANIFEST_FILE, SUMMARY_FILE, TASKS_FOLDER, UserError
from pipeline.storage.files import unseal, write_atomically
from pipeline.storage.folder import Folder
from pipeline.storage.object_store import ObjectStore, Stored, do_all, is_url

UPLOAD_FILE: Final = f"{WORK}/upload.json"
"""File at the URL that says that an upload is under way; what lies there without a manifest is then ours."""

COMMAND: Final = "command.json"
"""File in the work folder that says of which INPUT and output its content is; the process that works holds its lock."""

LISTING: Final = "listing.json"
"""File in the work folder that says which versions of the input's files were fetched."""

INPUT: Final = "input"
OUTPUT: Final = "output"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the input is read and the data directory is made, both on this machine, and where it goes then."""

    input: Path
    output: Path
    work: Path | None
    source: ObjectStore | None
    target: ObjectStore | None

    @classmethod
    @contextmanager
    def claim(cls, given: str, output: str, work_dir: Path | None) -> Iterator[Places]:
        """Find the places of a command's INPUT, ``--output`` and ``--work_dir``, and keep others from the work folder.

        Raises:
            UserError: a URL without a work folder, or the other way round, or that folder holds something else.
        """
        urls = [place for place in (given, output) if is_url(place)]
        if work_dir is None and urls:
            raise UserError(f"{urls[0]}: name a folder of this machine for the work with --work_dir")
        if work_dir is None:
            yield cls(Path(given), Path(output), None, None, None)
            return
        if not urls:
            raise UserError(f"--work_dir {work_dir}: has no effect where INPUT and --output are paths; leave it out")
        name = given.rstrip("/").rpartition("/")[2]
        places = cls(
            work_dir / INPUT / name if is_url(given) else Path(given),
            work_dir / OUTPUT if is_url(output) else Path(output),
            work_dir,
            ObjectStore(given) if is_url(given) else None,
            ObjectStore(output) if is_url(output) else None,
        )
        with _lock(work_dir, json.dumps({"input": given, "output": output})):
            yield places

    def fetch_input(self, log: Log) -> None:
        """Copy the files of an input at a URL to this machine: those that are not there, or have changed since."""
        if self.work is None or self.source is None:
            return
        store, listing = self.source, self.work / LISTING
        files = store.list_files()
        if not files:
            raise UserError(f"{store}: no files here; name a file or a folder of the store")
        earlier = json.loads(listing.read_bytes()) if listing.exists() else {}
        fetched = {name: Stored(*each) for name, each in earlier.items()}
        paths = {name: self.input / name if name else self.input for name in files}
        kept = {path for name, path in paths.items() if fetched.get(name) == files[name]}
        for path in [path for path in (self.work / INPUT).rglob("*") if path.is_file() and path not in kept]:
            path.unlink()
        write_atomically(listing, json.dumps(files).encode())
        missing = [name for name, path in paths.items() if not path.is_file()]
        amount = sum(files[name].num_bytes for name in missing)
        log(f"{len(missing):,} of {len(files):,} files are fetched, {amount / 2**20:,.0f} MiB")
        do_all(lambda name: store.fetch(name, paths[name], files[name].num_bytes), missing)

    def find_published(self) -> Manifest | None:
        """Return the manifest of the data set at the URL; None where there is no URL, or nothing whole at it.

        Raises:
            UserError: there are other files.
        """
        if self.target is None:
            return None
        files = self.target.list_files()
        if MANIFEST_FILE in files:
            return Manifest.load(_StoreFolder(self.target))
        if files and UPLOAD_FILE not in files:
            others = f"{self.target}: holds {min(files)!r} and no data set"
            raise UserError(f"{others}; name an empty or a new folder with --output")
        return None

    def check_published(self, manifest: Manifest, fingerprint: str) -> None:
        """Raise UserError unless the data set at the URL, of this manifest, has that fingerprint and is whole."""
        assert self.target is not None
        there = self.target.list_files()

        def is_there(name: str, size: int | None, _: str) -> bool:
            return name in there and size in (None, there[name].num_bytes)

        check_same(self.target, manifest, fingerprint, is_there)

    def upload(self, log: Log) -> None:
        """Copy the data directory to the URL, the manifest last; a data set that was there is removed first."""
        if self.target is None:
            return
        store, manifest = self.target, Manifest.load(self.output)
        paths = {path.relative_to(self.output).as_posix(): path for path in self.output.rglob("*") if path.is_file()}
        paths = {
            name: paths[name] for name in sorted(paths) if name != MANIFEST_FILE and not name.startswith(f"{WORK}/")
        }
        there = _prepare_target(store, manifest.fingerprint)
        shards = {entry.path: entry.num_bytes for entry in manifest.all_shards()}
        missing = [name for name in paths if name not in there or there[name].num_bytes != shards.get(name)]
        log(f"{len(missing):,} of {len(paths):,} files are copied to {store}")
        do_all(lambda name: store.put(paths[name], name), missing)
        there = store.list_files()
        for name, path in paths.items():
            if name not in there or there[name].num_bytes != path.stat().st_size:
                raise UserError(f"{store}/{name}: is not there as it was copied; run the same again")
        store.put(self.output / MANIFEST_FILE, MANIFEST_FILE)
        store.remove([UPLOAD_FILE])

    def read_summary(self) -> dict[str, Any]:
        """Return the summary of the data set at the URL."""
        assert self.target is not None
        advice = "give --overwrite to make the data set again"
        return unseal(json.loads(self.target.read(SUMMARY_FILE)), f"{self.target}/{SUMMARY_FILE}", advice)

    def clear(self) -> None:
        """Remove the copies on this machine."""
        if self.work is not None:
            _clear(self.work)


def _prepare_target(store: ObjectStore, fingerprint: str) -> dict[str, Stored]:
    """Note that an upload is under way, leave of earlier files only those of such an upload, and return these."""
    note, there = json.dumps({"fingerprint": fingerprint}).encode(), store.list_files()
    if MANIFEST_FILE in there:
        earlier = Manifest.load(_StoreFolder(store))
        store.put_bytes(note, UPLOAD_FILE)
        store.remove([MANIFEST_FILE])
        own = {*(entry.path for entry in earlier.all_shards()), *FILES}
        own |= {name for name in there if name.startswith(f"{TASKS_FOLDER}/")}
        store.remove(sorted(own & there.keys()))
        return {}
    if UPLOAD_FILE in there and store.read(UPLOAD_FILE) == note:
        return there
    store.put_bytes(note, UPLOAD_FILE)
    store.remove(sorted(there.keys() - {UPLOAD_FILE}))  # of an upload of something else
    return {}


class _StoreFolder(Folder):
    """A folder of a store of which small files are read."""

    repair_advice = "give --overwrite to make the data set again"

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store.url)
        self._store = store

    def read(self, name: str) -> bytes:
        return self._store.read(name)


@contextmanager
def _lock(work: Path, command: str) -> Iterator[None]:
    """Make the work folder this command's, and lock it; the system unlocks it when the process ends."""
    path = work / COMMAND
    if work.exists() and not path.exists() and any(work.iterdir()):
        raise UserError(f"--work_dir {work}: holds {min(each.name for each in work.iterdir())!r}; name a new folder")
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--work_dir {work}: another preprocess.py works here; wait for it") from None
        file.seek(0)
        if file.read() != command:
            _clear(work)
            file.truncate(0)
            file.write(command)
            file.flush()
        yield


def _clear(work: Path) -> None:
    for name in (INPUT, OUTPUT):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / LISTING).unlink(missing_ok=True)
