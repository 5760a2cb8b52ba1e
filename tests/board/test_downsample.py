"""Fewer points of a curve, which keep what the eye looks for."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorakit.board.downsample import LEAST, downsample

NUMBERS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@given(st.lists(NUMBERS, max_size=300), st.integers(LEAST, 60))
def test_the_extremes_and_the_ends_stay(values, points):
    values = np.array(values, dtype=np.float64)
    kept = downsample(values, points)
    assert len(kept) <= points
    assert (np.diff(kept) > 0).all()
    if len(values) <= points:
        assert len(kept) == len(values)
    if len(values):
        assert kept[0] == 0
        assert kept[-1] == len(values) - 1
    finite = values[np.isfinite(values)]
    if len(finite):
        shown = values[kept]
        shown = shown[np.isfinite(shown)]
        assert shown.min() == finite.min()
        assert shown.max() == finite.max()


def test_every_bucket_keeps_its_own_extremes():
    values = np.sin(np.arange(10_000) / 3)  # 530 waves
    kept = downsample(values, 1000)
    for part in np.array_split(kept, 50):  # each tenth of a hundred waves still swings fully
        assert values[part].max() > 0.99
        assert values[part].min() < -0.99


def test_a_gap_stays_a_gap():
    values = np.concatenate([np.ones(500), np.full(500, np.nan), np.ones(500)])
    kept = downsample(values, 60)
    assert np.isnan(values[kept]).sum() == 9  # of 29 buckets a third, without those at its edges
