"""A packed weight made dense, whole or a panel of rows at a time, and products with panels.

On a CPU a panel holds PANEL values, which the caches keep until they are multiplied, and which is
all the memory that a product takes. On a GPU the weight is made dense whole: torch's allocator
hands the next layer the same memory.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ... import dispatch, pretend
from ..int8 import Int8Tensor, dequantize_int8, dequantize_int8_rows
from ..nf4 import (
    NF4Tensor,
    dense_nf4,
    dequantize_nf4,
    dequantize_nf4_panels,
    dequantize_nf4_rows,
)

Packed = NF4Tensor | Int8Tensor
Panels = Iterable[tuple[slice, Tensor]]  # which rows, and these, dense: [rows, K]

PANEL = 1 << 20  # values: 4 MB in fp32
PANEL_GPU = 1 << 26  # of a head, whose products would else be some thousand small launches


def dequantize(q: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Make a packed tensor dense.

    Args:
        q: the packed tensor, of either kind.
        dtype: of the result; the original's if it is None.

    Returns:
        The dense tensor of shape `q.shape`, in new memory.
    """
    return dequantize_nf4(q, dtype) if isinstance(q, NF4Tensor) else dequantize_int8(q, dtype)


def _dense(q: Packed, dtype: torch.dtype) -> Tensor:
    return dense_nf4(q, dtype) if isinstance(q, NF4Tensor) else dequantize_int8(q, dtype)


def dequantize_rows(q: Packed, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make some rows of a packed matrix dense, as the look-up of an embedding does.

    Only these rows are dequantized.

    Args:
        q: the packed matrix [N, K], of either kind.
        rows: which rows, int64 [...].
        dtype: of the result; the original's if it is None.

    Returns:
        The rows, [..., K].

    Raises:
        IndexError: a row is not there. The Triton kernel, which does not wait for the device to
            find out, makes it NaN instead.
    """
    if isinstance(q, NF4Tensor):
        return dequantize_nf4_rows(q, rows, dtype)
    return dequantize_int8_rows(q, rows, dtype)


def panels(w: Tensor | Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of w [N, K], packed or of another dtype, dense and some values at a time.

    They are PANEL on a CPU, and PANEL_GPU elsewhere. The panels may share one memory: each holds
    until the next is asked for.
    """
    N, K = w.shape
    together = math.lcm(w.block_size, K) // K if isinstance(w, NF4Tensor) and K else 1
    most = PANEL if pretend.kind_of(w.device) == "cpu" else PANEL_GPU
    step = max(1, most // max(1, K * together)) * together  # so that panels begin with a block
    if step >= N and not isinstance(w, Tensor):
        yield slice(0, N), _dense(w, dtype)
        return
    if isinstance(w, NF4Tensor):
        yield from dequantize_nf4_panels(w, step, dtype)
        return
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        if isinstance(w, Tensor):
            yield rows, w[rows].to(dtype)
        else:
            picked = torch.arange(rows.start, rows.stop, device=w.device)
            yield rows, dequantize_int8_rows(w, picked, dtype)


def weight_panels(w: Tensor | Packed, dtype: torch.dtype) -> Panels:
    """Return the `panels` of w on a CPU; elsewhere, and where it is dense already, w whole."""
    if pretend.kind_of(w.device) == "cpu" and not (isinstance(w, Tensor) and w.dtype == dtype):
        return panels(w, dtype)
    dense = w.to(dtype) if isinstance(w, Tensor) else _dense(w, dtype)
    return [(slice(0, w.shape[0]), dense)]


def product(x: Tensor, weight: Panels, bias: Tensor | None = None) -> Tensor:
    """Return x [M, K] times the transpose of a weight [N, K] in panels, plus bias: [M, N]."""
    parts = [dispatch.linear(x, W, None if bias is None else bias[rows]) for rows, W in weight]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def product_back(grad: Tensor, weight: Panels, total: Tensor | None = None) -> Tensor:
    """Return grad [M, N] times a weight [N, K] in panels: [M, K].

    It is added to `total` [M, K], in place, if there is one.
    """
    for rows, W in weight:
        if total is None:
            total = dispatch.linear(grad[:, rows], W.t())
        elif dispatch.asks_onednn(grad, W):
            total += dispatch.linear(grad[:, rows], W.t())
        else:
            total.addmm_(grad[:, rows], W)
    assert total is not None  # a weight has at least one panel
    return total
