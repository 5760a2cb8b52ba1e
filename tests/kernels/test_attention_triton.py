"""Attention's Triton kernels against fp64, and their tables of tiles.

Tiles are small here, so that documents of a few dozen tokens meet every kind of block: whole ones,
those on the diagonal, those at the edge of a window, and those that a document does not fill.
"""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops.attention import triton as document_attention
from lorakit.kernels.ops.attention.documents import PADDING, Documents, PaddedDocuments, tiles_of
from lorakit.kernels.ops.attention.triton import Tiling, Tilings
from tests.kernels.test_attention import attention_in_double
from tests.kernels.test_attention_sinks import exactly as attention_with_sinks
from tests.triton_budget import guarded, random, within_budget
from tests.triton_interpreter import DEVICE, on_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def small_tiles(forward=(32, 16), dq=(16, 32), dkv=(16, 16)):
    """Tiles of so many tokens, and steps."""
    found = Tilings(*(Tiling(tile, step, 4, 1) for tile, step in (forward, dq, dkv)))
    with mock.patch.object(document_attention, "tilings", return_value=found):
        yield


def seen_in(lengths, window):
    """Which keys each query sees: bool [T, T]."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    i, j = torch.arange(sum(lengths))[:, None], torch.arange(sum(lengths))
    seen = (j <= i) & (document[:, None] == document)
    return (seen if window is None else seen & (j > i - window)).to(DEVICE)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    group=st.sampled_from([1, 3]),
    D=st.sampled_from([8, 16, 24, 64]),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.floats(0.3, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_documents(lengths, group, D, window, softcap, dtype, seed):
    """Values and gradients are those of the formula within the error budget, for every option."""
    T = sum(lengths)
    shapes = (1, T, 2 * group, D), (1, T, 2, D), (1, T, 2, D)
    inputs = [random(seed + i, *shape).to(dtype) for i, shape in enumerate(shapes)]
    seen = seen_in(lengths, window)

    def ours(q, k, v):
        return kernels.attention(
            q, k, v, scale=0.3, softcap=softcap, window=window, lengths=lengths
        )

    def exactly(q, k, v):
        return attention_in_double(q, k, v, seen, 0.3, softcap).to(q.dtype)

    # sums of up to 150 terms near 1; a soft cap's tanh is exact to 2^-23 of the cap
    with small_tiles():
        within_budget(ours, exactly, inputs, terms=4.0 * group + (softcap or 0.0))


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_documents_with_sinks(lengths, window, dtype, seed):
    """Each head's sink takes a share of the weights; its gradient is within the budget too."""
    T = sum(lengths)
    shapes = (1, T, 2, 16), (1, T, 1, 16), (1, T, 1, 16), (2,)
    inputs = [random(seed + i, *shape).to(dtype) for i, shape in enumerate(shapes)]
    seen = seen_in(lengths, window)

    def ours(q, k, v, sinks):
        return kernels.attention(
            q, k, v, scale=0.3, window=window, lengths=lengths, sinks=sinks * 4
        )

    def exactly(q, k, v, sinks):
        return attention_with_sinks(q, k, v, sinks * 4, seen[None], 0.3).to(q.dtype)

    with small_tiles():
        within_budget(ours, exactly, inputs, terms=8.0)


def packed_value_and_grads(documents, window):
    """y and the gradients of q, k and v, each cut into documents: a list of four for each.

    A document holds q, k, v and the gradient of y.
    """
    lengths = [each[0].shape[1] for each in documents]
    *rows, grad = (torch.cat(parts, dim=1) for parts in zip(*documents, strict=True))
    with on_triton(), guarded(*rows, grad) as (*rows, grad):
        rows = [x.detach().requires_grad_() for x in rows]
        y = kernels.attention(*rows, window=window, lengths=lengths)
        found = [y, *torch.autograd.grad(y, rows, grad)]
    return list(zip(*(x.split(lengths, dim=1) for x in found), strict=True))


@pytest.mark.parametrize("window", [None, 20])
def test_the_bits_of_a_document_are_its_own(window):
    """They are those of the document alone, wherever it lies and whatever lies beside it."""

    def document(seed, T):
        return [
            random(seed + i, 1, T, heads, 16).bfloat16() for i, heads in enumerate((2, 1, 1, 2))
        ]

    a, b, c = document(1, 37), document(10, 50), document(20, 3)
    with small_tiles():
        (alone,) = packed_value_and_grads([a], window)
        for row in ([a, b], [b, a, c], [c, b, a], [[x * float("inf") for x in c], a]):
            found = packed_value_and_grads(row, window)[[each is a for each in row].index(True)]
            for one, other in zip(found, alone, strict=True):
                assert torch.equal(one, other)


def test_a_batch_with_a_window_or_a_soft_cap_is_a_row_of_documents():
    """Also where q, k and v are parts of one projection, whose strides the kernels read."""
    B, T, D = 3, 21, 16
    both = random(0, B, T, 4, D)
    with small_tiles(), on_triton():
        for options in ({"window": 9}, {"softcap": 2.0}):
            q, k, v = both.split([2, 1, 1], dim=2)
            y = kernels.attention(q, k, v, **options)
            rows = [x.reshape(1, B * T, -1, D) for x in (q, k, v)]
            same = kernels.attention(*rows, lengths=[T] * B, **options)
            assert torch.equal(y, same.view(y.shape))


@pytest.mark.parametrize("processors", [1, 3, 9])
def test_heads_that_are_shared_among_programs(processors):
    """A group's four heads in one, two or four programs: values within the error budget, and with
    four the gradients of k and v are those of each head alone, added in order.
    """
    T, D = 35, 16  # three tiles of keys: of one key head, 3 x 4 blocks in the mean of 2 x 4
    inputs = [random(i, 1, T, heads, D) for i, heads in enumerate((4, 1, 1))]
    dy = random(9, 1, T, 4, D)

    def ours(q, k, v):
        return kernels.attention(q, k, v, scale=0.3, softcap=2.0)

    def exactly(q, k, v):
        return attention_in_double(q, k, v, seen_in([T], None), 0.3, 2.0).to(q.dtype)

    def gradients(q, k, v, dy):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with on_triton():
            return torch.autograd.grad(ours(q, k, v), (q, k, v), dy)

    with small_tiles(), mock.patch.object(dispatch, "multiprocessors", return_value=processors):
        parts = document_attention.parts_of(4, 3 + 1, DEVICE)
        assert parts == {1: 1, 3: 2, 9: 4}[processors]
        within_budget(ours, exactly, inputs, terms=18.0)  # sums of up to 140 terms near 1
        found = gradients(*inputs, dy)
        if parts == 4:
            q, k, v = inputs
            alone = [gradients(q[:, :, [h]], k, v, dy[:, :, [h]]) for h in range(4)]
            for i in (1, 2):
                summed = alone[0][i]
                for each in alone[1:]:
                    summed = summed + each[i]
                assert torch.equal(found[i], summed)


@given(*[st.integers(1, n) for n in (32, 8, 4, 40, 160)])
def test_shared_until_no_program_takes_longer_than_all_together(group, heads, rows, tiles, most):
    """Tile i of a row has i blocks of queries of each head."""

    def longest_and_mean(parts):
        blocks = [i * group / parts for i in range(1, tiles + 1)]
        return max(blocks), sum(blocks) * rows * heads * parts / most

    with mock.patch.object(dispatch, "multiprocessors", return_value=most):
        parts = document_attention.parts_of(group, heads * rows * (tiles + 1), DEVICE)
    assert group % parts == 0
    assert parts == group or longest_and_mean(parts)[0] <= longest_and_mean(parts)[1] * (1 + 1e-9)
    fewer = [p for p in range(1, parts) if group % p == 0]
    assert all(longest_and_mean(p)[0] > longest_and_mean(p)[1] * (1 - 1e-9) for p in fewer)


def test_programs_without_tokens_write_nothing():
    """A table may be longer than its tiles need."""
    rows = [random(i, 1, 40, 2, 16) for i in range(3)]
    documents, longer = Documents([30, 10]), Documents([30, 10])
    with small_tiles(), on_triton(), guarded(*rows) as rows:
        rows = [x.detach().requires_grad_() for x in rows]
        found = []
        for each in (documents, longer):
            y = kernels.attention(*rows, lengths=each)
            found.append([y, *torch.autograd.grad(y, rows, torch.ones_like(y))])
            for name, table in documents._tables.items():
                longer._tables[name] = torch.cat([table, table.new_zeros(5, 3)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@given(st.lists(st.integers(0, 40), max_size=6), st.sampled_from([1, 16, 32]), st.booleans())
def test_tiles(lengths, size, keys):
    """Tiles hold every token once, begin at their document's first or `size` after, and come by
    how much they have to do.
    """
    tiles = tiles_of(lengths, size, keys)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    bounds = {(end - length, end) for end, length in zip(ends, lengths, strict=True)}
    tokens = [t for first, _, end in tiles for t in range(first, min(first + size, end))]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert all(
        (begin, end) in bounds and (first - begin) % size == 0 for first, begin, end in tiles
    )
    work = [end - first if keys else first - begin for first, begin, end in tiles]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("window", [None, 9])
def test_documents_of_a_row_that_is_refilled(window):
    """They have the bits that they have without padding, in tables that stay where they are."""
    padding = mock.patch(f"{PaddedDocuments.__module__}.PADDING", 32)  # as small as the tiles
    with padding, small_tiles(), on_triton():
        padded = PaddedDocuments(104, 9)
        for lengths in ([], [30, 10, 60], [50, 1, 1, 40], [104]):
            padded.refill(lengths)
            tables = list(padded._tables.values())
            rows = [random(i, 1, padded.tokens, 2, 16).requires_grad_() for i in range(3)]
            n, dy = sum(lengths), random(4, 1, padded.tokens, 2, 16)
            y = kernels.attention(*rows, window=window, lengths=padded)
            found = [y, *torch.autograd.grad(y, rows, dy)]
            assert all(x.isfinite().all() for x in found)
            if lengths:
                alone = [x.detach()[:, :n].requires_grad_() for x in rows]
                y = kernels.attention(*alone, window=window, lengths=lengths)
                expected = [y, *torch.autograd.grad(y, alone, dy[:, :n])]
                assert all(torch.equal(a[:, :n], b) for a, b in zip(found, expected, strict=True))
            assert tables == [] or list(padded._tables.values()) == tables


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=9), min_size=1, max_size=4))
def test_the_shortest_row_that_holds_all_documents(rows):
    """Its tables have room for the tiles of each, and padding fills it in small documents."""
    documents = PaddedDocuments.for_rows(rows)
    longest = max(map(sum, rows))
    assert documents.tokens % PADDING == 0
    assert longest <= documents.tokens < longest + PADDING
    for lengths in rows:
        documents.refill(lengths)
        assert documents.lengths[: len(lengths)] == tuple(lengths)
        assert sum(documents) == documents.tokens
        assert max(documents.lengths[len(lengths) :], default=0) <= PADDING
        for size in (16, 128):
            table = documents.tiles(size, torch.device("cpu"))
            tiles = tiles_of(documents, size, False)
            assert table[: len(tiles)].tolist() == [list(tile) for tile in tiles]
            assert not table[len(tiles) :].any()


def test_a_table_is_made_once():
    documents = Documents([5, 3])
    assert documents.tiles(4, DEVICE) is documents.tiles(4, DEVICE)
    assert documents.tiles(4, DEVICE).tolist() == [[4, 0, 5], [0, 0, 5], [5, 5, 8]]
    assert documents.tiles(4, DEVICE, keys=True).tolist() == [[0, 0, 5], [5, 5, 8], [4, 0, 5]]
