from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import files
from pipeline.storage.files import file_crc32


@pytest.mark.parametrize("chunk_bytes", [1, 4, 1 << 20])
def test_the_checksum_of_a_file_is_that_of_its_standard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """CRC-32 of "123456789" is given as its check value wherever it is defined."""
    monkeypatch.setattr(files, "HASHED_BYTES", chunk_bytes)
    (tmp_path / "digits").write_bytes(b"123456789")
    (tmp_path / "empty").touch()
    assert file_crc32(tmp_path / "digits") == "9-cbf43926"
    assert file_crc32(tmp_path / "empty") == "0-00000000"
