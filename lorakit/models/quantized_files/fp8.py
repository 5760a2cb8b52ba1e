"""Weights in 8 bits: FP8 (E4M3), and int8 of compressed-tensors.

    X.weight [out, in]   X.weight_scale_inv or X.weight_scale: one scale, [out], [out, 1], or [r, c]

W = weight * scale, each block by its scale. A grid [r, c] has blocks of `weight_block_size`, of
which the last of a row or column may be cut off, or else of equal sizes. A scale is a float or the
exponent of one, 2^(byte - 127). Published by Mistral (one scale), Qwen and DeepSeek (128 x 128),
Meta (one a row), llm-compressor and ModelOpt.

transformers reads the first of these with integrations/finegrained_fp8.py, the last ones
compressed_tensors does with compressors/naive_quantized.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lorakit.files.safetensors import LazyTensor
from lorakit.models.quantized_files.parts import (
    FLOATS,
    Parts,
    Read,
    Said,
    config_groups,
    has_shape,
    matrix,
)
from lorakit.models.quantized_files.values import exponents, scaled

_SCALES = (*FLOATS, "U8", "F8_E8M0")


def fine_grained(parts: Parts, said: Said) -> Read:
    """Read the weight whose scales are `weight_scale_inv`."""
    return _read(parts, parts.take("weight_scale_inv", *_SCALES), [said.get("weight_block_size")])


def plain(parts: Parts, said: Said) -> Read:
    """Read the weight whose scales are `weight_scale`."""
    weights = [group.get("weights") for group in config_groups(said)]
    sizes = [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    return _read(parts, parts.take("weight_scale", *_SCALES), sizes)


def _read(parts: Parts, scale: LazyTensor, sizes: Iterable[Any]) -> Read:
    """Read a weight; `sizes` are those of blocks that the config names, of any type."""
    weight = parts.take("weight", "F8_E4M3", "I8")
    zero = parts.take_if_there("weight_zero_point", "I8", "F8_E4M3", *FLOATS)
    shape = matrix("values", weight)
    if scale.shape in ((), (1,), (1, 1)):
        grid, what = (1, 1), "one scale"
    elif scale.shape in (shape[:1], (shape[0], 1)):
        grid, what = (shape[0], 1), "a scale per row"
    else:
        grid, what = matrix("scales", scale), ""
    block = _block(shape, grid, sizes)
    if zero is not None:
        has_shape("zero points", zero, scale.shape)

    def read() -> Tensor:
        zeros = None if zero is None else zero.read().reshape(grid)
        return scaled(weight.read(), exponents(scale.read()).reshape(grid), zeros, block)

    kind = "FP8" if weight.dtype == "F8_E4M3" else "int8"
    what = what or f"{block[0]} x {block[1]} blocks"
    return f"{kind} ({what})", parts.weight, LazyTensor(shape, read)


def _block(shape: tuple[int, int], grid: tuple[int, int], sizes: Iterable[Any]) -> tuple[int, int]:
    """Return the size of the blocks that a grid of scales belongs to.

    It is the first of `sizes` that fits, or else the one that divides the matrix.
    """
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size):
            height, width = size
            if min(size) > 0 and (-(-shape[0] // height), -(-shape[1] // width)) == grid:
                return height, width
    if shape[0] % grid[0] or shape[1] % grid[1]:
        raise ValueError(f"its scales are {grid}, its values {shape}, of no known block size")
    return shape[0] // grid[0], shape[1] // grid[1]
