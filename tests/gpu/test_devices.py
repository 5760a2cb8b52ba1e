"""Which device, and when the host waits for it."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from lorakit import kernels
from lorakit.kernels import dispatch
from tests.gpu.operations import DTYPES, OPS, Shape, outputs_and_gradients, same_bits

# The others read a count, a table or a verdict back: linear_cross_entropy the rows that count,
# quantizing whether all scales are finite.
NEVER_WAIT = [
    "rms_norm",
    "add_rms_norm",
    "rope",
    "norm_rope",
    "swiglu",
    "cross_entropy",
    "dequantize",
]
NEVER_WAIT += ["frozen_linear of 1", "frozen_linear of 300", "lora_mlp", "adamw", "adamw 8-bit"]


@contextmanager
def waiting_forbidden(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_is_what_runs(device):
    assert dispatch.pick(device, "cpu", "triton") == "triton"


@pytest.mark.parametrize("name", NEVER_WAIT)
def test_the_host_never_waits(name, device, size):
    shape = size((64, 1024, 128, 5000), (3, 64, 8, 40))
    f, inputs = OPS[name](Shape(device, torch.bfloat16, *shape))
    leaves, given = [x.requires_grad_() for x in inputs], None
    for go in (nullcontext(), waiting_forbidden(device)):  # first it compiles, and makes tables
        with go:
            out = f(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            given = given or [y.detach().clone() for y in out]
            if leaves:
                torch.autograd.grad(out, leaves, given)


def test_waiting_is_noticed(device):
    """The instrument of the test above."""
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for on a CPU")
    x = torch.ones(3, device=device)
    with waiting_forbidden(device), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_current(name, device, size):
    """The tensors' device counts: cuda:1 while cuda:0 is current gives cuda:0's bits."""
    other = torch.device("cuda", 1)
    if device.type != "cuda":
        other = device
    elif torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    elif torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the two GPUs are of different kinds, whose products may round differently")
    shape = size((37, 1024, 74, 5003), (3, 64, 6, 37))
    first = Shape(device, torch.bfloat16, *shape)
    f, inputs = OPS[name](first)
    g, _ = OPS[name](first._replace(device=other))
    expected = outputs_and_gradients(f, inputs)
    found = outputs_and_gradients(g, [x.to(other) for x in inputs])
    for a, b in zip(found, expected, strict=True):
        assert a.device == other
        assert same_bits(a.to(device), b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_stream(device, dtype):
    """Kernels go to the current stream, and so does their backward."""
    if device.type != "cuda":
        pytest.skip("a CPU has no streams")
    gate = torch.randn(1 << 20, device=device).to(dtype).requires_grad_()
    expected = outputs_and_gradients(lambda x: kernels.swiglu(x, x), [gate])
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = outputs_and_gradients(lambda x: kernels.swiglu(x, x), [gate])
    stream.synchronize()
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
