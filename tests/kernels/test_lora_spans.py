"""Updates of several adapters on one input, against the formula in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit import kernels

K, N = 12, 10


def made(ranks, rows, dtype, gap):
    """Input, output of the frozen layer, and updates; `gap` rows at the end belong to none."""
    g = torch.Generator().manual_seed(sum(ranks) + sum(rows))
    M = sum(rows) + gap
    x, y, dy = (torch.randn(M, n, generator=g).to(dtype) for n in (K, N, N))
    pairs = [[torch.randn(r, K, generator=g), torch.randn(N, r, generator=g)] for r in ranks]
    return x, y, dy, pairs


def spans_of(pairs, rows):
    ends = torch.tensor(rows).cumsum(0).tolist()
    return [
        kernels.LoraSpan(end - count, end, *pair, 0.5 + i)
        for i, (pair, count, end) in enumerate(zip(pairs, rows, ends, strict=True))
    ]


def by_formula(x, y, dy, pairs, rows):
    """y, and the gradients of x, y and every A and B, by autograd in fp64."""
    x, y, *flat = (t.double().requires_grad_() for t in [x, y, *(t for p in pairs for t in p)])
    updates = []
    spans = spans_of([flat[i : i + 2] for i in range(0, len(flat), 2)], rows)
    for start, end, A, B, scaling in spans:
        updates.append(scaling * x[start:end] @ A.t() @ B.t())
    updates.append(torch.zeros(len(x) - sum(rows), N, dtype=x.dtype))
    out = y + torch.cat(updates)
    return out, torch.autograd.grad(out, [x, y, *flat], dy.double())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]),
)
def test_value_and_gradients(adapters, gap, kind):
    """fp32: sums of at most 12 products; bfloat16: a unit of the largest value is 2^-8 of it."""
    (dtype, unit), (ranks, rows) = kind, zip(*adapters, strict=True)
    x, y, dy, pairs = made(ranks, rows, dtype, gap)
    expected, expected_grads = by_formula(x, y, dy, pairs, rows)
    leaves = [t.clone().requires_grad_() for t in [x, y, *(t for p in pairs for t in p)]]
    out = leaves[1] * 1  # what a layer has made
    of = [leaves[2 + i : 4 + i] for i in range(0, 2 * len(pairs), 2)]
    found = kernels.lora_spans(leaves[0], out, spans_of(of, rows))
    grads = torch.autograd.grad(found, leaves, dy)
    for a, b in zip([found, *grads], [expected, *expected_grads], strict=True):
        assert (a.double() - b).abs().max() <= unit * max(b.abs().max().item(), 1)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def test_no_adapter_leaves_what_the_layer_made():
    x, y, _, _ = made([1], [2], torch.float32, 0)
    assert kernels.lora_spans(x, y, []) is y


def test_rows_of_an_adapter_do_not_see_others():
    """What the tokens of one adapter hold changes no bit of another's gradient."""
    x, y, dy, pairs = made([3, 4], [5, 6], torch.float32, 0)
    results = []
    for other in (x, torch.cat([x[:5], x[5:] * float("nan")])):
        A, B = (t.clone().requires_grad_() for t in pairs[0])
        spans = spans_of([[A, B], pairs[1]], [5, 6])
        found = kernels.lora_spans(other, y.clone(), spans)
        results.append([found[:5].detach(), *torch.autograd.grad(found, [A, B], dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_refused():
    x, y, dy, pairs = made([3], [5], torch.float32, 0)
    A = pairs[0][0].requires_grad_()
    found = kernels.lora_spans(x, y, spans_of([[A, pairs[0][1]]], [5]))
    (grad,) = torch.autograd.grad(found, A, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
