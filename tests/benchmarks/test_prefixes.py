"""``benchmarks/prefixes.py``: samples are spread over the hours, and each number of them is measured both ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import prefixes
from tests.data_dirs import make_patients, write_data_dir


def test_each_number_of_samples_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    write_data_dir(data, {"train": make_patients([[3, 1, 2]] * 4), "valid": [], "test": []})
    monkeypatch.setattr(sys, "argv", ["prefixes", str(data), "--samples", "1", "9", "--rounds", "1"])
    prefixes.main()
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert list(ways) == ["1 shared", "1 separate", "9 shared"]
    assert all(seconds["step"] > 0 and seconds["prepare"] > 0 for seconds in ways.values())
    assert ways["1 shared"]["step_over_first"] == 1
