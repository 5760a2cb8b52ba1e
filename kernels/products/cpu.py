"""The kernel of cpu.cpp, in host memory."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import FLOAT, INT64, POINTER, address
from ..nf4 import NF4Tensor
from ..nf4.tensor import dynamic_map, levels
from . import terms as given

LANES = 64  # columns of a panel at most


class Matrix(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        ("data", POINTER),
        ("kind", INT64),
        ("stride", INT64),
        ("factor", FLOAT),
        *((name, POINTER) for name in ("levels", "absmax", "nested", "map", "offset")),
        ("largest", FLOAT),
        ("block", INT64),
    )


class Term(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *(("a", POINTER), ("a_stride", INT64), ("depth", INT64)),
        *(("b", Matrix), ("b_depth", INT64), ("turned", INT64)),
    )


class Sum(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        ("terms", POINTER),
        *((name, INT64) for name in ("count", "M", "N")),
        *(("out", POINTER), ("out_stride", INT64), ("wide", INT64)),
        *(("scale", FLOAT), ("bias", POINTER)),
    )


class Sums(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *(("sums", POINTER), ("space", POINTER)),
        *((name, INT64) for name in ("count", "threads", "size")),
    )


def _matrix(b: Tensor | NF4Tensor, factor: float) -> Matrix:
    if isinstance(b, Tensor):
        return Matrix(b.data_ptr(), int(b.dtype == torch.float32), b.stride(0), factor)
    table = levels(b.quant_type, b.device).data_ptr()
    scales = b.absmax.data_ptr(), None, None, None
    if b.nested_absmax is not None:
        nested = b.nested_absmax, dynamic_map(b.device), b.offset
        scales = b.absmax.data_ptr(), *(t.data_ptr() for t in nested)
    largest = min(torch.finfo(b.dtype).max, torch.finfo(torch.float32).max)
    return Matrix(b.codes.data_ptr(), 2, b.shape[1], 1.0, table, *scales, largest, b.block_size)


def _terms(terms: Sequence[given.Term]) -> ctypes.Array:
    return (Term * len(terms))(
        *(
            (a.data_ptr(), a.stride(0), a.shape[1], _matrix(b, factor), b.shape[turned], turned)
            for a, b, turned, factor in terms
        )
    )


def sums_of_products(sums: Sequence[given.Sum]) -> None:
    held = [_terms(terms) for terms, *_ in sums]  # until the kernel is done
    passed = (Sum * len(sums))(
        *(
            (ctypes.addressof(mine), len(mine), *out.shape, out.data_ptr(), out.stride(0),
             out.dtype == torch.float32, scale, address(bias))
            for mine, (_, out, scale, bias) in zip(held, sums, strict=True)
        )
    )  # fmt: skip
    size = LANES // 2 * max(sum(a.shape[1] for a, *_ in terms) for terms, *_ in sums)
    threads = torch.get_num_threads()
    space = torch.empty(threads * size, dtype=torch.int32, device=sums[0].out.device)
    arguments = Sums(ctypes.addressof(passed), space.data_ptr(), len(sums), threads, size)
    dispatch.function("sums_of_products", POINTER)(ctypes.addressof(arguments))
