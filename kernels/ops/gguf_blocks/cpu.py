"""Calls of the C++ kernels in cpu.cpp, for tensors in host memory."""

import ctypes

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import CPU_DTYPES, INT64, POINTER, address
from .layouts import BLOCK_LAYOUTS

TYPES = [name for name in BLOCK_LAYOUTS if name != "mxfp4"]  # in the order of cpu.cpp


class Quantize(ctypes.Structure):
    """`Quantize` of cpu.cpp: the arguments of `gguf_quantize`."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "importance", "out")),
        *((name, INT64) for name in ("rows", "columns", "type")),
    )


def quantize(w: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
    """Call the C++ kernel `gguf_quantize`; see reference.quantize."""
    w = w.contiguous() if w.dtype in CPU_DTYPES else w.float().contiguous()
    importance = None if importance is None else importance.contiguous()
    (rows, columns), (values, nbytes) = w.shape, BLOCK_LAYOUTS[block_type]
    out = torch.empty((rows, columns // values * nbytes), dtype=torch.uint8, device=w.device)
    sizes = rows, columns, TYPES.index(block_type)
    arguments = Quantize(*map(address, (w, importance, out)), *sizes)
    dispatch.run("gguf_quantize", w.dtype, arguments)
    return out
