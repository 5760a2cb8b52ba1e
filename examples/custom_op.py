"""How to add an op: one folder, three files, one test. Here they are in one program that runs.

    python examples/custom_op.py                       # the reference, on the CPU
    TRITON_INTERPRET=1 python examples/custom_op.py    # the Triton kernel too, interpreted
    python examples/custom_op.py                       # on a machine with a GPU: compiled

The op is the squared ReLU (arXiv:2109.08668): y = max(x, 0)^2, dy/dx = 2 max(x, 0). In the library
it would be the folder kernels/ops/squared_relu, and each part below says which file it would be.
"""

import torch
from torch import Tensor

import lorakit as lk

dispatch = lk.kernels.dispatch

# ---- kernels/ops/squared_relu/reference.py: plain torch, read first, right on any device ---------


def reference(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# ---- kernels/ops/squared_relu/triton.py: only such files import triton, and only when they run ---

if dispatch.has_triton():
    import triton
    import triton.language as tl

    BLOCK = 1024

    @triton.jit
    def _forward(X, Y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)  # fp32 inside, whatever comes
        x = tl.maximum(x, 0.0)
        tl.store(Y + at, (x * x).to(Y.dtype.element_ty), mask=at < n)  # rounded once

    @triton.jit
    def _backward(DY, X, DX, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        dy = tl.load(DY + at, mask=at < n, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
        dx = 2 * tl.maximum(x, 0.0) * dy
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=at < n)


class SquaredReLU(torch.autograd.Function):
    """x [...] -> [...]"""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        if n := x.numel():
            grid, warps = (triton.cdiv(n, BLOCK),), 128 // dispatch.lanes()
            dispatch.launch(_forward, grid, x, y, n, BLOCK, num_warps=warps)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(x)  # not over grad: the caller may still need it
        if n := x.numel():
            grid, warps = (triton.cdiv(n, BLOCK),), 128 // dispatch.lanes()
            dispatch.launch(_backward, grid, grad, x, dx, n, BLOCK, num_warps=warps)
        return dx


# ---- kernels/ops/squared_relu/__init__.py: the mathematics, and the one public function ----------


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise."""
    if dispatch.triton_runs(x):  # fp32, bf16 or fp16, on a GPU or where use_backend says so
        return SquaredReLU.apply(x)
    return reference(x)


# ---- tests/kernels/test_squared_relu.py: the error budget, against fp64 --------------------------


def check(backend: str, dtype: torch.dtype, device: str) -> float:
    """The largest error of y and dx on `backend`; raises if it is beyond the reference's and a few
    roundings.
    """
    x = torch.randn(2500, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def run(x: Tensor, backend: str) -> list[Tensor]:
        x = x.clone().requires_grad_()
        with lk.kernels.use_backend(backend):
            y = squared_relu(x)
            return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    truth = run(x.double(), "reference")
    worst = 0.0
    for ours, plain, exact in zip(run(x, backend), run(x, "reference"), truth, strict=True):
        error = (ours.double() - exact).abs().max().item()
        rounding = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error <= (plain.double() - exact).abs().max().item() + rounding
        worst = max(worst, error)
    return worst


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs_triton = dispatch.has_triton() and (
        device == "cuda" or dispatch.compiles_to() == "interpreted"
    )
    for backend in ("reference", "triton") if runs_triton else ("reference",):
        for dtype in (torch.float32, torch.float16):  # Triton's own interpreter is wrong for bf16
            error = check(backend, dtype, device)
            print(f"{backend:9} {str(dtype).removeprefix('torch.'):8} largest error {error:.1e}")


if __name__ == "__main__":
    main()
