"""Sums of products of matrices: all that a linear layer with a low-rank update consists of.

A factor may be stored in 4 bits.

    out [M, N] = scale * sum over the terms of  a [M, depth] (factor b) [depth, N]   + bias [N]

A layer's y = x W^T + low (s B)^T is one such sum of two terms. The gradient of what three layers
read, dx = dy_q W_q + dy_k W_k + dy_v W_v + dlow A, is one of four. Everything is added up in fp32
and rounded once, the update costs its share of the depth instead of a walk over y, and no dense
weight exists, in memory or in a workspace. These products also need none of the code that oneDNN
makes, and keeps, for every new number of rows.

A term may have some rows of the sum alone, as the update of one adapter of several has. Each row
sums its own terms in their order, whatever other rows have: to the bit what it sums alone.

One compiled kernel does it (cpu.cpp), on processors with AVX2. bf16 is multiplied in pairs where
AVX512-BF16 does that at twice the rate of fp32, and as fp32 elsewhere: the products of two bf16 are
exact in either. Callers use torch's products on panels of dense weight (`frozen_linear`) on other
processors, for what `takes` refuses, in bf16 where oneDNN has the tiles of AMX to multiply with,
and in fp32 on AMD's with AVX-512, where oneDNN is asked. `reference.py` says the sums in torch.

A thread lays some columns of all factors out, for the rows to go past. What would not stay in the
second cache is laid out in parts of the depth, and the sums of some tiles wait for the next part.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ... import dispatch, pretend
from ..nf4 import NF4Tensor
from . import cpu
from .terms import Sum, Term

__all__ = ["Sum", "Term", "available", "dense_rows", "sums_of_products", "takes"]

BLOCK = 64  # values of an NF4 row that the kernel unpacks at a time
ISAS = "avx2", "avx512", "avx512bf16"  # where it is faster than torch's products


def available(x: Tensor) -> bool:
    """Return whether the kernel is there, and pays, for products with x [M, K]."""
    if pretend.kind_of(x.device) != "cpu" or x.dtype not in dispatch.CPU_DTYPES:
        return False
    if dispatch.pick(x.device, "cpu") != "cpu" or dispatch.isa() not in ISAS:
        return False
    if x.dtype == torch.float32:
        return not dispatch.mkl_is_slow()
    return not dispatch.multiplies_tiles()


def takes(w: object) -> TypeGuard[Tensor | NF4Tensor]:
    """Return whether the kernel takes the weight w [N, K] as it is stored, in both directions."""
    if isinstance(w, Tensor):
        N, K = w.shape
        return w.dtype in dispatch.CPU_DTYPES and w.stride(1) == 1 and N % 2 == 0 and K % 2 == 0
    if not isinstance(w, NF4Tensor):
        return False
    N, K = w.shape
    return N % 2 == 0 and K % BLOCK == 0 and w.block_size % BLOCK == 0


def dense_rows(x: Tensor) -> Tensor:
    """Return x [M, K] with the values of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def sums_of_products(*stages: Sequence[Sum]) -> None:
    """Write every sum to its `out` and its `turned`.

    A sum may read what those of an earlier stage write. A stage may be empty. One call of many sums
    is faster than many calls: a kernel leaves little of Python's in the caches.
    """
    some = [sums for sums in stages if sums]
    if some:
        cpu.sums_of_products(some)
