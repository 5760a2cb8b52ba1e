"""Weights in 4-bit floats (E2M1): NVFP4, and MXFP4.

    ModelOpt, NVFP4                weight uint8 [out, in / 2]         W = code * (scale * scale_2)
                                   weight_scale FP8 [out, in / 16]    weight_scale_2: one number
    compressed-tensors, NVFP4      weight_packed, weight_scale        W = code * (scale / global)
                                   weight_global_scale: one number
    compressed-tensors, MXFP4      weight_packed                      W = code * 2^(scale - 127)
                                   weight_scale uint8 [out, in / 32]

    gpt-oss, MXFP4                 gate_up_proj_blocks uint8 [E, out, in / 32, 16], W as above
                                   gate_up_proj_scales uint8 [E, out, in / 32]; down_proj too

The low half of a byte is the first of its two codes. These are modelopt's NVFP4QTensor and the
NVFP4PackedCompressor and MXFP4PackedCompressor of compressed_tensors, and transformers'
integrations/mxfp4.py. The experts of gpt-oss are fused, and dense ones lie transposed in its files,
so they are read as [E, in, out], one expert at a time.
"""

import torch
from torch import Tensor

from lorakit.files.safetensors import LazyTensor
from lorakit.models.quantized_files.parts import Parts, Read, Said, has_shape, matrix
from lorakit.models.quantized_files.values import exponents, four_bit_floats, scaled, unpacked

_ONE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # the shapes of one number


def modelopt(parts: Parts, said: Said) -> Read:
    """Read the weight whose second scale is `weight_scale_2`."""
    second = parts.take("weight_scale_2", "F32")
    return _read(parts, "weight", second, divides=False)


def compressed_tensors(parts: Parts, said: Said) -> Read:
    """Read the weight whose codes are `weight_packed`."""
    return _read(parts, "weight_packed", parts.take_if_there("weight_global_scale", "F32"), True)


def gpt_oss(parts: Parts, said: Said) -> Read:
    """Read the fused weights of a layer's experts, whose codes are `blocks`."""
    blocks, scale = parts.take("blocks", "U8"), parts.take("scales", "U8")
    if len(blocks.shape) != 4 or 0 in blocks.shape or blocks.shape[3] != 16:
        raise ValueError(f"its blocks are {blocks.shape}, not [experts, rows, blocks, 16]")
    has_shape("scales", scale, blocks.shape[:3])
    experts, rows, columns = blocks.shape[0], blocks.shape[1], blocks.shape[2] * 32

    def read_at(expert: int) -> Tensor:
        codes = unpacked(blocks.at(expert).reshape(rows, columns // 2), 4, columns)
        return scaled(four_bit_floats(codes), exponents(scale.at(expert))).t()

    def read() -> Tensor:
        return torch.stack([read_at(i) for i in range(experts)])

    dense = LazyTensor((experts, columns, rows), read, read_at)
    return "MXFP4 (blocks of 32)", parts.weight, dense


def _read(parts: Parts, name: str, second: LazyTensor | None, divides: bool) -> Read:
    codes = parts.take(name, "U8")
    scale = parts.take("weight_scale", "U8" if second is None else "F8_E4M3")
    rows, columns = matrix("codes", codes)
    columns *= 2
    size = matrix("scales", scale)[1]
    if columns % size:
        raise ValueError(f"its scales are {scale.shape}, its {columns} columns no multiple of them")
    has_shape("scales", scale, (rows, size))
    if second is not None:
        has_shape("second scales", second, *_ONE)

    def read() -> Tensor:
        scales = exponents(scale.read())
        if second is not None:
            other = second.read().reshape(())
            scales = scales / other if divides else scales * other
        return scaled(four_bit_floats(unpacked(codes.read(), 4, columns)), scales)

    kind = "MXFP4" if second is None else "NVFP4"
    what = f"{kind} (blocks of {columns // size})"
    return what, parts.weight, LazyTensor((rows, columns), read)
