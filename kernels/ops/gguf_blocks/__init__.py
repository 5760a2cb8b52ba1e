"""GGUF's block formats: matrices as llama.cpp stores them, with the bytes that llama.cpp writes.

A row is cut into blocks of 32 values, or into super-blocks of 256 with 8 or 16 sub-blocks of their
own. The formulas are what a reader computes; q is a code, d, m and dmin are fp16:

    q8_0    32 values, 34 bytes     d q                     d, 32 int8
    q4_0    32 values, 18 bytes     d (q - 8)               d, nibbles
    q4_1    32 values, 20 bytes     d q + m                 d, m, nibbles
    q5_0    32 values, 22 bytes     d (q - 16)              d, fifth bits, nibbles
    q5_1    32 values, 24 bytes     d q + m                 d, m, fifth bits, nibbles
    iq4_nl  32 values, 18 bytes     d LEVELS[q]             d, nibbles
    mxfp4   32 values, 17 bytes     2^(e-128) LEVELS4[q]    e, nibbles
    q4_k    256 values, 144 bytes   (d s_j) q - dmin m_j    d, dmin, s and m, nibbles
    q5_k    256 values, 176 bytes   (d s_j) q - dmin m_j    d, dmin, s and m, fifth bits, nibbles
    q6_k    256 values, 210 bytes   (d s_j) (q - 32)        4 bits, 2 bits, s as 16 int8, d

mxfp4 is the OCP's format of microscaling floats, whose scales are powers of two. Values that came
from it come out as they were. It has no search, and no C++.

Nibbles: the low half of a byte is one value, the high half the value 16 later (32 later in q4_k and
q5_k, 64 in q6_k). Fifth bits: bit i of a 32-bit integer is that of value i; in q5_k bit j of byte i
is that of value i of sub-block j. q4_k's 6-bit s_j and m_j, j = 0..7, share 12 bytes, for j < 4:

    byte j = s_j | (s_{j+4} >> 4) << 6        byte 4 + j = m_j | (m_{j+4} >> 4) << 6
    byte 8 + j = (s_{j+4} & 15) | (m_{j+4} & 15) << 4

q6_k takes 128 values as four rows r of 32: 64 bytes with the low 4 bits (r0 and r2, then r1 and
r3), and 32 bytes with the high bits, r0 lowest.

Which codes and scales a block gets is a search, for the least sum of w (x - x')^2. The weights w
are made of the values, and of the importance of their columns if that is given: the mean square of
what the column is multiplied by. The searches are those of llama.cpp (ggml-quants.c), and the bytes
too: every fp32 operation is rounded on its own and sums run in the order of the values. So a file
does not depend on who made it, and its quality is known. The price is that no better search is
made, and that a sum cannot be split over the lanes of a register: the C++ gives each lane a block
of its own.
"""

import torch
from torch import Tensor

from ... import dispatch
from . import reference
from .layouts import BLOCK_LAYOUTS, BlockLayout

LARGEST = torch.finfo(torch.float16).max  # what the scales are stored in


def quantize_blocks(w: Tensor, block_type: str, importance: Tensor | None = None) -> Tensor:
    """Quantize the rows of a matrix to a block format of GGUF, with the bytes of llama.cpp.

    Args:
        w: [rows, columns], fp32, bf16 or fp16, of any strides.
        block_type: a key of BLOCK_LAYOUTS, such as "q4_k". It must divide the columns into blocks.
        importance: how much an error in each column matters, fp32 [columns], at least 0; its unit
            is any. q8_0 and mxfp4 ignore it, as llama.cpp does.

    Returns:
        The blocks of each row, uint8 [rows, bytes], in new memory on the device of `w`.

    Raises:
        ValueError: `w` is no such matrix, or has NaN, infinite values or others beyond fp16;
            `block_type` is unknown or does not fit the columns; `importance` has another shape,
            dtype or device, or NaN, infinite or negative values.
    """
    layout = _layout(block_type)
    if w.dtype not in dispatch.FLOATS or w.dim() != 2:
        raise ValueError(
            f"blocks hold float32, bfloat16 or float16 matrices, not {w.dtype} {tuple(w.shape)}"
        )
    rows, columns = w.shape
    if columns % layout.values:
        raise ValueError(
            f"a row of {columns} values is no multiple of {block_type}'s block of {layout.values}"
        )
    if importance is not None:
        _check_importance(importance, w)
    if w.numel() == 0:
        return w.new_empty((rows, columns // layout.values * layout.nbytes), dtype=torch.uint8)
    w = w.detach()
    low, high = (bound.item() for bound in torch.aminmax(w))
    if not (low >= -LARGEST and high <= LARGEST):
        raise ValueError(
            f"cannot quantize a matrix with values from {low} to {high}: its scales are in float16"
        )
    if block_type in ("q8_0", "mxfp4"):
        importance = None
    backend = dispatch.backend(__package__, w.device, cpu=block_type != "mxfp4", triton=False)
    return backend.quantize(w, block_type, importance)


def dequantize_blocks(
    blocks: Tensor, block_type: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make a matrix in a block format of GGUF dense.

    Args:
        blocks: uint8 [rows, bytes], as `quantize_blocks` returns it.
        block_type: a key of BLOCK_LAYOUTS.
        dtype: of the result. The values are computed in fp32 and rounded to it once.

    Returns:
        The dense matrix [rows, columns], in new memory on the device of `blocks`.

    Raises:
        ValueError: `blocks` is no such matrix, or `block_type` is unknown or does not fit it.
    """
    layout = _layout(block_type)
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % layout.nbytes:
        raise ValueError(
            f"rows of {block_type} are uint8 [rows, a multiple of {layout.nbytes}], not "
            f"{blocks.dtype} {tuple(blocks.shape)}"
        )
    if blocks.numel() == 0:
        columns = blocks.shape[1] // layout.nbytes * layout.values
        return blocks.new_empty((len(blocks), columns), dtype=dtype)
    return reference.dequantize(blocks, block_type, dtype)


def _layout(block_type: str) -> BlockLayout:
    if block_type not in BLOCK_LAYOUTS:
        known = ", ".join(BLOCK_LAYOUTS)
        raise ValueError(f"unknown block type {block_type!r}: choose one of {known}")
    return BLOCK_LAYOUTS[block_type]


def _check_importance(importance: Tensor, w: Tensor) -> None:
    fits = importance.shape == w.shape[1:] and importance.device == w.device
    if not fits or importance.dtype != torch.float32:
        raise ValueError(
            f"the importance of the columns of a matrix {tuple(w.shape)} on {w.device} is not "
            f"float32 [{w.shape[1]}] there but {importance.dtype} {tuple(importance.shape)} on "
            f"{importance.device}"
        )
    if not ((importance >= 0) & (importance < torch.inf)).all():
        raise ValueError("an importance is NaN, infinite or negative")
