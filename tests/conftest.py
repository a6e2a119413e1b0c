"""Data that more than one test needs: tiny data directories, and the real ICU stays where they are there."""

from __future__ import annotations

import gc
import os
import signal
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.data_dirs import Patient, make_patients, write_data_dir
from tests.pages import draw, draw_nothing

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background ignores it, and so would the processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Kernels are interpreted where they cannot run; Triton asks for it when it is imported, by whatever comes first.
    os.environ["TRITON_INTERPRET"] = "1"

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "physionet2012"


def ragged_sizes(num_patients: int, *, seed: int = 0) -> list[list[int]]:
    """Set sizes of ICU-like patients: 1 to 12 sets of 1 to 8 events."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 9, rng.integers(1, 13)).tolist() for _ in range(num_patients)]


@contextmanager
def closing_files() -> Iterator[None]:
    """For webdataset, which leaves closing its files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _draws_nothing() -> Iterator[None]:
    with draw_nothing():
        yield


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """For the tests of reports, which look at figures."""
    with draw():
        yield


@pytest.fixture(scope="session")
def patients() -> list[Patient]:
    """53 patients: a prime, so that the last batch is smaller and shares are uneven."""
    return make_patients(ragged_sizes(53))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, patients: list[Patient]) -> Path:
    """Train: ``patients`` in shards of 5; valid: one patient; test: none.  Do not change it."""
    valid = make_patients([[2, 3]], prefix="v")
    return write_data_dir(tmp_path_factory.mktemp("data"), {"train": patients, "valid": valid, "test": []})


@pytest.fixture(scope="session")
def outcomes_a() -> Path:
    """Outcomes of PhysioNet-2012 set A."""
    return _real("Outcomes-a.txt")


@pytest.fixture(scope="session")
def set_a_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 4,000 records of PhysioNet-2012 set A."""
    archive = _real("set-a.tar.xz")
    target = tmp_path_factory.mktemp("physionet2012")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / "set-a"


def _real(name: str) -> Path:
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"PhysioNet-2012 set A is not at {REAL_DATA}")
    return path


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    from tests.object_store import ObjectStore  # half a second that few tests need

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def store(_object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server on this machine, the only one that can be found, with a cache of its own for this test."""
    from tests.object_store import ENVIRONMENT

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": _object_store.url}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    yield _object_store
    _object_store.reset()
