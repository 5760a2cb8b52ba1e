"""The activations that the gate of an MLP may have: their names, and their numbers in C++."""

from enum import IntEnum


class Activation(IntEnum):
    """One activation, by its name in `hidden_act` of a model's config.json.

    The value is the activation's number in the C++ kernels.
    """

    silu = 0
    gelu_pytorch_tanh = 1
    gelu = 2
    swiglu_oai = 3

    @property
    def approximate(self) -> str:
        """The name that torch's `gelu` has for this form, "tanh" or "none"."""
        return "tanh" if self is Activation.gelu_pytorch_tanh else "none"


_NAMES = tuple(Activation.__members__)


def check_activation(name: str, argument: str = "hidden_act") -> None:
    """Raise ValueError, which says the argument, unless `name` is that of an activation."""
    if name not in _NAMES:
        raise ValueError(f"{argument} is {name!r}: choose one of {', '.join(_NAMES)}")
