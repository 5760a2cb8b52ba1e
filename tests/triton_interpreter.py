"""Triton's interpreter, made right for bf16, for the very kernels that are compiled elsewhere.

Three things are wrong with the stock interpreter (3.9.0; its issues 11584 and 11604). It keeps bf16
as the bits, uint16, and calculates with those: sums, products and reductions of bf16 come out as
integers', and fp32 is cut to bf16 instead of rounded. To float8 it makes NaN 384, and cuts what is
subnormal there. And TRITON_INTERPRET=1 turns every kernel of
the process, Triton's own included, into an interpreted one that no longer compiles.

`interpreted()` runs ordinary @triton.jit functions in the interpreter for the length of a `with`
block. Inside it bf16 operands are widened to fp32 before every operation and results rounded to
nearest even after it, as a GPU does. A product of tiles adds up each row by itself, as there.
Integers wrap around, as there: the stock interpreter computes every sum and product of integers
once more in 64 bits, to say that it overflows, which was a third of its time. Shapes are
remembered, as making them was another.
"""

import dataclasses
import importlib
import math
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter, jit

from lorakit import kernels
from lorakit.kernels import dispatch

for folder in kernels.__path__:  # with TRITON_INTERPRET=1 they would be made interpreted for good
    for file in Path(folder).glob("ops/*/triton.py"):
        importlib.import_module(f"lorakit.kernels.ops.{file.parent.name}.triton")

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_functions: dict = {}


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 as uint16 bits -> fp32"""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 as uint16 bits, to nearest even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """fp32 -> e4m3 as uint8 bits, to nearest even; what is too large becomes the largest."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _is_bf16(value) -> bool:
    """Return whether it is a handle of bf16; the size of its data rules out most that are not."""
    if not isinstance(value, Handle) or value.data.dtype != np.uint16:
        return False
    return value.dtype.scalar == tl.bfloat16


def _wide(value):
    return Handle(widen(value.data), tl.float32) if _is_bf16(value) else value


def _in_fp32(operation):
    """`operation` on widened operands, its floating-point result rounded back."""

    def run(self, *operands, **options):
        if not any(map(_is_bf16, operands)):
            return operation(self, *operands, **options)
        result = operation(self, *map(_wide, operands), **options)
        if result.data.dtype == np.bool_:
            return result
        return Handle(narrow(result.data), tl.bfloat16)

    return run


def _ternary(self, a, b, c, op):
    if op is np.where:  # a choice moves bits
        return _original["ternary_op"](self, a, b, c, op)
    return _in_fp32(_original["ternary_op"])(self, a, b, c, op)


def _cast(self, source, target):
    before, after = source.dtype.scalar, target.scalar
    if before == after:
        return _original["cast_impl"](self, source, target)
    if before == tl.bfloat16:
        wide = Handle(widen(source.data), tl.float32)
        return wide if after == tl.float32 else _original["cast_impl"](self, wide, target)
    if after == tl.float8e4nv and before == tl.float32:
        return Handle(to_e4m3(source.data), after)
    if after == tl.bfloat16:
        return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    return _original["cast_impl"](self, source, target)


def _fp_to_fp(self, source, target, rounding):
    nearest = rounding == interpreter._ir.ROUNDING_MODE.RTNE
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16 and nearest:
        return Handle(narrow(source.data), tl.bfloat16)
    if source.dtype.scalar == tl.float32 and target.scalar == tl.float8e4nv and nearest:
        return Handle(to_e4m3(source.data), tl.float8e4nv)
    return _original["create_fp_to_fp"](self, source, target, rounding)


def _dot(self, a, b, d, *rest):
    """Multiply row after row, [M, 1, K] by [1, K, N].

    A product of BLAS takes some rows at a time, and adds up in another order in those that are left
    over. On a GPU the bits of a row do not depend on where in the tile it stands.
    """
    a, b = _wide(a), _wide(b)
    left, right = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
    rows = Handle(left[..., :, None, :], a.dtype)
    whole = Handle(right[..., None, :, :], b.dtype)
    added = Handle(d.data[..., :, None, :], d.dtype)
    found = _original["create_dot"](self, rows, whole, added, *rest)
    return Handle(found.data[..., 0, :], found.dtype)


def _reduced_in_fp32(apply):
    """tl.sum, tl.max, tl.cumsum and the like: on widened tensors, the result rounded back."""

    def retyped(tensor, data, dtype):
        shape = list(tensor.shape)
        kind = tl.block_type(dtype, shape) if shape else dtype
        return tl.tensor(Handle(data, dtype), kind)

    def run(self, given):
        inputs = given if isinstance(given, tuple) else (given,)
        if not any(t.dtype.scalar == tl.bfloat16 for t in inputs):
            return apply(self, given)
        wide = [
            retyped(t, widen(t.handle.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in inputs
        ]
        results = apply(self, tuple(wide))
        results = tuple(
            retyped(t, narrow(t.handle.data), tl.bfloat16) if t.dtype.scalar == tl.float32 else t
            for t in results
        )
        return results if isinstance(given, tuple) else results[0]

    return run


_OPTIONS = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
_NAMES = ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "ternary_op", "create_dot")
_NAMES += ("create_fma", "create_clampf", "create_rsqrt")
_original = {name: getattr(Builder, name) for name in _NAMES}
_PATCHES = {name: _in_fp32(_original[name]) for name in _NAMES} | {
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "ternary_op": _ternary,
    "create_dot": _dot,
}


_shapes: dict = {}  # of ints -> the shape of a type
_constants: dict = {}  # shape of a type -> what a tensor keeps of it: sizes and number of values
_np_dtypes: dict = {}  # by the names of Triton's
_block_type, _dtypes_equal = tl.block_type.__init__, tl.dtype.__eq__
_find_np_dtype = interpreter._get_np_dtype


def _make_tensor(self, handle, type):
    shape = type.shape if type.is_block() else ()
    if shape not in _constants:
        sizes = tl.tuple([tl.constexpr(n) for n in shape])
        _constants[shape] = sizes, tl.constexpr(math.prod(shape))
    self.shape, self.numel = _constants[shape]
    self.handle, self.type, self.dtype = handle, type, type.scalar


def _make_block_type(self, element_ty, shape):
    """Take the shape of an earlier type as it is; it was checked there."""
    key = tuple(shape)
    if key not in _shapes:
        _block_type(self, element_ty, shape)
        _shapes[key] = self.shape, self.numel
    self.element_ty, (self.shape, self.numel) = element_ty, _shapes[key]
    self.name = f"<{key}, {element_ty}>"


def _np_dtype(dtype):
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _find_np_dtype(dtype)
    return _np_dtypes[name]


def _same_dtype(self, other):
    return self is other or _dtypes_equal(self, other)


def _interpretable(function: jit.JITFunction) -> interpreter.InterpretedFunction:
    if function.fn not in _functions:  # hashing the JITFunction itself would parse its source
        _functions[function.fn] = interpreter.InterpretedFunction(function.fn)
    return _functions[function.fn]


def _launch(self, *arguments, grid, warmup, **options):
    return _interpretable(self).run(*arguments, grid=grid, warmup=warmup, **options)


def _call(self, *arguments, **options):
    """A function called by a kernel; `tl` is patched already, by `interpreted`."""
    return _interpretable(self).rewrite()(*arguments, **options)


@contextmanager
def interpreted() -> Iterator[None]:
    """Launches of @triton.jit kernels inside the block run in the interpreter, on CPU tensors."""
    with (
        mock.patch.multiple(Builder, **_PATCHES),
        mock.patch.object(
            interpreter.ReduceOps, "apply", _reduced_in_fp32(interpreter.ReduceOps.apply)
        ),
        mock.patch.object(
            interpreter.ScanOps, "apply", _reduced_in_fp32(interpreter.ScanOps.apply)
        ),
        mock.patch.object(interpreter.interpreter_builder, "options", _OPTIONS),
        mock.patch.object(interpreter, "_get_np_dtype", _np_dtype),
        mock.patch.object(tl.tensor, "__init__", _make_tensor),
        mock.patch.object(tl.block_type, "__init__", _make_block_type),
        mock.patch.object(tl.dtype, "__eq__", _same_dtype),
        mock.patch.object(jit.JITFunction, "run", _launch),
        mock.patch.object(jit.JITFunction, "__call__", _call),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(dispatch, "_interprets", return_value=True),
        mock.patch.object(dispatch, "compiles_to", return_value="interpreted"),
    ):
        # once for all launches: the interpreter would do it again at every call of a function
        modules = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(modules)
        try:
            yield
        finally:
            scope.restore()


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def on_triton() -> Iterator[None]:
    """Ops run their Triton kernels: in the interpreter, or on the GPU if there is one."""
    run = interpreted() if DEVICE.type == "cpu" else nullcontext()
    with run, kernels.use_backend("triton"):
        yield
