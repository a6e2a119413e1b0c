from __future__ import annotations

import subprocess
import sys

import pytest

import pipeline
from pipeline import schema


def test_codes_of_padding_unknown_and_variables_do_not_meet() -> None:
    assert (schema.PADDING_CODE, schema.UNKNOWN_CODE, schema.FIRST_CODE) == (0, 1, 2)


def test_a_user_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="give --x"):
        raise schema.UserError("give --x")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("pipeline", "torch"),
        ("pipeline.sampling.plan", "torch"),
        ("pipeline.sampling.plan", "pyarrow"),
        ("pipeline.reports.plan_table", "torch"),
        ("preprocess", "matplotlib"),
        ("train", "matplotlib"),
        ("pipeline.dataset.shards", "torch"),
        ("pipeline.loading.loader", "polars"),
        ("pipeline.loading.loader", "webdataset"),
    ],
)
def test_imports_stay_light(module: str, unwanted: str) -> None:
    program = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_package_exports_what_it_says() -> None:
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__name__ == name.replace("make_loader", "PatientLoader")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipeline.nothing
