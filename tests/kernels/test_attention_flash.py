"""Torch's FlashAttention is asked for the same bits every time, and nothing else is."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels.ops.attention import flash
from tests.kernels.test_attention import attention_in_double
from tests.meta_gpu import FLASH, MetaGPU


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture
def users(request):
    """What the user has set."""
    mode, warn_only = request.param
    before = settings()
    torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)
    yield settings()
    torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


class Seen(TorchDispatchMode):
    """The settings under which each op of torch's runs, by name."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func._schema.name.split("::")[1]] = settings()
        return func(*args, **kwargs or {})


def heads(*shape, **options):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", **options)


@pytest.mark.parametrize("users", [(False, False), (True, True), (True, False)], indirect=True)
def test_the_setting_holds_for_the_backward_alone(users):
    with MetaGPU(), Seen() as seen:
        q, k, v = (heads(2, 24, n, 64, requires_grad=True) for n in (4, 2, 2))
        y = kernels.attention(q, k, v)
        grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert seen.found[FLASH] == users
    assert seen.found[f"{FLASH}_backward"] == (True, False, False)
    assert settings() == users


@pytest.mark.parametrize("users", [(False, False), (True, True)], indirect=True)
def test_an_error_inside_restores_it(users):
    with pytest.raises(RuntimeError, match="out of memory"), flash.deterministic():
        raise RuntimeError("out of memory")
    assert settings() == users


def test_what_it_takes():
    """16 bits, whole groups of heads, and rows that attend to themselves; others go elsewhere."""
    with MetaGPU() as gpu:
        q, k = heads(1, 24, 4, 64), heads(1, 24, 2, 64)
        assert flash.takes(q, k, k)
        assert not flash.takes(q.float(), k.float(), k.float())
        assert not flash.takes(q, k, k.float())
        assert not flash.takes(heads(1, 1, 4, 64), k, k)
        assert not flash.takes(heads(1, 24, 3, 64), k, k)
        assert not flash.takes(heads(1, 24, 4, 60), heads(1, 24, 2, 60), heads(1, 24, 2, 60))
        assert not flash.takes(heads(1, 24, 4, 264), heads(1, 24, 2, 264), heads(1, 24, 2, 264))
        assert not flash.takes(*(torch.empty(1, 24, 2, 64).bfloat16() for _ in range(3)))
        gpu.clear()
        kernels.attention(q.float(), k.float(), k.float())
        assert [each.name for each in gpu.launches][-1] == "attention/_forward"


def test_values_and_gradients():
    """Torch's flash kernel for CPUs stands for the GPU's, which takes the same operands."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 19, n, 16, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    grad = torch.randn(2, 19, 4, 16, dtype=torch.float64)
    seen = torch.ones(19, 19, dtype=torch.bool).tril()
    exact = attention_in_double(*inputs, seen, 0.3, None)
    expected = torch.autograd.grad(exact, inputs, grad)

    def forward(q, k, v, dropout, causal, debug, scale):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return y, lse, None, None, 19, 19, None, None, None

    def backward(grad, q, k, v, y, lse, *rest, scale):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        back = aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = back(grad, q, k, v, y, lse, 0.0, True, scale=scale)
        return dq, *(x.unflatten(1, (2, 2)).sum(2) for x in (dk, dv))

    aten = torch.ops.aten
    with (
        mock.patch.object(aten, FLASH, forward),
        mock.patch.object(aten, f"{FLASH}_backward", backward),
    ):
        y = flash.attention(*inputs, 0.3)
        found = torch.autograd.grad(y, inputs, grad)
    # sums of 19 terms near 1
    for one, other in zip([y, *found], [exact, *expected], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)
