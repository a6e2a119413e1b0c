"""Keyed hashes in place of patients' ids, from the first file that is written on."""

from __future__ import annotations

import hmac
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import polars as pl

from pipeline.prepare import names
from pipeline.prepare.sources.source import patient_ids
from pipeline.schema import PATIENT_ID, VALUE, UserError

LEAST_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Half of an HMAC-SHA256: 128 bits, in hexadecimal.  The same key gives a name the same pseudonym anywhere."""

    key: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The key is the whole file.

        Raises:
            UserError: it cannot be read, is short, or is not its owner's alone.
        """
        try:
            key, mode = path.read_bytes(), path.stat().st_mode
        except OSError as error:
            raise UserError(f"--pseudonymize {path}: cannot be read ({error.strerror})") from None
        if len(key) < LEAST_KEY_BYTES:
            make = f"head -c {LEAST_KEY_BYTES} /dev/urandom > FILE"
            raise UserError(f"--pseudonymize {path}: {len(key)} bytes, {LEAST_KEY_BYTES} are needed; {make}")
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(f"--pseudonymize {path}: others can read or write it; chmod 600 {path}")
        return cls(key)

    @property
    def fingerprint(self) -> str:
        """Tells keys apart, and nothing about them."""
        return self.of("")

    def of(self, name: str) -> str:
        return hmac.digest(self.key, name.encode(), "sha256").hex()[:32]

    def of_names(self, texts: pl.Series) -> pl.Series:
        """[N] pseudonyms of names in canonical form; nothing, or blanks, are no name and stay."""
        return pl.Series(
            texts.name,
            [text if text is None or not text.strip() else self.of(text) for text in texts.cast(pl.String)],
            dtype=pl.String,
        )

    def of_kept(self, rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(names.encode(rows[PATIENT_ID], self.of_names))

    def of_rejected(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The id is text as it came, and may stand as the row's value too."""
        patient, value = patient_ids(rows[PATIENT_ID]), patient_ids(rows[VALUE])
        hidden = names.encode(patient, self.of_names).cast(pl.String)
        same = (value == patient).fill_null(False)
        return rows.with_columns(
            hidden.alias(PATIENT_ID), rows[VALUE].zip_with(~same, hidden.alias(VALUE)).alias(VALUE)
        )
