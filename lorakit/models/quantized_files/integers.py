"""Weights in integers of a few bits, packed into words of 32: GPTQ, AWQ and compressed-tensors.

    GPTQ   qweight [in * bits / 32, out]    qzeros [groups, out * bits / 32]
           scales [groups, out]             g_idx [in], the group of each column of W
           W[o, i] = scales[g, o] * (q - z), with g = g_idx[i]
    AWQ    qweight [in, out / 8]            qzeros [groups, out / 8]
           scales [groups, out]             W as above, groups of equal size, 4 bits
    compressed-tensors, pack-quantized
           weight_packed [out, in * bits / 32]   weight_scale [out, groups]   weight_shape [2]
           weight_zero_point [out * bits / 32, groups], or none; then z = 2^(bits - 1)

All words are int32, the first number in the lowest bits. A word of AWQ holds columns 0, 2, 4, 6, 1,
3, 5, 7 of eight. GPTQ's first version stores z - 1: one was subtracted from each number of a word,
by AutoGPTQ, or from the word as a whole, by GPTQModel. Adding to the whole word undoes either.

The layouts are those of AutoGPTQ (qlinear_cuda.py), GPTQModel (utils/model.py), AutoAWQ
(modules/linear/gemm.py) and compressed_tensors (compressors/pack_quantized).
"""

import torch
from torch import Tensor

from lorakit.files.safetensors import LazyTensor
from lorakit.models.quantized_files.parts import FLOATS, Parts, Read, Said, has_shape, matrix
from lorakit.models.quantized_files.values import check_finite, scaled, unpacked

_OF_GPTQ = (2, 3, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight number i of a word is


def gptq(parts: Parts, said: Said) -> Read:
    """Read the weight whose words are `qweight`, in GPTQ's layout."""
    words, zeros, scales = _three(parts)
    order = parts.take_if_there("g_idx", "I32", "I64")
    rows, out = matrix("words", words)
    groups = matrix("scales", scales)[0]
    if order is None:
        columns, bits = _without_order(said, rows, groups)
    else:
        has_shape("groups", order, order.shape[:1])
        columns = order.shape[0] if order.shape else 0
        bits = rows * 32 // columns if columns else 0
    if bits not in _OF_GPTQ or rows * 32 != columns * bits:
        raise ValueError(
            f"it has {rows} rows of words for {columns} columns; numbers of 2, 3, 4 and 8 bits are "
            "read"
        )
    _fit(words, zeros, scales, (rows, out), (groups, -(-out * bits // 32)), (groups, out))
    first = said.get("checkpoint_format", said.get("format")) != "gptq_v2"

    def read() -> Tensor:
        q = unpacked(words.read().t().contiguous(), bits, columns)
        z = _zeros(zeros.read(), bits, out, first)
        if order is None:
            return scaled(q, scales.read().t(), z.t())
        return _by_group(q, scales.read().t(), z.t(), order.read().long())

    return _kind("GPTQ", bits, columns, groups), parts.weight, LazyTensor((out, columns), read)


def awq(parts: Parts, said: Said) -> Read:
    """Read the weight whose words are `qweight`, in AWQ's layout."""
    words, zeros, scales = _three(parts)
    columns, width = matrix("words", words)
    groups, out = matrix("scales", scales)
    if columns % groups:
        raise ValueError(f"it has scales for {groups} groups of {columns} columns")
    _fit(words, zeros, scales, (columns, out // 8), (groups, out // 8), (groups, width * 8))

    def numbers(words: Tensor) -> Tensor:
        """Return [out, in or groups] uint8, of words [in or groups, out / 8]."""
        words = words.t().contiguous()
        found = torch.empty(out // 8, 8, words.shape[1], dtype=torch.uint8)
        for i, column in enumerate(_AWQ_ORDER):
            found[:, column] = words >> 4 * i & 15
        return found.flatten(0, 1)

    def read() -> Tensor:
        return scaled(numbers(words.read()), scales.read().t(), numbers(zeros.read()))

    return _kind("AWQ", 4, columns, groups), parts.weight, LazyTensor((out, columns), read)


def compressed_tensors(parts: Parts, said: Said) -> Read:
    """Read the weight whose words are `weight_packed`."""
    words = parts.take("weight_packed", "I32")
    scales = parts.take("weight_scale", *FLOATS)
    given = parts.take("weight_shape", "I64", "I32")
    zeros = parts.take_if_there("weight_zero_point", "I32", "I8")
    order = parts.take_if_there("weight_g_idx", "I32", "I64")
    rows, width = matrix("words", words)
    has_shape("shape", given, (2,))
    out, columns = given.read().tolist()
    bits = next((b for b in range(1, 9) if -(-columns * b // 32) == width), 0)
    if out != rows or columns <= 0 or not bits:
        raise ValueError(f"its words are {words.shape}, its weight_shape says [{out}, {columns}]")
    r, groups = (1, 1) if scales.shape in ((), (1,)) else matrix("scales", scales)
    if rows % r or (r != rows and groups > 1) or (order is None and columns % groups):
        raise ValueError(f"its scales are {scales.shape}, its values {(rows, columns)}")
    if zeros is not None and zeros.dtype == "I32":
        has_shape("zero points", zeros, (-(-r * bits // 32), groups))
    elif zeros is not None:
        has_shape("zero points", zeros, scales.shape)
    if order is not None:
        has_shape("groups", order, (columns,))

    def read() -> Tensor:
        z = torch.full((r, groups), 1 << bits - 1)
        if zeros is not None and zeros.dtype == "I32":
            z = unpacked(zeros.read().t().contiguous(), bits, r).t()
        elif zeros is not None:
            z += zeros.read().reshape(r, groups)
        q, s = unpacked(words.read(), bits, columns), scales.read().reshape(r, groups)
        return scaled(q, s, z) if order is None else _by_group(q, s, z, order.read().long())

    kind = _kind("compressed-tensors", bits, columns, groups)
    return kind, parts.weight, LazyTensor((rows, columns), read)


def _without_order(said: Said, rows: int, groups: int) -> tuple[int, int]:
    """Return the columns and the bits of a weight of GPTQ without g_idx, whose groups are equal."""
    bits = said.get("bits")
    if type(bits) is not int or bits not in _OF_GPTQ or rows * 32 // bits % groups:
        raise ValueError(f"g_idx is missing, and {bits!r} bits do not fit {groups} groups")
    return rows * 32 // bits, bits


def _kind(tool: str, bits: int, columns: int, groups: int) -> str:
    """Return how a weight is stored, for the log."""
    what = "a scale per row" if groups == 1 else f"groups of {-(-columns // groups)}"
    return f"{tool} ({bits} bits, {what})"


def _three(parts: Parts) -> tuple[LazyTensor, LazyTensor, LazyTensor]:
    """Return words, zero points and scales of GPTQ or AWQ."""
    words, zeros = parts.take("qweight", "I32"), parts.take("qzeros", "I32")
    return words, zeros, parts.take("scales", *FLOATS)


def _fit(words: LazyTensor, zeros: LazyTensor, scales: LazyTensor, *shapes: tuple) -> None:
    """Raise ValueError if words, zero points and scales are not of these three shapes."""
    has_shape("words", words, shapes[0])
    has_shape("zero points", zeros, shapes[1])
    has_shape("scales", scales, shapes[2])


def _zeros(words: Tensor, bits: int, count: int, first: bool) -> Tensor:
    """Return GPTQ's zero points, [groups, count]; its first version stores them less one."""
    if not first:
        return unpacked(words, bits, count)
    if bits == 3:  # whose numbers cross words; both libraries count each for itself
        return unpacked(words, bits, count) + 1 & 7
    ones = sum(1 << i for i in range(0, 32, bits))
    sums = words.long() + ones & 0xFFFFFFFF
    low = torch.where(sums >= 1 << 31, sums - (1 << 32), sums).int()
    return unpacked(low, bits, count)


def _by_group(numbers: Tensor, scales: Tensor, zeros: Tensor, each: Tensor) -> Tensor:
    """Return (numbers - zeros) * scales with the group of every column.

    Args:
        numbers: [out, in].
        scales: [out, groups].
        zeros: [out, groups].
        each: [in], the group of each column.

    Returns:
        [out, in] fp32.

    Raises:
        ValueError: A column names a group that there is not, or a scale is NaN or infinite.
    """
    columns, groups = len(each), scales.shape[1]
    if each.min() < 0 or each.max() >= groups:
        raise ValueError(f"a column is in group {int(each.max())}, of {groups}")
    if columns % groups == 0 and torch.equal(each, torch.arange(columns) // (columns // groups)):
        return scaled(numbers, scales, zeros)
    check_finite(scales)
    dense = numbers.to(torch.float32, copy=True)
    for grid, combine in ((zeros, dense.sub_), (scales, dense.mul_)):
        combine(grid.float().contiguous().index_select(1, each))
    return dense
