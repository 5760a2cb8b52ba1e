"""The gated activations of the MLP (arXiv:2002.05202), elementwise:

swiglu    silu(gate) * up                       silu(z) = z sigmoid(z)
geglu     gelu(gate) * up                       gelu(z) = z Phi(z), Phi the normal distribution
          approximate="tanh": Phi(z) ~ (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2
"""

from torch import Tensor

from .. import dispatch
from . import reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, for two tensors of one shape and dtype."""
    if _suits_triton(gate, up):
        from . import triton

        with dispatch.on_device(gate):
            return triton.swiglu(gate, up)
    return reference.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, elementwise; approximate: "tanh", or "none" for the exact form by erf."""
    if _suits_triton(gate, up):
        from . import triton

        with dispatch.on_device(gate):
            return triton.geglu(gate, up, approximate)
    return reference.geglu(gate, up, approximate)


def _suits_triton(gate: Tensor, up: Tensor) -> bool:
    same = (gate.dtype, gate.shape) == (up.dtype, up.shape)
    return same and dispatch.triton_runs(gate)
