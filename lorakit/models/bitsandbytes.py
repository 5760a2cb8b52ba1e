"""Weights that bitsandbytes packed, in 4 bits or in int8, as they lie in a file.

One packed weight is several tensors of the file: codes, scales and tables (kernels/ops/nf4 and
kernels/ops/int8 tell the layout). The tensors beside a weight show that it is packed. Its name and
the config do not, because "dynamic" models pack some layers and leave others in 16 bits.
`fold_packed` makes each such group of tensors one weight.

Sizes and tables are checked against each other when a group is read. A group that is not whole
raises a LorakitError.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.files.safetensors import LazyTensor
from lorakit.kernels.ops.nf4.tensor import MARK, read_state


class LazyPacked(NamedTuple):
    """A packed weight that is still on disk."""

    shape: tuple[int, ...]
    """The shape of the dense weight."""
    read: Callable[[], kernels.Packed]
    """Reads its codes and scales."""
    config: QuantConfig
    """How it is packed."""


LazyWeight = LazyTensor | LazyPacked
"""A weight of a model that is still on disk, dense or packed."""


def fold_packed(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyWeight]:
    """Return `tensors` with each group that belongs to one packed weight as one entry.

    Raises LorakitError for a group that is not whole; `where` names the files in the message.
    """
    left = dict(tensors)  # the parts of packed weights are taken out one group after the other
    packed = {}
    for key in tensors:
        name, mark, _ = key.partition(MARK)
        if mark:
            packed[name] = _folded(left, name, _four_bits, where)
        elif key.endswith(".SCB"):
            name = key.removesuffix("SCB") + "weight"
            packed[name] = _folded(left, name, _eight_bits, where)
    return {**left, **packed}


def only_dense(weights: Mapping[str, LazyWeight]) -> dict[str, LazyTensor] | None:
    """Return `weights` as they are, or None if one of them is packed."""
    dense = {name: w for name, w in weights.items() if isinstance(w, LazyTensor)}
    return dense if len(dense) == len(weights) else None


def _folded(
    left: dict[str, LazyTensor],
    name: str,
    fold: Callable[[dict[str, LazyTensor], str], LazyPacked],
    where: str,
) -> LazyPacked:
    """Take weight `name` out of `left` with `fold`, and name it and its files in an error."""
    if name not in left:
        raise LorakitError(f"{where}: tensor {name} is missing, its scales are there")
    try:
        return fold(left, name)
    except ValueError as error:
        raise LorakitError(f"{where}: tensor {name}: {error}") from None


def _four_bits(left: dict[str, LazyTensor], name: str) -> LazyPacked:
    """Take the tensors of a 4-bit weight out of `left`."""
    endings = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    beside = [f"{name}.{ending}" for ending in endings]
    marks = [f"{name}{MARK}{quant_type}" for quant_type in ("nf4", "fp4")]
    parts = _taken(left, name, [*beside, *marks])
    states = _values({part: tensor for part, tensor in parts.items() if part in marks})
    quant_type, state = read_state(states, name)
    kind: Literal["nf4", "fp4"] = "nf4" if quant_type == "nf4" else "fp4"
    config = QuantConfig(kind, state["blocksize"], "nested_blocksize" in state)
    return LazyPacked(
        tuple(state["shape"]),
        lambda: kernels.NF4Tensor.from_tensors(_values(parts), name),
        config,
    )


def _eight_bits(left: dict[str, LazyTensor], name: str) -> LazyPacked:
    """Take the tensors of an int8 weight out of `left`."""
    layer = name.removesuffix("weight")
    parts = _taken(left, name, [f"{layer}SCB", f"{layer}weight_format"])
    return LazyPacked(
        parts[name].shape,
        lambda: kernels.Int8Tensor.from_tensors(_values(parts), name),
        QuantConfig("int8"),
    )


def _taken(left: dict[str, LazyTensor], name: str, beside: list[str]) -> dict[str, LazyTensor]:
    """Take weight `name` and those of `beside` that are there out of `left`."""
    return {part: left.pop(part) for part in [name, *beside] if part in left}


def _values(parts: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {part: tensor.read() for part, tensor in parts.items()}
