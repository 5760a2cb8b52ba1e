"""Root mean square normalization (arXiv:1910.07467), per row:

    y = (offset + w) x / sqrt(mean(x^2) + eps)

The statistics are fp32 whatever x is. Two orders of rounding are in use, and models trained with
one differ from the other in the last bit of bf16:

    "llama"    the normalized row is rounded to x's dtype, then multiplied by w in that dtype
    "gemma"    the product is taken in fp32 and rounded once; Gemma also stores w with offset 1
"""

from types import ModuleType

from torch import Tensor

from .. import dispatch
from . import cpu, reference

WIDEST = 32768  # row of the Triton kernel, which beyond would spill registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """x [..., H] normalized over its last dimension and scaled by weight [H]: [..., H] in x's
    dtype. casting_mode: "llama" or "gemma", see above; ValueError for another.
    """
    check_casting_mode(casting_mode)
    with dispatch.on_device(x):
        return _backend(x, weight).rms_norm(x, weight, eps, weight_offset, casting_mode)


def check_casting_mode(casting_mode: str) -> None:
    """Raises ValueError unless it is one of the two."""
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"casting_mode is {casting_mode!r}: choose llama or gemma")


def _backend(x: Tensor, weight: Tensor) -> ModuleType:
    if x.dtype not in dispatch.FLOATS or weight.shape != x.shape[-1:]:
        return reference
    picked = dispatch.pick(x.device, "cpu", "triton")
    if picked == "triton" and x.shape[-1] <= WIDEST:
        from . import triton

        return triton
    return cpu if picked == "cpu" and cpu.fits(x, weight) else reference


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """The sum s = x + residual [..., H], rounded to x's dtype, normalized as by `rms_norm`, and s
    itself: both [..., H].
    """
    check_casting_mode(casting_mode)
    same = (x.dtype, x.shape) == (residual.dtype, residual.shape)
    backend = _backend(x, weight) if same else reference
    if backend is reference:
        total = x + residual
        return reference.rms_norm(total, weight, eps, weight_offset, casting_mode), total
    with dispatch.on_device(x):
        return backend.add_rms_norm(x, residual, weight, eps, weight_offset, casting_mode)
