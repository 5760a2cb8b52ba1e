"""Shapes by arithmetic beside those that torch's own operators make on the meta device."""

import itertools

import pytest
import torch

from lorakit.training.memory_plan.answers import answer

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    ((3, 5), (3, 5)),
    ((2, 3, 5), (5,)),
    ((3, 1), (1, 5)),
    ((4,), ()),
    ((), (4,)),
    ((0, 5), (5,)),
]


def made(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def check(func, *args, **options):
    """Both results have the same tensors, to the stride."""
    found, theirs = answer(func, args, options), func(*args, **options)
    assert found is not None, func
    if isinstance(theirs, torch.Tensor):
        found, theirs = (found,), (theirs,)
    for mine, other in zip(found, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.stride() == other.stride()
        assert mine.is_meta


@pytest.mark.parametrize("shapes", SHAPES)
def test_two_tensors(shapes):
    """The dtype of a product follows from both, and counts for less where one has no dimension."""
    dtypes = (*FLOATS, torch.int64, torch.uint8, torch.bool)
    for first, second in itertools.product(dtypes, repeat=2):
        pair = made(shapes[0], first), made(shapes[1], second)
        for func in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.eq.Tensor):
            check(func, *pair)
    check(aten.where.self, made(shapes[0], torch.bool), *pair)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_tensor(dtype):
    t = made((3, 4, 5), dtype)
    for func in (aten.abs, aten.reciprocal, aten.silu, aten.sigmoid, aten.tanh, aten.rsqrt):
        check(func.default, t)
    for func in (aten.sum, aten.mean, aten.all, aten.amax, aten.linalg_vector_norm, aten.sort):
        check(func.default, t)
    for dims in ([-1], [0, 2], []):
        check(aten.amax.default, t, dims)
    for number in (2, 0.5, True):
        for func in (aten.mul.Scalar, aten.ge.Scalar, aten.ne.Scalar, aten.clamp.default):
            check(func, t, number)
    check(aten.empty_like.default, t)
    check(aten.zeros_like.default, t, dtype=torch.int64, pin_memory=False)
    check(aten.embedding.default, made((7, 4), dtype), made((2, 3), torch.int64))
    for dim in (0, 1, -1):
        check(aten.cat.default, [t, t, t], dim)
        check(aten.stack.default, [t, t], dim)
    check(aten.cat.default, [made((2, 3), dtype).t(), made((1, 2), dtype)])
    check(aten.arange.start, 2, 9, device=torch.device("meta"))


def test_in_place():
    t, other = made((3, 4), torch.float32), made((3, 4), torch.bfloat16)
    for func in (aten.add_.Tensor, aten.mul_.Tensor):
        assert answer(func, (t, other), {}) is t
    assert answer(aten.addmm_.default, (t, made((3, 2), t.dtype), made((2, 4), t.dtype)), {}) is t


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mul.Tensor, (made((3, 4), torch.float32).t(), 2.0)),  # keeps its order in memory
        (aten.add.Tensor, (torch.ones(3), torch.ones(3))),  # has values
        (aten.mm.default, (made((3, 4), torch.float32), made((4, 2), torch.float32))),
        (aten.squeeze_.dim, (made((1, 4), torch.float32), 0)),  # in place, with another shape
        (aten.bernoulli.default, (made((3,), torch.float32),)),
    ],
)
def test_torch_is_asked(func, args):
    assert answer(func, args, {}) is None
