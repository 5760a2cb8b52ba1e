"""A product with the quantized sum of base and update: its output, and gradients that pass Q."""

import pytest
import torch
import torch.nn.functional as F

from lorakit import kernels
from lorakit.kernels import straight_through_linear


def tensors(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64, dtype=dtype)
    A, B = torch.randn(4, 64), torch.randn(96, 4)
    b = torch.randn(96, dtype=dtype) if bias else None
    W = torch.randn(96, 64)
    q = kernels.quantize_nf4((W + 0.5 * B @ A).to(dtype))
    leaves = [t.requires_grad_() for t in (x, A, B, b) if t is not None]
    return x, A, B, b, q, leaves


@pytest.mark.parametrize("how", ["packed", "function"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_sum(how, bias):
    """Autograd in fp64 says so of x (S + (W' - S).detach())^T with S = s B A."""
    x, A, B, b, q, leaves = tensors(bias=bias)
    weight = q if how == "packed" else lambda dtype: kernels.dequantize(q, dtype)
    y = straight_through_linear(x, weight, A, B, 0.5, b)
    dense = F.linear(x, kernels.dequantize(q, torch.float32), b)
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)  # fp32 sums of 64 terms
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)
    x, A, B, b = (None if t is None else t.double() for t in (x, A, B, b))
    S = 0.5 * B @ A
    W = S + (kernels.dequantize(q, torch.float32).double() - S).detach()
    expected = torch.autograd.grad(F.linear(x, W, b), leaves, grad.double())
    for mine, theirs in zip(found, expected, strict=True):
        # fp32 sums of up to 96 products
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_in_bf16_the_output_is_that_of_a_packed_layer():
    x, A, B, b, q, leaves = tensors(torch.bfloat16)
    y = straight_through_linear(x, q, A, B, 0.5, b)
    assert torch.equal(y, kernels.frozen_linear(x, q, b))
    of_x, of_A, of_B, of_b = torch.autograd.grad(y.sum(), leaves)
    assert (of_x.dtype, of_A.dtype, of_B.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert of_b.dtype == torch.bfloat16
    wide = x.detach().float().reshape(-1, 64)
    # sums of 10 products of numbers of 8 bits
    expected = 0.5 * wide.sum(0)[None] * B.detach().sum(0)[:, None]
    torch.testing.assert_close(of_A, expected, rtol=0.02, atol=0.05)


def test_frozen_tensors_get_no_gradient():
    x, A, B, _, q, _ = tensors(bias=False)
    x = x.detach()
    straight_through_linear(x, q, A.detach(), B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is None
    assert B.grad is not None
