"""Carried out of lorakit/tensors.py."""

from collections.abc import Callable, Mapping

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.files.safetensors import LazyTensor
from lorakit.kernels.ops.nf4.tensor import MARK, read_state


def fold_packed(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """`tensors` with every group that bitsandbytes wrote for one weight, in 4 bits or in int8, as
    one of the weight's shape. Raises LorakitError for a group that is not whole.
    """
    folded = dict(tensors)
    for key in tensors:
        name, mark, _ = key.partition(MARK)
        if mark:
            folded |= _fold(folded, name, _four_bits, where)
        elif key.endswith(".SCB"):
            folded |= _fold(folded, key.removesuffix("SCB") + "weight", _eight_bits, where)
    return folded


def _fold(folded: dict[str, LazyTensor], name: str, kind: Callable, where: str):
    if name not in folded:
        raise LorakitError(f"{where}: tensor {name} is missing, its scales are there")
    try:
        return {name: kind(folded, name)}
    except ValueError as error:
        raise LorakitError(f"{where}: tensor {name}: {error}") from None


def _four_bits(folded: dict[str, LazyTensor], name: str) -> LazyTensor:
    beside = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", MARK + "nf4")
    beside = [name + end for end in (*beside, MARK + "fp4") if name + end in folded]
    parts = {part: folded.pop(part) for part in beside} | {name: folded[name]}
    marks = {part: tensor.read() for part, tensor in parts.items() if MARK in part}
    quant_type, state = read_state(marks, name)
    config = QuantConfig(quant_type, state["blocksize"], "nested_blocksize" in state)

    def read() -> kernels.NF4Tensor:
        found = {part: tensor.read() for part, tensor in parts.items()}
        return kernels.NF4Tensor.from_tensors(found, name)

    return LazyTensor(tuple(state["shape"]), read, config)


def _eight_bits(folded: dict[str, LazyTensor], name: str) -> LazyTensor:
    beside = [name.removesuffix("weight") + end for end in ("SCB", "weight_format")]
    parts = {part: folded.pop(part) for part in beside if part in folded} | {name: folded[name]}

    def read() -> kernels.Int8Tensor:
        found = {part: tensor.read() for part, tensor in parts.items()}
        return kernels.Int8Tensor.from_tensors(found, name)

    return LazyTensor(parts[name].shape, read, QuantConfig("int8"))
