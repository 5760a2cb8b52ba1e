"""Root mean square normalization (arXiv:1910.07467): y = w * x / sqrt(mean(x^2) + eps), per row.

The statistics are fp32 whatever x is. The normalized row is rounded to x's dtype before the product
with w, the order of the published Llama models; models trained with the other order differ in the
last bit of bf16.
"""

from torch import Tensor

from . import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] normalized over its last dimension and scaled by weight [H]: [..., H] in x's
    dtype.
    """
    return reference.rms_norm(x, weight, eps)
