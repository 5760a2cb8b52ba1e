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
        *(("first", INT64), ("end", INT64)),
        *(("b", Matrix), ("b_depth", INT64), ("turned", INT64)),
    )


class Sum(ctypes.Structure):
    """`Sum` of cpu.cpp."""

    _fields_ = (
        ("terms", POINTER),
        *((name, INT64) for name in ("count", "M", "N")),
        *((name, POINTER) for name in ("out", "turned")),
        *((name, INT64) for name in ("out_stride", "turned_stride", "wide")),
        *(("scale", FLOAT), ("bias", POINTER)),
    )


class Sums(ctypes.Structure):
    """`Sums` of cpu.cpp: a stage, the arguments of the kernel."""

    _fields_ = (
        *((name, POINTER) for name in ("sums", "space", "shares")),
        *((name, INT64) for name in ("count", "threads", "size", "pairs", "singles")),
    )


def _term(term: given.Term, held: list[object]) -> Any:
    """Return the fields of a Term, of which ctypes makes one. What they point at goes to `held`."""
    a, b, turned, factor, start = term
    if isinstance(b, Tensor):
        matrix = Matrix(address(b), b.stride(0), b.dtype == torch.float32, factor)
    else:
        packed = packed_arguments(b)
        held.append(packed)
        matrix = Matrix(None, b.shape[1], PACKED, 1.0, ctypes.addressof(packed))
    rows, depth = a.shape
    return (address(a), a.stride(0), depth, start, start + rows, matrix, b.shape[turned], turned)


def _places(out: Tensor | None, turned: Tensor | None) -> tuple[Any, Any]:
    """Return M and N, and where a Sum goes: pointers, strides, and whether in fp32."""
    if turned is None:
        assert out is not None  # or there is no sum
        return out.shape, (address(out), None, out.stride(0), 0, out.dtype == torch.float32)
    N, M = turned.shape
    strides = 0 if out is None else out.stride(0), turned.stride(0)
    return (M, N), (address(out), address(turned), *strides, turned.dtype == torch.float32)


def _passed(sums: Sequence[given.Sum], held: list[object]) -> tuple[Any, int]:
    """Return the Sums of a stage as an array, and the largest depth of one."""
    rows: list[Any] = []  # the fields of each Sum
    deepest = 0
    for terms, out, scale, bias, turned in sums:
        array, depth = (Term * len(terms))(*[_term(term, held) for term in terms]), 0
        bias = None if bias is None else bias.contiguous()
        held += array, bias
        for term in terms:
            depth += term.a.shape[1]
        deepest = max(deepest, depth)
        shape, places = _places(out, turned)
        rows.append((ctypes.addressof(array), len(terms), *shape, *places, scale, address(bias)))
    passed = (Sum * len(rows))(*rows)
    held.append(passed)
    return passed, deepest


def sums_of_products(stages: Sequence[Sequence[given.Sum]]) -> None:
    """Call the C++ kernel for all stages at once; see cpu.cpp. None of them is empty."""
    held: list[object] = []  # what must live until the call
    made = [_passed(sums, held) for sums in stages]
    depth = max([deepest for _, deepest in made])
    a = stages[0][0].terms[0].a
    singles = a.dtype == torch.float32
    pairs = not singles and dispatch.multiplies_pairs()
    size = depth // 2 * LANES if pairs else max((depth + HIGH) * LANES + HIGH * DEPTH, PANEL)
    count = threads.count()
    space = torch.empty(count * size, dtype=torch.int32, device=a.device)
    taken = torch.zeros((sum(map(len, stages)), count * SHARE), dtype=torch.int64, device=a.device)
    shares = taken.data_ptr()
    fields: list[Any] = []  # of each Sums
    for passed, _ in made:
        pointers = ctypes.addressof(passed), space.data_ptr(), shares
        fields.append((*pointers, len(passed), count, size, pairs, singles))
        shares += len(passed) * count * SHARE * taken.itemsize
    arguments = (Sums * len(fields))(*fields)
    run = dispatch.function("sums_of_products", POINTER, INT64)
    run(ctypes.addressof(arguments), len(arguments))
