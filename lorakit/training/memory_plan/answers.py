"""What common operators of torch make on the meta device, without torch's own way to find out.

Torch runs a description of each operator in Python there. The first one imports torch's compiler,
which takes two seconds and 80 MB, and each takes up to a millisecond. A forecast has thousands.

    new = op(a, b)     the shapes of a and b broadcast; torch's result for one number says the dtype
    a.op_(b)           a itself
    sum, cat, ...      a shape by arithmetic

`answer` returns None for operators that this file does not know, and for those that read tensors
which are not contiguous. Torch is asked about these.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

Answer = Callable[..., Any]
aten = torch.ops.aten
# Options of a new tensor that change nothing of one on the meta device.
_AS_IT_IS = (None, False, torch.strided, torch.device("meta"), torch.preserve_format)
_KNOWN = (Tensor, int, float, str, type(None))  # what an elementwise operator is told


def answer(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return what an operator makes of tensors of the meta device, or None; see the module."""
    found = _answer_of(func)
    if found is None or (options and found not in (_like, _range)):
        return None
    return found(func, args, **options)


@functools.cache
def _answer_of(func: Any) -> Answer | None:
    """Return what knows the results of an operator."""
    if func in _SPECIAL:
        return _SPECIAL[func]
    schema = func._schema
    if torch.Tag.pointwise not in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor":
        return None
    if not schema.is_mutable:
        return _elementwise
    return _itself if schema.name.endswith("_") else None


def _elementwise(func: Any, args: Sequence[Any]) -> Tensor | None:
    if not all(isinstance(each, _KNOWN) for each in args):
        return None
    tensors = [each for each in args if isinstance(each, Tensor)]
    shape = tensors[0].shape
    for each in tensors:
        if each.ndim and not _is_plain(each):
            return None
        if each.shape != shape:
            shape = _broadcast(shape, each.shape)
    if not any(each.is_meta for each in tensors):
        return None
    return _new(shape, _dtype_of(func, *map(_told, args)))


def _itself(func: Any, args: Sequence[Any]) -> Tensor | None:
    return args[0] if args[0].is_meta else None


def _whole_sum(func: Any, args: Sequence[Any]) -> Tensor | None:
    plain = len(args) == 1 and args[0].is_meta
    return _new((), _dtype_of(func, _told(args[0]))) if plain else None


def _norm(func: Any, args: Sequence[Any]) -> Tensor | None:
    return _new((), args[0].dtype) if len(args) <= 2 and args[0].is_meta else None


def _embedding(func: Any, args: Sequence[Any]) -> Tensor | None:
    weight, ids = args[:2]
    return _new([*ids.shape, weight.shape[1]], weight.dtype) if weight.is_meta else None


def _largest(func: Any, args: Sequence[Any]) -> Tensor | None:
    t, dims = args[0], list(args[1]) if len(args) > 1 else []
    if not t.is_meta or len(args) > 2:
        return None
    gone = {dim % t.ndim for dim in dims} if dims else set(range(t.ndim))
    return _new([n for dim, n in enumerate(t.shape) if dim not in gone], t.dtype)


def _like(func: Any, args: Sequence[Any], **options: Any) -> Tensor | None:
    t, dtype = args[0], options.pop("dtype", None)
    if not _is_plain(t) or any(each not in _AS_IT_IS for each in options.values()):
        return None
    return _new(t.shape, dtype or t.dtype)


def _range(func: Any, args: Sequence[Any], **options: Any) -> Tensor | None:
    dtype = options.pop("dtype", None) or torch.int64
    start, end = args if len(args) == 2 else (0, *args)
    plain = options.pop("device", None) == torch.device("meta") and type(start) is type(end) is int
    if not plain or any(each not in _AS_IT_IS for each in options.values()):
        return None
    return _new([max(0, end - start)], dtype)


def _sorted(func: Any, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    t = args[0]
    return (_new(t.shape, t.dtype), _new(t.shape, torch.int64)) if _is_plain(t) else None


def _cat(func: Any, args: Sequence[Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    if not _are_alike(tensors) or not 0 < first.ndim < 4:  # of 4 there are other orders in memory
        return None
    shape, dim = list(first.shape), dim % first.ndim
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _new(shape, first.dtype)


def _stack(func: Any, args: Sequence[Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    shape = list(tensors[0].shape)
    if not _are_alike(tensors) or any(list(t.shape) != shape for t in tensors):
        return None
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return _new(shape, tensors[0].dtype)


_SPECIAL: dict[Any, Answer] = {
    aten.addmm_.default: _itself,
    aten.baddbmm_.default: _itself,
    aten.sum.default: _whole_sum,
    aten.mean.default: _whole_sum,
    aten.all.default: _whole_sum,
    aten.any.default: _whole_sum,
    aten.amax.default: _largest,
    aten.linalg_vector_norm.default: _norm,
    aten.embedding.default: _embedding,
    aten.empty_like.default: _like,
    aten.zeros_like.default: _like,
    aten.arange.default: _range,
    aten.arange.start: _range,
    aten.sort.default: _sorted,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}


def _is_plain(t: Tensor) -> bool:
    return t.is_meta and t.is_contiguous()


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are on the meta device, of one dtype and number of dimensions."""
    first = tensors[0]
    return all(t.is_meta and t.dtype == first.dtype and t.ndim == first.ndim for t in tensors)


def _broadcast(first: Sequence[int], second: Sequence[int]) -> torch.Size:
    """Return the shape of a sum; torch's own function imports sympy."""
    pairs = zip_longest(reversed(first), reversed(second), fillvalue=1)
    return torch.Size([n if m == 1 else m for m, n in pairs][::-1])


def _new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _told(value: Any) -> tuple[Any, ...]:
    """Return what of an argument the dtype of a result depends on."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim > 0
    return (type(value),) if isinstance(value, int | float) else (None, value)


@functools.cache
def _dtype_of(func: Any, *told: tuple[Any, ...]) -> torch.dtype:
    """Return the dtype of an operator's result, which it makes of ones in host memory."""
    found: Tensor = func(*map(_one, told))
    return found.dtype


def _one(told: tuple[Any, ...]) -> Any:
    """Return an argument of the kind that `_told` has described."""
    if isinstance(told[0], torch.dtype):
        return torch.ones((1,) * told[1], dtype=told[0], device="cpu")
    return told[0](1) if len(told) == 1 else told[1]
