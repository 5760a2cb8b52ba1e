"""Torch's FlashAttention is asked for the same bits every time, and nothing else is."""

import math
import re
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import dispatch
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


def test_long_rows_go_to_triton(monkeypatch):
    """They do where the times measured cross, on the GPU that was measured."""
    lines = flash.__doc__.splitlines()
    [tokens], [theirs], [ours] = (
        [line for line in lines if line.startswith(f"    {name}  ")]
        for name in ("tokens", "FlashAttention 2", "Triton")
    )
    counts = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", tokens)]

    def times(line):
        return [2 / int(a) + 5 / int(b) for a, b in re.findall(r"(\d+), (\d+)", line)]

    ratios = [a / b for a, b in zip(times(theirs), times(ours), strict=True)]
    (t, slower), (u, faster), *_ = zip(counts, ratios, strict=True)
    assert slower < 1 < min(ratios[1:])
    crossing = t * (u / t) ** (math.log(slower) / (math.log(slower) - math.log(faster)))
    assert math.ceil(crossing) == flash.LONG

    def takes(tokens, D=128, B=1):
        return flash.takes(heads(B, tokens, 4, D), *[heads(B, tokens, 2, D)] * 2)

    with MetaGPU() as gpu:
        assert [takes(n) for n in (flash.LONG - 1, flash.LONG, 8192)] == [True, False, False]
        assert takes(8192, D=64)
        assert takes(2048, B=4)
        q, k = heads(1, 4096, 4, 128, requires_grad=True), heads(1, 4096, 2, 128)
        kernels.attention(q, k, k, window=4096).sum().backward()  # a window that holds the row
        kernels_of = [each.name for each in gpu.launches if each.name.startswith("attention/")]
        assert kernels_of == [
            f"attention/_{n}" for n in ("forward", "delta", "dkv", "sum_parts", "dq")
        ]
        gpu.clear()
        kernels.attention(q[:, :64], k[:, :64], k[:, :64], window=64)
        assert FLASH in [each.name for each in gpu.launches]
        monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
        assert takes(8192)
        monkeypatch.setattr(dispatch, "capability", lambda device: (10, 0))
        assert takes(8192)


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
