from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.sequence import MIN_FILL, SequenceLayout, time_features


def layout_of(num_sets: list[int]) -> SequenceLayout:
    return SequenceLayout.build(torch.tensor([0, *num_sets], dtype=torch.int64).cumsum(0))


def test_rectangles_by_hand() -> None:
    """A history of 16 sets has a rectangle of its own; 5, 4 and 4 share one; 1 is too short for it."""
    layout = layout_of([5, 0, 1, 4, 4, 16])
    assert layout.rectangles == ((1, 16), (3, 5), (1, 1))
    assert layout.cell.tolist() == [
        *range(16, 21),  # 5 sets
        31,  # 1
        *range(21, 25),  # 4
        *range(26, 30),  # 4
        *range(16),
    ]


@given(st.lists(st.integers(0, 40), max_size=12))
def test_every_set_has_a_cell_of_its_own_in_its_patient_s_row(num_sets: list[int]) -> None:
    layout = layout_of(num_sets)
    assert sum(count for count, _ in layout.rectangles) == sum(size > 0 for size in num_sets)
    widths = [most for count, most in layout.rectangles for _ in range(count)]
    starts = [sum(widths[:row]) for row in range(len(widths))]
    assert len(set(layout.cell.tolist())) == sum(num_sets)
    for patient, size in enumerate(num_sets):
        cells = layout.cell[layout.patient == patient].tolist()
        if size:
            row = starts.index(cells[0])
            assert cells == list(range(cells[0], cells[0] + size))
            assert MIN_FILL * widths[row] < size <= widths[row]


TWENTY_YEARS = 20 * 365.25 * 24 * 60


@given(st.lists(st.floats(-TWENTY_YEARS, TWENTY_YEARS, width=32), min_size=1, max_size=20))
def test_time_is_encoded_exactly_for_twenty_years(minutes: list[float]) -> None:
    """Against Python's own sines, whose angles are reduced exactly; fractions of minutes included."""
    features = time_features(torch.tensor(minutes))
    sines, cosines = features[:, :16], features[:, 16:32]
    longest = 24 * 365.25 * 20
    for row, minute in enumerate(minutes):
        for number in range(16):
            period = 0.5 * (longest / 0.5) ** (number / 15)  # hours
            angle = 2 * math.pi * math.fmod(minute / 60, period) / period
            assert sines[row, number].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert cosines[row, number].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_time_encoding_of_a_late_minute_by_hand() -> None:
    """Eight years and 7.5 minutes are a whole number of half hours and a quarter of one."""
    features = time_features(torch.tensor([0.4 * TWENTY_YEARS + 7.5]))
    assert features[0, 0].item() == pytest.approx(1.0, abs=1e-6)
    assert features[0, 16].item() == pytest.approx(0.0, abs=1e-6)
