"""A packed weight a panel of rows at a time."""

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import kernels
from lorakit.kernels.frozen_linear import PANEL, panels

frozen_linear = importlib.import_module("lorakit.kernels.frozen_linear")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 90), st.sampled_from([32, 64, 128]), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 900),
)  # fmt: skip
def test_panels_are_the_rows(N, K, block_size, double_quant, dtype, values):
    w = random(N, K)
    packed = [
        w.double(),
        kernels.quantize_int8(w),
        kernels.quantize_nf4(w, block_size=block_size, double_quant=double_quant),
    ]
    with mock.patch.object(frozen_linear, "PANEL", values):
        for q in packed:
            dense = q.to(dtype) if isinstance(q, torch.Tensor) else kernels.dequantize(q, dtype)
            found = list(panels(q, dtype))
            assert [i for rows, _ in found for i in range(N)[rows]] == list(range(N))
            for rows, part in found:
                assert torch.equal(part, dense[rows])


@pytest.mark.parametrize("values", [1, 700, PANEL])
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_panels(values, bias):
    """Against fp64. fp32 sums of K and N terms: 1e-5 of values near 10."""
    x, w, b, grad = random(5, 96), random(70, 96, seed=1), random(70, seed=2), random(5, 70, seed=3)
    q = kernels.quantize_nf4(w)
    x.requires_grad_()
    b = b.requires_grad_() if bias else None
    with mock.patch.object(frozen_linear, "PANEL", values):
        y = kernels.frozen_linear(x, q, b)
        y.backward(grad)
    W = kernels.dequantize(q, torch.float64)
    truth = x.detach().double() @ W.t() + (0 if b is None else b.detach().double())
    assert (y - truth).abs().max() < 1e-5
    assert (x.grad - grad.double() @ W).abs().max() < 1e-5
    assert b is None or torch.allclose(b.grad, grad.sum(0))


class Largest(TorchDispatchMode):
    """The largest tensor, in values, that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor) and not func.is_view:
                self.values = max(self.values, made.numel())
        return out


def test_on_a_cpu_a_weight_is_never_dense():
    """Neither in products nor in LoRA's; 5 M values, where a panel has 1 M."""
    N, K = 2560, 2048
    q, x = kernels.quantize_nf4(random(N, K)), random(3, K).requires_grad_()
    with Largest() as instrument:
        kernels.frozen_linear(x, q).sum().backward()
    assert K < instrument.values <= PANEL
    layer = kernels.LoraWeights(Base(q), random(4, K).requires_grad_(), random(N, 4), 1.0)
    with Largest() as instrument:
        kernels.lora_linear(x, layer).sum().backward()
    assert K < instrument.values <= PANEL


class Base:
    bias = None

    def __init__(self, q):
        self.q = q

    def __call__(self, x):
        return kernels.frozen_linear(x, self.q)

    @property
    def stored(self):
        return self.q
