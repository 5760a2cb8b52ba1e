"""Products with a packed weight, against the reference and fp64, and their panels."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import frozen_linear
from lorakit.kernels.ops.frozen_linear import dense as dense_weights
from lorakit.kernels.ops.frozen_linear import reference
from lorakit.kernels.ops.frozen_linear.dense import PANEL, panels
from lorakit.kernels.ops.nf4 import cpu
from tests.exact import value_and_grads, within_budget
from tests.instruction_sets import ISAS, on_cpu


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
    with mock.patch.object(dense_weights, "PANEL", values):
        for q in packed:
            dense = q.to(dtype) if isinstance(q, torch.Tensor) else kernels.dequantize(q, dtype)
            found = []
            for rows, part in panels(q, dtype):  # which holds until the next
                found += range(N)[rows]
                assert torch.equal(part, dense[rows])
            assert found == list(range(N))


@pytest.mark.parametrize("rows", [1, 5, 80])
@pytest.mark.parametrize("quantize", [kernels.quantize_nf4, kernels.quantize_int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_reference(dtype, quantize, rows):
    """The error budget, y and both gradients, for few rows and many."""
    x, grad = random(rows, 128).to(dtype), random(rows, 70, seed=3).to(dtype)
    q, b = quantize(random(70, 128, seed=1).to(dtype)), random(70, seed=2).to(dtype)
    ours = value_and_grads(lambda x, b: kernels.frozen_linear(x, q, b), (x, b), grad)
    same = value_and_grads(lambda x, b: reference.frozen_linear(x, q, b), (x, b), grad)
    W = kernels.dequantize(q, dtype).double()  # W' in the dtype of x, in fp64 from here
    truth = value_and_grads(lambda x, b: x @ W.t() + b, (x.double(), b.double()), grad.double())
    for triple in zip(ours, same, truth, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("values", [1, 700, PANEL])
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_panels(values, bias):
    """The truth is fp64. fp32 sums have K and N terms: 1e-5 of values near 10."""
    x, w, b, grad = random(5, 96), random(70, 96, seed=1), random(70, seed=2), random(5, 70, seed=3)
    q = kernels.quantize_nf4(w)
    x.requires_grad_()
    b = b.requires_grad_() if bias else None
    with mock.patch.object(dense_weights, "PANEL", values):
        y = kernels.frozen_linear(x, q, b)
        y.backward(grad)
    W = kernels.dequantize(q, torch.float64)
    truth = x.detach().double() @ W.t() + (0 if b is None else b.detach().double())
    assert (y - truth).abs().max() < 1e-5
    assert (x.grad - grad.double() @ W).abs().max() < 1e-5
    assert b is None or torch.allclose(b.grad, grad.sum(0))


# ---- few rows on a CPU --------------------------------------------------------------------------


def product(isa, x, q, bias):
    """Multiply by the C++ kernel. x and the result lie between guard zones: a read beyond the end
    of x would be one of NaN.
    """
    (M, K), N, zone = x.shape, q.shape[0], 64

    def fenced(n):
        memory = torch.full((n + 2 * zone,), math.nan, dtype=x.dtype)
        return memory, memory[zone : n + zone]

    (_, inside), (memory, y) = fenced(M * K), fenced(M * N)
    inside.copy_(x.view(-1))
    pointers = [dispatch.address(t) for t in (inside, bias, y)]
    with on_cpu(isa):
        arguments = cpu.Product(*cpu._arguments(q), *pointers, M, N, K)
        dispatch.run("nf4_product", x.dtype, arguments)
    assert memory[:zone].isnan().all()
    assert memory[M * N + zone :].isnan().all()
    return y.view(M, N)


@pytest.mark.skipif(not ISAS, reason="the library was not built")
@settings(max_examples=150)
@given(
    st.sampled_from(ISAS), st.integers(1, 70), st.integers(0, 40), st.integers(0, 50),
    st.sampled_from([32, 64, 2048]), st.booleans(), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([kernels.quantize_nf4, kernels.quantize_fp4]), st.integers(0, 2**31),
)  # fmt: skip
def test_products_of_few_rows(isa, M, N, blocks, block_size, double, biased, dtype, quantize, seed):
    """x W'^T + b, W' the weight rounded to the dtype: off by an fp32 sum and one rounding. Each row
    has the bits that it has by itself.
    """
    K = block_size * min(blocks, 4096 // block_size)
    q = quantize(random(N, K, seed=seed), block_size=block_size, double_quant=double)
    x, bias = random(M, K, seed=seed + 1).to(dtype), random(N, seed=seed + 2) if biased else None
    y = product(isa, x, q, bias)
    W, b = kernels.dequantize(q, dtype).double(), torch.zeros(N) if bias is None else bias
    truth, terms = x.double() @ W.t() + b, x.double().abs() @ W.abs().t() + b.abs()
    # up to 256 terms one after the other in a lane, and a dozen more sums, each rounded: at worst
    # 2^-16 of all terms, but chance has it that the largest seen is 2^-24
    allowed = 2**-22 * terms + torch.finfo(dtype).eps / 2 * truth.abs()
    assert ((y - truth).abs() <= allowed).all()
    assert torch.equal(product(isa, x[-1:], q, bias), y[-1:])


@pytest.mark.skipif(not ISAS, reason="the library was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    q, x = kernels.quantize_nf4(random(301, 1024)), random(9, 1024, seed=1).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dense = [part.clone() for _, part in panels(q, dtype)]
            found.append((cpu.product(x, q, None), *dense))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_which_rows_are_few(isa, dtype):
    """Few rows are as many as the table says, for whole blocks, and not under autocast; x gets a
    gradient in any case.
    """
    for K, cast, few in ((128, False, True), (96, False, False), (128, True, False)):
        q = kernels.quantize_nf4(random(24, K))
        for M in (1, 16, 32, 33):
            x = random(M, K).to(dtype).requires_grad_()
            with on_cpu(isa), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                with mock.patch.object(cpu, "product", wraps=cpu.product) as called:
                    y = kernels.frozen_linear(x, q)
                wide = dispatch.product_dtype(x)
                most = frozen_linear.FEW_ROWS_CPU.get((isa, wide), 0)
            assert called.call_count == (few and most >= M)
            y.sum().backward()
            expected = kernels.dequantize(q, torch.float64).sum(0).expand(M, K)
            # 24 terms rounded to the dtype, or to autocast's
            eps = torch.finfo(torch.bfloat16 if cast else dtype).eps
            assert torch.allclose(x.grad.double(), expected, rtol=eps, atol=24 * eps)


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


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37, 64])
def test_products_of_onednn(rows, turned, monkeypatch):
    """They are as exact as torch's in fp32, for any strides and any number of rows. Sums run in
    another order: each rounds to 2^-24 of the magnitudes it adds up.
    """
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(dispatch, "mkl_is_slow", lambda: True)
    x, w, bias = torch.randn(rows, 200)[:, ::2], torch.randn(50, 100), torch.randn(50)
    w = w.t().contiguous().t() if turned else w
    y = dispatch.linear(x, w, bias)
    exact = x.double() @ w.double().t() + bias
    size = x.abs() @ w.abs().t() + bias.abs()
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 100 * 2**-24 * size).all()
    with kernels.use_backend("reference"):
        assert torch.equal(dispatch.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
