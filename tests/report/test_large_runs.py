"""Large runs: ticks, numerals, and the decimation of points."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.report.scale import Scale, decimate, percent, si, si_ticks, spanning, tick_labels


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e9), count=st.integers(4, 10))
def test_ticks_are_round_and_inside(low: float, size: float, count: int) -> None:
    ticks = Scale(low, low + size, 0, 100).ticks(count)
    assert 1 <= len(ticks) <= count + 2
    slack = 1e-6 * size + 1e-9 * abs(low)
    assert all(low - slack <= tick <= low + size + slack for tick in ticks)
    steps = np.diff(ticks)
    if len(steps):
        leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(leading - nice) for nice in (1, 2, 5, 10)) < 1e-3
        assert np.allclose(steps, steps[0], rtol=1e-3)
    assert len(set(tick_labels(ticks))) == len(ticks)  # the numerals tell them apart


def test_numerals() -> None:
    assert [si(value) for value in (0, 7, 932_480, 999_600, 1_000_000, 2.5e12)] == [
        "0", "7", "932 k", "1 M", "1 M", "2.5 T",
    ]  # fmt: skip
    assert si_ticks([0.0, 200_000.0, 400_000.0]) == (["0", "200", "400"], "k")
    assert tick_labels([-0.1, 0.0, 0.1]) == ["-0.1", "0.0", "0.1"]
    assert percent(0.5138, 1) == "51.4 %"
    assert percent(math.nan) == "–"


def test_a_scale_over_nothing_or_one_value() -> None:
    assert spanning([], 0, 10)(0.5) == pytest.approx(5, abs=1)
    for value in (0.0, 3.0, -7.0):
        assert spanning([value, math.nan], 0, 10)(value) == pytest.approx(5)


@given(st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), max_size=400), st.integers(1, 50))
def test_decimation_keeps_the_mean_and_the_range(values: list[float], buckets: int) -> None:
    ys = np.array(values)
    xs = np.arange(len(ys), dtype=np.float64)
    x, mean, low, high = decimate(xs, ys, buckets)
    known = ys[np.isfinite(ys)]
    assert len(x) == min(len(known), buckets)
    if not len(known):
        return
    assert (low.min(), high.max()) == (known.min(), known.max())
    assert (np.diff(x) > 0).all()
    assert (low <= mean + 1e-9).all()
    assert (mean <= high + 1e-9).all()
    sizes = np.diff([i * len(known) // len(x) for i in range(len(x))] + [len(known)])
    assert (mean * sizes).sum() == pytest.approx(known.sum(), abs=1e-6)
