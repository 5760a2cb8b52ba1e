"""The gated activation of the Llama MLP (arXiv:2002.05202): silu(gate) * up, with silu(z) = z
sigmoid(z).
"""

from torch import Tensor

from . import reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, for two tensors of one shape and dtype."""
    return reference.swiglu(gate, up)
