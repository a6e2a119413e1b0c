"""The examples of docs/format.md are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import preprocess
from pipeline.schema import FORMAT_VERSION, VOCABULARY_FILE
from pipeline.shards import INDEX_SCHEMA, SHARD_SCHEMA, VOCABULARY_SCHEMA
from tests.conftest import closing_files

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    assert (
        preprocess.main(
            ["synthetic", "--num_patients", "30", "--shard_format", "both", "--output", str(folder / "DATA")]
        )
        == 0
    )
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=["pandas", "polars", "duckdb", "webdataset"])
def test_an_example_runs_and_gives_events(prepared: Path, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    monkeypatch.chdir(prepared)
    names: dict[str, Any] = {}
    with closing_files():
        exec(example, names)
    assert len(names["events"]) > 100


def test_every_column_is_named() -> None:
    for schema in (SHARD_SCHEMA, INDEX_SCHEMA, VOCABULARY_SCHEMA):
        for name in schema.names:
            assert f"`{name}`" in PAGE, name
    assert f"`FORMAT_VERSION` is {FORMAT_VERSION}" in PAGE
    assert VOCABULARY_FILE in PAGE
