"""The LoRA products where Triton runs: A and s B cast in one launch, gate and up side by side."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels.ops.lora_linear import reference
from lorakit.kernels.ops.lora_linear.tensors import LoraTensors
from tests.triton_budget import guarded, random, within_budget
from tests.triton_interpreter import on_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Base:
    """A frozen layer without a bias."""

    bias = None

    def __init__(self, weight):
        self.stored = weight

    def __call__(self, x):
        return x @ self.stored.t()


@settings(max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=3),
    K=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_cast_is_torchs(shapes, K, dtype, seed):
    """All A stacked, and s B of each layer, to the last bit: r x K and N x r of each."""
    pairs = [
        (random(seed + i, r, K), random(seed + 10 + i, N, r)) for i, (r, N) in enumerate(shapes)
    ]
    scalings = [0.5 * i + 0.3 for i in range(len(pairs))]
    parts = [LoraTensors(a, b, None, None) for a, b in pairs]
    expected, of_each = reference.cast_pairs(parts, scalings, dtype)
    with on_triton(), guarded(*(m for pair in pairs for m in pair)) as copies:
        parts = [LoraTensors(*copies[i : i + 2], None, None) for i in range(0, len(copies), 2)]
        found, pieces = reference.cast_pairs(parts, scalings, dtype)
        assert torch.equal(found, expected)
        for (A, sB), (expected_A, expected_sB) in zip(pieces, of_each, strict=True):
            assert torch.equal(A, expected_A)
            assert torch.equal(sB, expected_sB)


@settings(max_examples=10)
@given(
    rows=st.integers(reference.FEW - 2, reference.FEW + 40),
    r=st.integers(1, 4),
    keep=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_an_mlp(rows, r, keep, dtype, seed):
    """Values and gradients of x, A and B within the error budget, with few rows and with more."""
    hidden, inner = 24, 40
    weights = [random(seed + i, inner, hidden, scale=0.2) for i in range(2)]
    weights.append(random(seed + 2, hidden, inner, scale=0.2))
    inputs = [random(seed + 3, rows, hidden).to(dtype)]
    for i, (N, K) in enumerate(w.shape for w in weights):
        inputs += [random(seed + 4 + i, r, K, scale=0.2), random(seed + 8 + i, N, r, scale=0.2)]

    def mlp(x, *small):
        layers = [
            kernels.LoraWeights(Base(w.to(dtype).to(x.dtype)), *small[2 * i : 2 * i + 2], 0.7)
            for i, w in enumerate(weights)
        ]
        return kernels.lora_mlp(x, *layers, "silu", keep=keep)

    # gradients of A and B are sums over the rows, of products that are rounded to `dtype` before
    within_budget(mlp, mlp, inputs, terms=rows * torch.finfo(dtype).eps * 2**21)


def test_gate_and_up_are_multiplied_together():
    """They lie in one memory, forward and backward, when they differ in values alone."""
    layers = [
        kernels.LoraWeights(Base(random(i, 8, 6)), random(3 + i, 2, 6), random(6 + i, 8, 2), 0.5)
        for i in range(2)
    ]
    tensors = [t for w in layers for t in (w.lora_A, w.lora_B, None, None)]
    static, x = [(w.base, w.scaling) for w in layers], random(9, reference.FEW + 1, 6)
    no_dropout = reference.Dropout(0.0, 0)
    with on_triton():
        group = reference.Group(static, no_dropout, tensors, torch.float32)
        gate, up = group.forward(x, by_base=True)
        assert reference.stacked([gate, up]) is not None
        group.take(torch.ones(2, len(x), 8).unbind())
        assert group.together is not None
        other = reference.Group([static[0], (static[1][0], 0.6)], no_dropout, tensors, x.dtype)
        assert other.stacked is None


def test_what_lies_one_after_the_other():
    memory = torch.arange(24.0)
    a, b, c = memory[:6].view(2, 3), memory[6:12].view(2, 3), memory[12:18].view(2, 3)
    assert torch.equal(reference.stacked([a, b, c]), memory[:18].view(3, 2, 3))
    for others in ([b, a], [a, c], [a, b.clone()], [a, b.view(3, 2)], [a, b.t()]):
        assert reference.stacked(others) is None
