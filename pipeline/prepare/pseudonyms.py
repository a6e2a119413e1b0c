"""Replace patients' ids by keyed hashes, from the first file that is written on."""

from __future__ import annotations

import hmac
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import polars as pl

from pipeline.prepare import names
from pipeline.prepare.columns import to_patient_names
from pipeline.prepare.sources.reading import SITE
from pipeline.schema import PATIENT_ID, VALUE, UserError

MIN_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Pseudonyms are halves of an HMAC-SHA256, 128 bits in hexadecimal; a key gives a name the same one anywhere."""

    key: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the key, which is the whole file; it must be long, and nobody but its owner may read it."""
        try:
            key, mode = path.read_bytes(), path.stat().st_mode
        except OSError as error:
            raise UserError(f"--pseudonymize {path}: cannot be read ({error.strerror})") from None
        if len(key) < MIN_KEY_BYTES:
            make = f"head -c {MIN_KEY_BYTES} /dev/urandom > FILE"
            raise UserError(f"--pseudonymize {path}: {len(key)} bytes, {MIN_KEY_BYTES} are needed; {make}")
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(f"--pseudonymize {path}: others can read or write it; chmod 600 {path}")
        return cls(key)

    @property
    def fingerprint(self) -> str:
        """Return what tells keys apart, and says nothing about them."""
        return self.hide("")

    def hide(self, name: str) -> str:
        return hmac.digest(self.key, name.encode(), "sha256").hex()[:32]

    def hide_names(self, texts: pl.Series) -> pl.Series:
        """Return [N] pseudonyms of names in canonical form; null and blanks are no names and stay."""
        hidden = [text if text is None or not text.strip() else self.hide(text) for text in texts.cast(pl.String)]
        return pl.Series(texts.name, hidden, dtype=pl.String)

    def hide_kept(self, rows: pl.DataFrame) -> pl.DataFrame:
        hidden = [name for name in (PATIENT_ID, SITE) if name in rows.columns]
        return rows.with_columns(names.encode(rows[name], self.hide_names) for name in hidden)

    def hide_rejected(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Hide the id, which is text as it came, also where it stands as the row's value."""
        patient, value = to_patient_names(rows[PATIENT_ID]), to_patient_names(rows[VALUE])
        hidden = names.encode(patient, self.hide_names).cast(pl.String)
        same = (value == patient).fill_null(False)
        values = rows[VALUE].zip_with(~same, hidden.alias(VALUE))
        return rows.with_columns(hidden.alias(PATIENT_ID), values.alias(VALUE))
