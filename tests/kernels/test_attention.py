"""Attention against fp64, with masks, windows, soft caps and packed documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels.ops.attention import reference
from tests.exact import value_and_grads


def attention_in_double(q, k, v, mask, scale, softcap):
    """The formula, with every score."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    group=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.floats(0.3, 5),
    kind=st.sampled_from(["causal", "masked", "packed"]),
)
def test_attention(lengths, group, window, softcap, kind):
    """Position i sees position j of its own document with i - window < j <= i, and no other; values
    and gradients are those of the formula in fp64.
    """
    torch.manual_seed(sum(lengths))
    T, scale = sum(lengths), 0.4
    packed = kind == "packed"
    B = 1 if packed else 2
    q = torch.randn(B, T, 2 * group, 8)
    k, v = torch.randn(B, T, 2, 8), torch.randn(B, T, 2, 8)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    mask = j <= i
    options = {"scale": scale, "softcap": softcap}
    if kind != "causal" and window is not None:
        mask = mask & (j > i - window)
    if packed:
        mask = mask & (document[:, None] == document)
        options |= {"lengths": lengths, "window": window}
    elif kind == "masked":
        options["mask"] = mask
    grad = torch.randn_like(q)
    ours = value_and_grads(lambda *x: kernels.attention(*x, **options), (q, k, v), grad)

    def truth(*x):
        return attention_in_double(*x, mask, scale, softcap)

    wide = value_and_grads(truth, (q.double(), k.double(), v.double()), grad.double())
    for a, b in zip(ours, wide, strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())  # fp32 sums of at most 48 terms


def test_soft_capped_attention_in_chunks(monkeypatch):
    """Chunks of query rows, computed again for backward, change nothing but the order of sums."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8)
    grad = torch.randn_like(q)
    found = []
    for chunk in (512, 7):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        found.append(
            value_and_grads(lambda *x: kernels.attention(*x, softcap=2.0), (q, k, v), grad)
        )
    for whole, pieces in zip(*found, strict=True):  # gradients near 1, sums of 40 terms in fp32
        assert (whole - pieces).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tokens", [1, 5, 15, 64, 65, 70])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 30.0}, {"lengths": True}])
def test_a_query_of_nan_gets_nan(backend, tokens, options):
    """And no other query does. Fewer keys than a vector has are compared in another way."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 16) for _ in range(3))
    at = tokens // 2
    q[0, at, 1, 3] = torch.nan
    if "lengths" in options:
        options = {"lengths": [at, tokens - at] if at else [tokens]}
    with kernels.use_backend(backend):
        y = kernels.attention(q, k, v, **options)
    wrong = y.isnan()
    assert wrong[0, at, 1].all()
    assert wrong.sum() == 16
