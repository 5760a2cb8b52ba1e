"""Packed rows: every example once, none over the budget, and no label across a border."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.encode import IGNORE, Example


def first_fit_decreasing(lengths, budget):
    """Fill rows as the definition has it, one after the other."""
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
    assert lk.pack_rows(lengths, budget) == first_fit_decreasing(lengths, budget)


def test_pack_refuses_what_fits_nowhere():
    assert lk.pack_rows([], 0) == []
    with pytest.raises(lk.LorakitError, match="example 1 has 9 tokens, more than the 8 of a row"):
        lk.pack_rows([3, 9], 8)


def test_pack_is_fast_and_tight():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(200_000).log_normal_(5.5, 1, generator=generator)
    lengths = lengths.clamp(1, 4096).int().tolist()
    start = time.perf_counter()
    rows = lk.pack_rows(lengths, 4096)
    assert time.perf_counter() - start < 10  # asking row after row would take many minutes
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


@pytest.fixture(scope="module")
def adapted(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, 0, 0.1)
    return model


@given(
    st.lists(st.lists(st.integers(0, 299), min_size=2, max_size=12), min_size=2, max_size=5),
    st.data(),
)
def test_documents_do_not_see_each_other(adapted, documents, data):
    """Whatever one holds, not a bit of the others' logits changes; and each has the loss that it
    has alone, to the rounding of sums over another number of rows.
    """
    number = data.draw(st.integers(0, len(documents) - 1))
    length = len(documents[number])
    other = data.draw(st.lists(st.integers(0, 299), min_size=length, max_size=length))
    changed = [*documents[:number], other, *documents[number + 1 :]]
    bounds = torch.tensor([0] + [len(d) for d in documents]).cumsum(0)

    def ids(rows):
        return torch.tensor([[token for row in rows for token in row]])

    with torch.no_grad():
        before, after = (adapted(ids(rows), cu_seqlens=bounds) for rows in (documents, changed))
        start, end = bounds[number], bounds[number + 1]
        assert torch.equal(before[:, :start], after[:, :start])
        assert torch.equal(before[:, end:], after[:, end:])
        losses, _ = adapted.row_losses(ids(documents), ids(documents), cu_seqlens=bounds)
        alone = [adapted.loss(ids([row]), ids([row]))[0] for row in documents]
    assert torch.allclose(losses, torch.stack(alone), rtol=1e-5, atol=1e-5)
