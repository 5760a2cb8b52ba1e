"""How a Triton kernel is held to fp64 and to its reference, with guard zones around its tensors."""

import contextlib
import math
from unittest import mock

import torch

from lorakit import kernels
from tests.triton_interpreter import DEVICE, on_triton

ZONE = 256  # bytes on either side; keeps the alignment of what lies between


def random(seed, *shape, scale=1.0):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return found.to(DEVICE)


def fenced(shape, dtype, device, buffers, allocate=torch.empty):
    """Memory of NaN between two zones of NaN."""
    size = math.prod(shape) * dtype.itemsize
    buffer = allocate(size + 2 * ZONE, dtype=torch.uint8, device=device).fill_(255)
    buffers.append((buffer, size))
    return buffer[ZONE : ZONE + size].view(dtype).view(shape)


@contextlib.contextmanager
def guarded(*inputs):
    """Yields copies of the inputs between guard zones; so is what kernels allocate inside. Raises
    if a zone or an input has changed.
    """
    buffers, empty_like = [], torch.empty_like
    copies = [fenced(t.shape, t.dtype, t.device, buffers).copy_(t) for t in inputs]

    def empty(*shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return fenced(tuple(shape), dtype, device, buffers, allocate)

    def like(t, **options):
        if options or not t.is_contiguous():
            return empty_like(t, **options)
        return fenced(t.shape, t.dtype, t.device, buffers, allocate)

    allocate = torch.empty
    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", like):
        yield copies
    for buffer, size in buffers:
        assert (buffer[:ZONE] == 255).all(), "written before the start of a tensor"
        assert (buffer[ZONE + size :] == 255).all(), "written beyond the end of a tensor"
    for before, after in zip(inputs, copies, strict=True):
        assert torch.equal(before.contiguous().view(torch.uint8), after.view(torch.uint8))


def run(f, inputs, backend=None):
    """Outputs of f and the gradients of its inputs, for fixed gradients of the outputs."""

    def both(*inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = f(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        given = [random(i, *y.shape).to(y.dtype) for i, y in enumerate(out)]
        return [*out, *torch.autograd.grad(out, inputs, given)]

    if backend == "triton":
        with on_triton(), guarded(*inputs) as inputs:
            return both(*inputs)
    with kernels.use_backend("reference"):
        return both(*inputs)


def within_budget(f, exactly, inputs, terms=0.0):
    """`exactly`: f in fp64. `terms`: the size of what may cancel inside, in fp32."""
    ours, reference = run(f, inputs, "triton"), run(f, inputs)
    truth = run(exactly, [t.double() for t in inputs])
    for y, same, exact in zip(ours, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        rounding = 4 * torch.finfo(y.dtype).eps * exact.abs().max() + 2**-21 * terms
        allowed = (same.double() - exact).abs().max() + rounding
        assert (y.double() - exact).abs().max() <= allowed
