"""Calls of the C++ kernel in cpu.cpp, in host memory."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, threads
from ...dispatch import FLOAT, INT64, POINTER, address
from ..nf4.cpu import packed_arguments
from . import terms as given

LANES = 64  # columns of a panel at most, or the fewest of one in fp32
HIGH, DEPTH = 12, 384  # rows of a tile at most, and values of each that are made fp32 at a time
PANEL = 1 << 17  # words that panels of more columns may fill: a fourth of a cache of 2 MB
PACKED = 2  # the kind of a matrix
SHARE = 8  # `Share` of cpu.cpp, in words of 64 bits: a line of the cache


class Matrix(ctypes.Structure):
    """`Matrix` of cpu.cpp: the second factor of a term."""

    _fields_ = (
        *(("data", POINTER), ("stride", INT64), ("kind", INT64)),
        *(("factor", FLOAT), ("packed", POINTER)),
    )


class Term(ctypes.Structure):
    """`Term` of cpu.cpp."""

    _fields_ = (
        *(("a", POINTER), ("a_stride", INT64), ("depth", INT64)),
        *(("b", Matrix), ("b_depth", INT64), ("turned", INT64)),
    )


class Sum(ctypes.Structure):
    """`Sum` of cpu.cpp."""

    _fields_ = (
        ("terms", POINTER),
        *((name, INT64) for name in ("count", "M", "N")),
        *(("out", POINTER), ("out_stride", INT64), ("wide", INT64)),
        *(("scale", FLOAT), ("bias", POINTER)),
    )


class Sums(ctypes.Structure):
    """`Sums` of cpu.cpp: the arguments of the kernel."""

    _fields_ = (
        *((name, POINTER) for name in ("sums", "space", "shares")),
        *((name, INT64) for name in ("count", "threads", "size", "pairs", "singles")),
    )


def _term(term: given.Term, held: list[object]) -> Any:
    """Return the fields of a Term, of which ctypes makes one. What they point at goes to `held`."""
    a, b, turned, factor = term
    if isinstance(b, Tensor):
        matrix = Matrix(b.data_ptr(), b.stride(0), b.dtype == torch.float32, factor)
    else:
        packed = packed_arguments(b)
        held.append(packed)
        matrix = Matrix(None, b.shape[1], PACKED, 1.0, ctypes.addressof(packed))
    return a.data_ptr(), a.stride(0), a.shape[1], matrix, b.shape[turned], turned


def sums_of_products(sums: Sequence[given.Sum]) -> None:
    """Call the C++ kernel for all sums at once; see cpu.cpp."""
    held: list[object] = []  # what must live until the call
    rows: list[Any] = []  # the fields of each Sum
    depth = 0
    for terms, out, scale, bias in sums:
        array = (Term * len(terms))(*(_term(term, held) for term in terms))
        bias = None if bias is None else bias.contiguous()
        held += array, bias
        place = out.data_ptr(), out.stride(0), out.dtype == torch.float32
        rows.append((ctypes.addressof(array), len(array), *out.shape, *place, scale, address(bias)))
        depth = max(depth, sum(a.shape[1] for a, *_ in terms))
    passed = (Sum * len(rows))(*rows)
    singles = sums[0].terms[0].a.dtype == torch.float32
    pairs = not singles and dispatch.multiplies_pairs()
    size = depth // 2 * LANES if pairs else max((depth + HIGH) * LANES + HIGH * DEPTH, PANEL)
    count, on = threads.count(), sums[0].out.device
    space = torch.empty(count * size, dtype=torch.int32, device=on)
    shares = torch.zeros(len(sums) * count * SHARE, dtype=torch.int64, device=on)
    pointers = ctypes.addressof(passed), space.data_ptr(), shares.data_ptr()
    arguments = Sums(*pointers, len(sums), count, size, pairs, singles)
    dispatch.function("sums_of_products", POINTER)(ctypes.addressof(arguments))
