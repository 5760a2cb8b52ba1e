"""The searches for the scale of a block, in plain torch and in llama.cpp's order of operations.

A tensor of a search is [n, N]: the n values of a sub-block, for N sub-blocks side by side. Sums run
over the n rows one after the other. A division is one of tensors: torch makes of `1.0 / t` and, on
a GPU, of `t / 3.0` a product with a reciprocal, which rounds twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 2.0**22  # beyond all codes
NOTHING = 1e-15  # a block whose values are all smaller holds zeros

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of iq4_nl


class Search(NamedTuple):
    """The inverse scales that an affine fit tries: (top + first + step k) / range, k = 0..last."""

    top: int
    first: float
    step: float
    last: int


SEARCHES = {"q4_k": Search(15, -1.0, 0.1, 20), "q5_k": Search(31, -0.5, 0.1, 15)}


def weighted_search(block_type: str) -> Search:
    """Return the search of an affine type where the importance of columns is known."""
    return Search(15 if "q4" in block_type else 31, -0.9, 0.05, 36)


# ---- arithmetic ---------------------------------------------------------------------------------


def constant(value: float, like: Tensor) -> Tensor:
    """Return a number as fp32 [] beside a tensor."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def ordered_sum(terms: Tensor) -> Tensor:
    """Return the sum of the rows of terms [n, N], first to last: [N]."""
    total = torch.zeros_like(terms[0])
    for row in terms:
        total += row
    return total


def nearest(v: Tensor) -> Tensor:
    """Return the nearest integers, ties to even, int32, none beyond 2^22; 0 for NaN."""
    return v.nan_to_num(0.0, LIMIT, -LIMIT).round().clamp_(-LIMIT, LIMIT).to(torch.int32)


def truncated(v: Tensor) -> Tensor:
    """Return v towards zero as int8, the lowest bits of an int32; 0 where that cannot hold it."""
    return torch.where(v.abs() < 2.0**31, v, 0).to(torch.int32).to(torch.int8)


def codes_between(v: Tensor, low: int, high: int) -> Tensor:
    """Return the nearest integers as fp32, none below low or above high."""
    return nearest(v).clamp_(low, high).float()


def inverse(v: Tensor) -> Tensor:
    """Return 1 / v, and 0 for 0."""
    return torch.where(v != 0, constant(1, v) / v, 0)


def root(v: Tensor) -> Tensor:
    """Return the square root, correctly rounded, which MKL's in fp32 is not."""
    return v.double().sqrt().float()


def first_extreme(x: Tensor, beyond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the extreme of every column of x [n, N]; of equals, such as 0 and -0, the first."""
    best = x[0]
    for row in x[1:]:
        best = torch.where(beyond(row, best), row, best)
    return best


def signed_extreme(x: Tensor) -> Tensor:
    """Return the first value of the largest magnitude of every column of x [n, N]; 0 is +0."""
    best, most = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for row in x:
        more = row.abs() > most
        best, most = torch.where(more, row, best), torch.where(more, row.abs(), most)
    return best


def columns_of(x: Tensor, n: int) -> Tensor:
    """Return the values in runs of n as columns: [n, N]."""
    return x.reshape(-1, n).T.contiguous()


# ---- searches -----------------------------------------------------------------------------------


def fit_affine(x: Tensor, w: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """Fit x to scale q - low with weights w, all fp32 [n, N].

    A step that is accepted moves the minimum, from which later steps start. Returns scale [N], low
    [N], at least 0, and the codes q [n, N] as fp32.
    """
    top = search.top
    lowest, highest = first_extreme(x, torch.lt), first_extreme(x, torch.gt)
    lowest = torch.where(lowest > 0, 0, lowest)
    flat = highest == lowest
    sum_w, sum_x = ordered_sum(w), ordered_sum(w * x)
    over = constant(top, x) / (highest - lowest)
    scale = constant(1, x) / over
    codes = torch.where(over < torch.inf, codes_between(over * (x - lowest), 0, top), 0)
    least = _error(x, w, scale, lowest, codes)
    for k in range(search.last + 1):
        tried = constant(search.first, x) + constant(search.step, x) * k + top
        q = codes_between(tried / (highest - lowest) * (x - lowest), 0, top)
        wq = w * q
        sum_q, sum_qq, sum_xq = ordered_sum(wq), ordered_sum(wq * q), ordered_sum(wq * x)
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_lowest = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        above = new_lowest > 0
        new_scale = torch.where(above, sum_xq / sum_qq, new_scale)
        new_lowest = torch.where(above, 0, new_lowest)
        error = _error(x, w, new_scale, new_lowest, q)
        better = (determinant > 0) & (error < least)
        least, codes = torch.where(better, error, least), torch.where(better, q, codes)
        scale = torch.where(better, new_scale, scale)
        lowest = torch.where(better, new_lowest, lowest)
    return torch.where(flat, 0, scale), -lowest, torch.where(flat, 0, codes)


def _error(x: Tensor, w: Tensor, scale: Tensor, lowest: Tensor, q: Tensor) -> Tensor:
    off = scale * q + lowest - x
    return ordered_sum(w * (off * off))


def fit_symmetric(x: Tensor, w: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Fit x to scale (q - half) with weights w, all fp32 [n, N], for q below 2 half.

    Returns scale [N] and the codes q [n, N] as fp32.
    """
    extreme = signed_extreme(x)
    wx = w * x

    def tried(step: int) -> tuple[Tensor, Tensor, Tensor]:
        over = -(constant(half, x) + constant(0.1, x) * step) / extreme
        q = codes_between(over * x, -half, half - 1)
        return q, ordered_sum(wx * q), ordered_sum(w * q * q)

    codes, sum_xq, sum_qq = tried(0)
    scale = torch.where(sum_qq != 0, sum_xq / sum_qq, 0)
    most = scale * sum_xq
    for step in (*range(-9, 0), *range(1, 10)):
        q, sum_xq, sum_qq = tried(step)
        better = (sum_qq > 0) & (sum_xq * sum_xq > most * sum_qq)
        codes = torch.where(better, q, codes)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        most = torch.where(better, scale * sum_xq, most)
    nothing = extreme.abs() < NOTHING
    return torch.where(nothing, 0, scale), torch.where(nothing, 0, codes + half)


def fit_positive(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Fit x, at least 0, to scale q with weights w, all fp32 [n, N], for q up to `top`.

    Returns scale [N] and the codes q [n, N], uint8.
    """
    highest = torch.zeros_like(x[0])
    for row in x:
        highest = torch.where(row > highest, row, highest)
    over = constant(top, x) / highest
    best, least = over, _error_of_scale(x, w, over, nearest(over * x).float())
    for step in (*range(-4, 0), *range(1, 5)):
        tried = (constant(0.1, x) * step + top) / highest
        error = _error_of_scale(x, w, tried, nearest(tried * x).clamp_(max=top).float())
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    q = nearest(best * x).clamp_(max=top).float()
    sum_xq, sum_qq = ordered_sum(w * x * q), ordered_sum(w * q * q)
    going = torch.ones_like(highest, dtype=torch.bool)  # until a round changes nothing
    for _ in range(5):
        changed = torch.zeros_like(going)
        for i in range(len(x)):
            others_xq, others_qq = sum_xq - w[i] * x[i] * q[i], sum_qq - w[i] * q[i] * q[i]
            new = nearest(x[i] * others_qq / others_xq).clamp_(max=top).float()
            new_xq, new_qq = others_xq + w[i] * x[i] * new, others_qq + w[i] * new * new
            better = going & (others_xq > 0) & (others_qq > 0) & (new != q[i])
            better &= new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq
            q[i] = torch.where(better, new, q[i])
            sum_xq = torch.where(better, new_xq, sum_xq)
            sum_qq = torch.where(better, new_qq, sum_qq)
            changed |= better
        going &= changed
    nothing = highest < NOTHING
    scale = torch.where(~nothing & (sum_qq > 0), sum_xq / sum_qq, 0)  # NaN: 0
    # llama.cpp takes a negative x too, whose code wraps around
    return scale, torch.where(nothing, 0, q).to(torch.int32).to(torch.uint8)


def _error_of_scale(x: Tensor, w: Tensor, over: Tensor, q: Tensor) -> Tensor:
    off = x - constant(1, x) / over * q
    return ordered_sum(w * off * off)


def fit_levels(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Fit x to scale LEVELS[q] with weights w, all fp32 [n, N].

    Returns scale [N] and the codes q [n, N].
    """
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    extreme = signed_extreme(x)

    def sums(over: Tensor) -> tuple[Tensor, Tensor]:
        wl = w * (level := levels[level_codes(over * x)])
        return ordered_sum(wl * x), ordered_sum(wl * level)

    sum_xl, sum_ll = sums(constant(1, x) / (-extreme / levels[0]))
    scale = torch.where(sum_ll > 0, sum_xl / sum_ll, 0)
    most = scale * sum_xl
    for step in range(-7, 8):
        sum_xl, sum_ll = sums((levels[0] + step) / extreme)
        better = (sum_ll > 0) & (sum_xl * sum_xl > most * sum_ll)
        scale = torch.where(better, sum_xl / sum_ll, scale)
        most = torch.where(better, scale * sum_xl, most)
    scale = torch.where(extreme.abs() < NOTHING, 0, scale)
    return scale, level_codes(inverse(scale) * x)


def level_codes(v: Tensor) -> Tensor:
    """Return the codes of iq4_nl's levels that are nearest to v, of two the higher, int64."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=v.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(v, middles, right=True)
    return torch.where(v.isnan(), len(middles), codes)
