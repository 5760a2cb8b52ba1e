"""The tensors that belong to one quantized weight, taken out of those of the files."""

from collections.abc import Mapping
from typing import Any

from lorakit.files.safetensors import LazyTensor

FLOATS = ("F32", "F16", "BF16")
Said = Mapping[str, Any]
"""What config.json says of the quantization. The values are of any type."""
Read = tuple[str, str, LazyTensor]
"""How a weight is stored, for the log; its name; and the dense weight, still on disk."""


def config_groups(said: Said) -> list[Mapping[str, Any]]:
    """Return what a config of compressed-tensors says of each group of layers."""
    groups = said.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return [group for group in found if isinstance(group, Mapping)]


class Parts:
    """The tensors whose names have one beginning, such as "model.layers.0.mlp.up_proj."."""

    def __init__(self, left: dict[str, LazyTensor], beginning: str):
        self.left, self.beginning = left, beginning

    @property
    def weight(self) -> str:
        """The name of the dense weight."""
        name = self.beginning.removesuffix("_")
        return f"{name}weight" if name.endswith(".") else name

    def take(self, end: str, *dtypes: str) -> LazyTensor:
        """Take a tensor out of those that are left.

        Args:
            end: The end of its name.
            dtypes: The dtypes that it may have.

        Raises:
            ValueError: It is missing, or of another dtype.
        """
        tensor = self.take_if_there(end, *dtypes)
        if tensor is None:
            raise ValueError(f"{self.beginning}{end} is missing")
        return tensor

    def take_if_there(self, end: str, *dtypes: str) -> LazyTensor | None:
        """Take a tensor as `take` does, or return None if there is none."""
        tensor = self.left.pop(self.beginning + end, None)
        if tensor is not None and tensor.dtype not in dtypes:
            raise ValueError(
                f"{self.beginning}{end} holds {tensor.dtype}, not {' or '.join(dtypes)}"
            )
        return tensor


def has_shape(what: str, tensor: LazyTensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has none of these shapes."""
    if tensor.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"its {what} are {tensor.shape}, not {wanted}")


def matrix(what: str, tensor: LazyTensor) -> tuple[int, int]:
    """Return rows and columns of a matrix that is not empty; raise ValueError for another one."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"its {what} are {tensor.shape}, which is no matrix")
    rows, columns = tensor.shape
    return rows, columns
