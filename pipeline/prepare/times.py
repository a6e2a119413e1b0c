"""Read texts of instants and of durations, each text by itself."""

from __future__ import annotations

from typing import Final

import polars as pl

MICROSECONDS: Final = 60e6
"""Microseconds of a minute."""

_INSTANT: Final = (
    r"(?i)^(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?:[t ](\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,6})\d*)?)?)?"
    r"\s*(z|utc|gmt|[+-]\d{2}(?::?\d{2})?)?$"
)
_ISO_DURATION: Final = (
    r"(?i)^([+-]?)P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:[.,]\d+)?)S)?)?$"  # as Polars writes it
)
_DAYS_AND_CLOCK: Final = (
    r"^(?:([+-]?\d+) days?,? ?)?(?:\+?(\d{1,2}):(\d{2}):(\d{2}(?:\.\d+)?))?$"  # as pandas and Python write it
)


def parse_instants(text: pl.Series) -> pl.Series:
    """Return [N] ``Datetime("us")`` in UTC of texts without blanks at their ends."""
    groups = text.str.extract_groups(_INSTANT).struct.unnest()
    year, month, day, hour, minute, second, fraction, zone = groups.iter_columns()
    clock = pl.format(
        "{}-{}-{} {}:{}:{}", year, month, day, hour.fill_null("00"), minute.fill_null("00"), second.fill_null("00")
    )
    instant = pl.select(clock).to_series().str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
    micros = fraction.str.pad_end(6, "0").cast(pl.Int64, strict=False).fill_null(0)
    digits = zone.str.replace_all(r"\D", "").str.pad_end(4, "0").cast(pl.Int64, strict=False).fill_null(0)
    east = pl.select(pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)).to_series()
    ahead = (digits // 100 * 60 + digits % 100) * east
    return (instant.cast(pl.Int64) + micros - ahead * 60_000_000).cast(pl.Datetime("us"))


def parse_durations(text: pl.Series) -> pl.Series:
    """Return [N] float64 minutes of texts such as ``PT1H30M``, ``1 days 02:00:00`` and ``-1 day, 23:00:00``."""
    blank = (text == "") | (text.str.to_uppercase().is_in(["P", "PT", "-P", "-PT"]))
    numbers = []
    for form in (_ISO_DURATION, _DAYS_AND_CLOCK):
        groups = text.str.extract_groups(form).struct.unnest().get_columns()
        sign = pl.repeat("+", len(text), eager=True, dtype=pl.String) if form == _DAYS_AND_CLOCK else groups.pop(0)
        days, hours, minutes, seconds = (
            group.str.replace(",", ".").cast(pl.Float64, strict=False).fill_null(0.0) for group in groups
        )
        micros = ((days * 24 + hours) * 60 + minutes) * MICROSECONDS + (seconds * 1e6).round()
        fits = text.str.contains(form) & ~blank
        negative = (sign == "-").fill_null(False)
        numbers.append(pl.select(pl.when(fits).then(pl.when(negative).then(-micros).otherwise(micros))).to_series())
    return numbers[0].fill_null(numbers[1]) / MICROSECONDS
