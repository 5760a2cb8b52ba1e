"""Root mean square normalization (arXiv:1910.07467), per row:

    y = (offset + w) x / sqrt(mean(x^2) + eps)

The statistics are fp32 whatever x is. Two orders of rounding are in use, and models trained with
one differ from the other in the last bit of bf16:

    "llama"    the normalized row is rounded to x's dtype, then multiplied by w in that dtype
    "gemma"    the product is taken in fp32 and rounded once; Gemma also stores w with offset 1
"""

from torch import Tensor

from .. import dispatch
from . import reference


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """x [..., H] normalized over its last dimension and scaled by weight [H]: [..., H] in x's
    dtype. casting_mode: "llama" or "gemma", see above.
    """
    if dispatch.triton_runs(x):
        from . import triton

        return triton.rms_norm(x, weight, eps, weight_offset, casting_mode)
    return reference.rms_norm(x, weight, eps, weight_offset, casting_mode)
