"""The hand-derived backward of LoRA against autograd in fp64, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from lorakit import kernels


class Dense:
    """A base in the test's dtype."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return F.linear(x, self.weight)

    def dequantize(self):
        return self.weight


def make(dtype, M=(2, 3), K=7, N=5, r=2):
    torch.manual_seed(0)
    x = torch.randn(*M, K, dtype=dtype, requires_grad=True)
    A = torch.randn(r, K, dtype=dtype, requires_grad=True)
    B = torch.randn(N, r, dtype=dtype, requires_grad=True)
    return x, Dense(torch.randn(N, K, dtype=dtype)), A, B


def test_gradcheck():
    x, base, A, B = make(torch.float64)
    dropped = (x.detach() * 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A, B: kernels.lora_linear(x, base, A, B, 1.7), (x, A, B)
    )
    assert torch.autograd.gradcheck(
        lambda x, d, A, B: kernels.lora_linear(x, base, A, B, 1.7, dropped=d), (x, dropped, A, B)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_within_the_error_of_plain_autograd(dtype, adapter_dtype):
    """|ours - fp64| <= 2 |autograd in the same dtype - fp64| + a rounding of the largest value."""
    x, base, A, B = make(dtype, M=(64,), K=96, N=80, r=8)
    A, B = (t.detach().to(adapter_dtype or dtype).requires_grad_() for t in (A, B))
    grad = torch.randn(64, 80, dtype=dtype)
    y = kernels.lora_linear(x, base, A, B, 0.5)
    ours = [y, *torch.autograd.grad(y, (x, A, B), grad)]

    def plain(kind):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, A, B)]
        out = F.linear(inputs[0], base.weight.to(kind))
        out = out + 0.5 * F.linear(F.linear(inputs[0], inputs[1]), inputs[2])
        return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]

    for mine, same, truth in zip(ours, plain(dtype), plain(torch.float64), strict=True):
        allowed = 2 * (same.double() - truth).abs().max()
        allowed += torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed
    assert ours[2].dtype == A.dtype


def test_saves_the_input_and_the_small_matrices_only():
    x, base, A, B = make(torch.float32, M=(16,), K=64, N=48, r=4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.lora_linear(x, base, A, B, 1.0)
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), A.numel(), B.numel()])


def test_frozen_input_gets_no_gradient():
    x, base, A, B = make(torch.float32)
    kernels.lora_linear(x.detach(), base, A, B, 1.0).sum().backward()
    assert A.grad is not None
    assert B.grad is not None


def test_under_autocast():
    """The caller's autocast is followed: bf16 products, gradients in the inputs' dtypes."""
    x, base, A, B = make(torch.float32, M=(16,), K=64, N=48, r=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.lora_linear(x, base, A, B, 1.0)
    exact = kernels.lora_linear(x, base, A, B, 1.0)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()  # a few roundings of bf16
    grads = torch.autograd.grad(y.float().sum(), (x, A, B))
    truth = torch.autograd.grad(exact.sum(), (x, A, B))
    for grad, wide in zip(grads, truth, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - wide).abs().max() < 0.02 * wide.abs().max()
