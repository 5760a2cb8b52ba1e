"""Attention with sinks against the formula in fp64: values, and gradients of q, k, v and sinks.

Error budget: |backend - fp64| <= 2 |reference - fp64| + a few roundings of the largest value. In 16
bits the kernels round y before its share is taken from it, and once more after; of gradients, which
are sums of at most 140 terms, both round p and ds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import dispatch
from tests.exact import value_and_grads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", *["cpu"] * (dispatch.library() is not None)]


def exactly(q, k, v, sinks, seen, scale, softcap=None):
    """The formula, with every score; `seen` [B or 1, T, S]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    return torch.einsum("bhts,bshd->bthd", weights / total, v)


def within_budget(given, options, seen, backend):
    *inputs, grad = given
    scale = inputs[0].shape[-1] ** -0.5

    def attend(q, k, v, sinks):
        return kernels.attention(q, k, v, sinks=sinks, **options)

    def formula(*given):
        return exactly(*given, seen, scale, options.get("softcap"))

    with kernels.use_backend(backend):
        ours = value_and_grads(attend, inputs, grad)
    with kernels.use_backend("reference"):
        reference = value_and_grads(attend, inputs, grad)
    truth = value_and_grads(formula, [x.double() for x in inputs], grad.double())
    for found, same, exact in zip(ours, reference, truth, strict=True):
        assert (found.dtype, found.shape) == (same.dtype, same.shape)
        # gradients of scores are differences of products as large as |grad| |v|, here below 40
        rounding = torch.finfo(found.dtype).eps * (4 * exact.abs().max() + 40)
        allowed = 2 * (same.double() - exact).abs().max() + rounding
        assert (found.double() - exact).abs().max() <= allowed


def made(seed, B, T, S, dtype, Hk=2, group=3, D=16):
    """q, k, v, sinks and the gradient of the output; a sink may outweigh all keys or none."""
    gen = torch.Generator().manual_seed(seed)
    Hq = Hk * group
    shapes = (B, T, Hq, D), (B, S, Hk, D), (B, S, Hk, D), (Hq,), (B, T, Hq, D)
    q, k, v, sinks, grad = (torch.randn(shape, generator=gen).to(dtype) for shape in shapes)
    return q, k, v, sinks * 4, grad


def causal(lengths, window=None):
    T = sum(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i) & (document[:, None] == document) & (j > i - (window or T))
    return seen[None]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.floats(0.5, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_documents(backend, lengths, window, softcap, dtype, seed):
    T = sum(lengths)
    options = {"lengths": lengths, "window": window, "softcap": softcap}
    if T == 1 and backend == "cpu":
        return  # which a single token goes by
    within_budget(made(seed, 1, T, T, dtype), options, causal(lengths, window), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_over_keys_of_a_cache(backend, dtype):
    """Some queries see few keys, as beside padding."""
    gen = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 9, 30, generator=gen) < 0.3
    mask[..., 0] = True
    within_budget(made(2, 2, 9, 30, dtype), {"mask": mask}, mask[:, 0], backend)


def test_a_query_that_sees_nothing_gets_nothing():
    """All its weight goes to the sink."""
    q, k, v, sinks, _ = made(3, 1, 20, 20, torch.float32)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[7] = False
    for backend in BACKENDS:
        with kernels.use_backend(backend):
            y = kernels.attention(q, k, v, mask=mask, sinks=sinks)
        assert (y[0, 7] == 0).all()
        assert y.isfinite().all()


def test_a_token_at_a_time_is_the_whole_row():
    q, k, v, sinks, _ = made(4, 1, 12, 12, torch.float32)
    whole = kernels.attention(q, k, v, sinks=sinks)
    for t in range(12):
        one = kernels.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], sinks=sinks)
        assert (one[:, 0] - whole[:, t]).abs().max() <= 1e-6  # sums of 12 terms near 1


def test_a_sink_that_is_tiny_changes_no_more_than_a_rounding():
    q, k, v, sinks, _ = made(5, 1, 33, 33, torch.float32)
    y = kernels.attention(q, k, v, sinks=torch.full_like(sinks, -1e4))
    assert (y - kernels.attention(q, k, v)).abs().max() <= 1e-6
