"""llama.cpp itself: the C functions that the extension module of the xllamacpp wheel exports."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# numbers of ggml_type
TYPES = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8,
    "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "mxfp4": 39,
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The wheel's module as a C library; a test that asks for it is skipped where it is missing."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        pytest.skip("xllamacpp is not installed")
    folder = Path(found.submodule_search_locations[0])
    handle = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    handle.ggml_row_size.restype = handle.ggml_quantize_chunk.restype = ctypes.c_size_t
    handle.ggml_row_size.argtypes = [ctypes.c_int, size]
    handle.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[pointer] * 2, *[size] * 3, pointer]
    return handle


def quantize(x: Tensor, block_type: str, importance: Tensor | None = None) -> Tensor:
    """What ggml_quantize_chunk makes of x fp32 [rows, columns]: uint8 [rows, bytes]."""
    x, number, (rows, columns) = x.contiguous(), TYPES[block_type], x.shape
    nbytes = library().ggml_row_size(number, columns)
    out = torch.from_numpy(np.zeros((rows, nbytes), np.uint8))
    given = None if importance is None else importance.data_ptr()
    arguments = number, x.data_ptr(), out.data_ptr(), 0, rows, columns, given
    assert library().ggml_quantize_chunk(*arguments) == out.numel()
    return out
