"""Packed rows: every example once, none over the budget, and no label across a border."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data import IGNORE, Example


def first_fit_decreasing(lengths, budget):
    """As the definition has it, one row after the other."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= budget:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_pack_is_first_fit_decreasing(lengths, budget):
    assert lk.pack(lengths, budget) == first_fit_decreasing(lengths, budget)


def test_pack_refuses_what_fits_nowhere():
    assert lk.pack([], 0) == []
    with pytest.raises(lk.LorakitError, match="example 1 has 9 tokens, more than the 8 of a row"):
        lk.pack([3, 9], 8)


def test_pack_is_fast_and_tight():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(200_000).log_normal_(5.5, 1, generator=generator)
    lengths = lengths.clamp(1, 4096).int().tolist()
    start = time.perf_counter()
    rows = lk.pack(lengths, 4096)
    assert time.perf_counter() - start < 10
    assert lk.padding_share(lengths, rows, 4096) < 1e-3


def test_padding_share():
    assert lk.padding_share([1, 3, 4], [[0, 1], [2]]) == pytest.approx(0.2)
    assert lk.padding_share([1, 3, 4], [[0, 1], [2]], 8) == 0.5
    assert lk.padding_share([], []) == 0


def test_collate_packed():
    examples = [
        Example([5, 6], [IGNORE, 6]),
        Example([7, 8, 9], [7, 8, 9]),
        Example([4, 3], [4, 3]),
    ]
    ids, labels, ends = lk.collate_packed(examples)
    assert ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert labels.tolist() == [[IGNORE, 6, IGNORE, 8, 9, IGNORE, 3]]
    assert ends.tolist() == [0, 2, 5, 7]
    assert ends.dtype == torch.int32
