"""Parameters in bfloat16 whose steps are those of fp32 parameters.

A weight in bf16 has 8 significant bits. A step moves it by some 1e-5 of its size, which rounds to
nothing. So the optimizer keeps what bf16 leaves out. With x the fp32 number, as 32 bits,

    remainder = the lower 16 bits of x, as int16           p = (x - remainder) / 2^16, as bf16
    x = 2^16 p + remainder

p is x rounded to the nearest bf16, and both together are x to the bit: a copy in fp32, in 4 bytes
beside none. Apex calls it `store_param_remainders`. Before the first step the remainder is 0.

The step itself is that of fp32. Elsewhere than in a kernel that reads both halves, a part of a
parameter and of its gradient is made fp32, updated, and split again, while the caches hold it.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ... import pretend
from .clipped import AdamWRow
from .lists import M, Update
from .state import BLOCK, Moment8bit

PART, PART_CPU = 1 << 24, 1 << 17  # values of a parameter that are fp32 at a time
HALF = 1 << 16


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 numbers, in new memory, of p bf16 and its remainder int16, of any shape."""
    bits = p.detach().view(torch.int16).to(torch.int32, copy=True)
    return bits.mul_(HALF).add_(remainder).view(torch.float32)


def put(x: Tensor, p: Tensor, remainder: Tensor) -> None:
    """Write numbers x, fp32, to p bf16 and its remainder int16."""
    bits = x.view(torch.int32)
    remainder.copy_(bits)  # the lower half
    p.detach().view(torch.int16).copy_((bits + HALF // 2) >> 16)


def in_fp32(update: Update[M], remainders: list[Tensor]) -> Iterator[Update[M]]:
    """Yield the update of one part after another, its parameter and gradient in fp32.

    The caller takes that step before it asks for the next part; then the part is written back.
    """
    for p, g, m, v, remainder in zip(*update.lists, remainders, strict=True):
        size = PART_CPU if pretend.kind_of(p.device) == "cpu" else PART
        for row in parts(AdamWRow(0, p, g, m, v, remainder), size):
            assert row.remainder is not None
            x = joined(row.param, row.remainder)
            first, second = cast(M, row.exp_avg), cast(M, row.exp_avg_sq)  # as m and v are
            yield Update([x], [row.grad.float()], [first], [second], update.numbers)
            put(x, row.param, row.remainder)


def parts(row: AdamWRow, size: int) -> Iterator[AdamWRow]:
    """Yield a row in parts of `size` values, a multiple of 256, that share its memory.

    It comes as it is if it is no larger, or has strides.
    """
    if row.param.numel() <= size or not all(t.is_contiguous() for t in row.tensors):
        yield row
        return
    columns = [row.param.view(-1).split(size), row.grad.view(-1).split(size)]
    for moment in (row.exp_avg, row.exp_avg_sq):
        if isinstance(moment, Moment8bit):
            pairs = zip(moment.codes.split(size), moment.absmax.split(size // BLOCK), strict=True)
            columns.append([Moment8bit(*pair) for pair in pairs])
        else:
            columns.append(moment.view(-1).split(size))
    if row.remainder is not None:
        columns.append(row.remainder.view(-1).split(size))
    for part in zip(*columns, strict=True):
        yield AdamWRow(row.group, *part)
