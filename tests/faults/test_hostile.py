"""Data sets from strangers: they run nothing, reach no file but their own, and their claims take no memory."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import preprocess
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import load_embeddings
from pipeline.loading.loader import make_loader
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import Policy
from pipeline.schema import EMBEDDINGS_FILE, UserError
from pipeline.storage.files import file_sha256
from training.memory import StepMemory
from training.report import write_run_report

Tried = Callable[[str, int], None]

PATHS = [
    *["../../x.parquet", "/etc/passwd", "train/../../x.parquet", "train/x/../../../y.parquet", "train/.."],
    *["train/00000.pkl", "index.parquet", "train\\00000.parquet", "train/00000.parquet\n", "train/\u0660.parquet", ""],
]


def with_first_shard(data: Path, tmp_path: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    manifest = Manifest.load(copy)
    first, *others = manifest.splits["train"]
    changed = dataclasses.replace(first, **changes)  # type: ignore[arg-type]
    dataclasses.replace(manifest, splits={**manifest.splits, "train": [changed, *others]}).save(copy)
    return copy


@pytest.mark.parametrize("path", PATHS)
def test_a_manifest_names_no_other_place(data_dir: Path, tmp_path: Path, path: str, tried: Tried) -> None:
    (tmp_path / "x.parquet").write_text("somebody's")
    copy = with_first_shard(data_dir, tmp_path, path=path)
    with pytest.raises(UserError, match=r"which is no place of a shard"):
        Manifest.load(copy)
    # Neither is what it names removed in order to be replaced.
    given = ["synthetic", "--num_patients", "9", "--workers", "1", "--output", str(copy), "--overwrite"]
    assert preprocess.main(given) == 2
    assert (tmp_path / "x.parquet").read_text() == "somebody's"
    tried("a manifest that names another place", 1)


@pytest.mark.parametrize("claim", [10**10, 2**31, 2**62, 0, -1])
@pytest.mark.parametrize("field", ["num_patients", "num_sets", "num_events"])
def test_a_claim_takes_no_memory(data_dir: Path, tmp_path: Path, field: str, claim: int, tried: Tried) -> None:
    copy = with_first_shard(data_dir, tmp_path, **{field: claim})
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match=r"cannot hold as much as it says"):
        list(make_loader(copy, split="train", batch_size=4))
    assert psutil.Process().memory_info().rss - before < 1 << 28
    tried("a claim that is not true", 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 768), }", "cannot be read"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }", "cannot be read"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", "holds float32"),
        ("__import__('os').system('true')", "cannot be read"),
    ],
)
def test_embeddings_of_a_stranger(data_dir: Path, tmp_path: Path, header: str, message: str, tried: Tried) -> None:
    copy = Path(shutil.copytree(data_dir, tmp_path / "copy"))
    body = io.BytesIO()
    text = header.ljust(117) + "\n"
    body.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24))
    (copy / EMBEDDINGS_FILE).write_bytes(body.getvalue())
    manifest = Manifest.load(copy)
    files = {**manifest.files, EMBEDDINGS_FILE: file_sha256(copy / EMBEDDINGS_FILE)}
    manifest = dataclasses.replace(manifest, files=files, embedding_dim=3)
    with pytest.raises(UserError, match=f"{EMBEDDINGS_FILE}: {message}"):
        load_embeddings(copy, manifest)
    tried("embeddings of a stranger", 1)


def test_more_events_than_32_bits_count_are_planned() -> None:
    """Lengths alone: nothing of that size is allocated."""
    num_events = np.full(30_000, 100_000, np.int32)
    plan = plan_epoch(num_events, np.full(30_000, 10, np.int32), Policy(batch_size=16), seed=0, epoch=0)
    assert int(num_events.sum(dtype=np.int64)) > 2**31
    assert sorted(np.concatenate([plan.patients(step) for step in range(plan.num_batches)]).tolist()) == list(
        range(30_000)
    )


@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "metrics.jsonl", "memory_model.json"])
def test_json_without_end_is_named(tmp_path: Path, name: str, tried: Tried) -> None:
    """A parser that calls itself for each bracket comes to its end."""
    (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000 + "\n")
    read: dict[str, Callable[[], object]] = {
        "manifest.json": lambda: Manifest.load(tmp_path),
        "summary.json": lambda: write_run_report(tmp_path),
        "metrics.jsonl": lambda: write_run_report(tmp_path),
        "memory_model.json": lambda: StepMemory.load(tmp_path / name),
    }
    with pytest.raises(UserError, match=name.partition(".")[0]):
        read[name]()
    tried("JSON nested without end", 1)
