"""The arithmetic of quantized files: packed bits, 4-bit floats, exponents, and scales of blocks.

Every function returns exact values, but `scaled`, which rounds a product to fp32 once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# What the eight positive numbers of E2M1 are (OCP Microscaling Formats, 1.0). Bit 3 is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the numbers that rows of words hold, the lowest bits first and without gaps.

    Args:
        words: [rows, n] int32, or uint8 if `bits` divides 8.
        bits: The bits of a number, 1 to 8.
        count: How many numbers a row holds; the last word may hold fewer than fit.

    Returns:
        The numbers, [rows, count] uint8.
    """
    if 8 % bits == 0:  # no number crosses a byte
        each = words.contiguous().view(torch.uint8)
        shifts = range(0, 8, bits)
        found = torch.stack([each >> shift & (1 << bits) - 1 for shift in shifts], -1)
        return found.flatten(1)[:, :count]
    rows = len(words)
    groups = F.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)  # 32 numbers each
    found = torch.empty(rows, groups.shape[1], 32, dtype=torch.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        number = groups[:, :, word] >> shift
        if shift + bits > 32:  # the shift has filled in the sign
            rest = 32 - shift
            number = number & (1 << rest) - 1 | groups[:, :, word + 1] << rest
        found[:, :, i] = number & (1 << bits) - 1
    return found.flatten(1)[:, :count]


def four_bit_floats(codes: Tensor) -> Tensor:
    """Return the E2M1 numbers of codes from 0 to 15, in fp32."""
    table = torch.tensor([*_E2M1, *(-x for x in _E2M1)])
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def exponents(scales: Tensor) -> Tensor:
    """Return scales in fp32; bytes are exponents of E8M0, 2^(byte - 127).

    255, which is E8M0's NaN, becomes infinity.
    """
    if scales.dtype != torch.uint8:
        return scales.float()
    exponent = scales.int()
    # The bits of a float: the exponent stands above 23 bits. 2^-127 has the exponent 0.
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)


def scaled(
    numbers: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Return (numbers - zeros) * scales, one zero and one scale for each block of a matrix.

    Args:
        numbers: [rows, columns], of any dtype.
        scales: [r, c], as fp32 can hold them.
        zeros: [r, c], of any dtype; None: all are zero.
        block: The rows and columns of a block; those at the ends may be cut off. None: r divides
            the rows, and c the columns.

    Returns:
        The dense matrix, [rows, columns] fp32.

    Raises:
        ValueError: A scale is NaN or infinite.
    """
    rows, columns = numbers.shape
    r, c = scales.shape
    height, width = block or (rows // r, columns // c)
    check_finite(scales)

    def spread(grid: Tensor) -> Tensor:
        """Return what belongs to each row, and to each group or column of it."""
        grid = grid.float()
        if height > 1:
            grid = grid.repeat_interleave(height, 0)[:rows]
        return grid.unsqueeze(-1) if whole else grid.repeat_interleave(width, 1)[:, :columns]

    whole = c * width == columns
    dense = numbers.to(torch.float32, copy=True).contiguous()
    blocks = dense.view(rows, c, width) if whole else dense
    if zeros is not None:
        blocks.sub_(spread(zeros))
    blocks.mul_(spread(scales))
    return dense


def check_finite(scales: Tensor) -> None:
    """Raise ValueError if a scale is NaN or infinite."""
    if not scales.float().isfinite().all():
        raise ValueError("its scales hold NaN or infinite numbers")
