"""The C++ attention against the formula in fp64, for every instruction set of this processor.

Error budget: |kernel - fp64| <= 2 |reference - fp64| + a few roundings of the largest value. Both
sum in fp32, in another order, and of bf16 both may round p and ds to bf16 for the products that
they enter; the reference is torch's own attention, or with a soft cap the scores spelled out.

q, k, v and the gradient are views of one tensor with NaN between and around the heads, and what the
kernels allocate lies between guard zones and is NaN before it is written: a read beyond a row shows
in the result, a write beyond a tensor and a value left out fail.
"""

import contextlib
import functools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops.attention import cpu
from tests.instruction_sets import ISAS, on_cpu

pytestmark = pytest.mark.skipif(dispatch.library() is None, reason="the library was not built")

# instruction sets, and whether products of bf16 are those of pairs, which one of them has
WAYS = [*((isa, False) for isa in ISAS), *((isa, True) for isa in ISAS if isa == "avx512bf16")]
ways = st.sampled_from(WAYS)
seeds = st.integers(0, 2**31)
ZONE = 64  # bytes on either side
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def guarded():
    """Lay what is allocated inside between zones of NaN; raise if a zone has changed."""
    buffers, allocate = [], torch.empty

    def fenced(byte, shape, dtype, device):
        size = math.prod(shape) * dtype.itemsize
        buffer = allocate(size + 2 * ZONE, dtype=torch.uint8, device=device).fill_(255)
        buffer[ZONE : ZONE + size] = byte
        buffers.append((buffer, size))
        return buffer[ZONE : ZONE + size].view(dtype).view(shape)

    empty, zeros = (functools.partial(fenced, byte) for byte in (255, 0))
    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "zeros", zeros):
        yield
    for buffer, size in buffers:
        assert (buffer[:ZONE] == 255).all(), "written before the start of a tensor"
        assert (buffer[ZONE + size :] == 255).all(), "written beyond the end of a tensor"


@contextlib.contextmanager
def on_cpu_by(way):
    """Ops run the C++ kernels of one of the WAYS."""
    isa, pairs = way
    with on_cpu(isa), mock.patch.object(dispatch, "multiplies_pairs", return_value=pairs):
        yield


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def between_nan(x):
    """A copy as a view with NaN before and after every head, token and row of the batch."""
    wide = torch.full([n + 2 for n in x.shape], math.nan, dtype=x.dtype)
    return wide[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


def made(seed, B, T, S, Hq, Hk, D, dtype=torch.float32):
    """q, k, v and the gradient of the output."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (B, T, Hq, D), (B, S, Hk, D), (B, S, Hk, D), (B, T, Hq, D)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in shapes]


def value_and_grads(f, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def formula(q, k, v, seen, scale, softcap):
    """Attend with every score; `seen` [B, 1, T, S]. A query that sees nothing gets 0."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def causal(T, window=None, lengths=None):
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i) & (j > i - (T if window is None else window))
    document = torch.arange(len(lengths or [T])).repeat_interleave(torch.tensor(lengths or [T]))
    return (seen & (document[:, None] == document))[None, None]


def within_budget(way, given, options, seen, factor=2):
    attend = functools.partial(kernels.attention, **options)
    scale = options.get("scale") or given[0].shape[-1] ** -0.5
    exact = functools.partial(formula, seen=seen, scale=scale, softcap=options.get("softcap"))
    with on_cpu_by(way), guarded():
        views = [between_nan(x) for x in given]
        ours = value_and_grads(attend, *views)
        again = value_and_grads(attend, *views)
    with kernels.use_backend("reference"):
        reference = value_and_grads(attend, *given)
    truth = value_and_grads(exact, *(x.double() for x in given))
    q, k, v, grad = (x.double() for x in given)
    # The gradient of a score is p (dp - dy . y), products near |dy| |v|: what cancels is known to
    # the dtype's roundings of that, since backward reads y as it was rounded. And p = e^(s - lse)
    # is known to the roundings of lse, the logarithm of up to 360 terms, in sums of p dy.
    most = max(q.abs().max(), k.abs().max())
    cancels = scale * grad.norm(dim=-1).max() * v.norm(dim=-1).max() * most
    cancels += 4 * value_and_grads(exact, q, k, v, grad.abs())[3].max()
    for y, twice, same, exactly in zip(ours, again, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        assert torch.equal(y, twice)
        rounding = torch.finfo(y.dtype).eps * (4 * exactly.abs().max() + cancels)
        allowed = factor * (same.double() - exactly).abs().max() + rounding
        assert (y.double() - exactly).abs().max() <= allowed


def takes(given, mask=None):
    return cpu.fits(*given[:3], mask, None)


@settings(max_examples=80)
@given(
    ways,
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2, 3, 7])),
    st.integers(1, 40),
    st.none() | st.integers(1, 100),
    st.none() | st.floats(0.3, 5),
    st.sampled_from(["causal", "masked", "packed"]),
    st.none() | st.floats(0.05, 1),
    st.sampled_from(DTYPES),
    seeds,
)
def test_values_and_gradients(way, lengths, sizes, D, window, softcap, kind, scale, dtype, seed):
    """Up to 360 tokens are several blocks of queries and of keys, and the last ones are short; 7
    query heads to a key head do not divide the rows of a block.
    """
    T, (B, Hk, group) = sum(lengths), sizes
    given = made(seed, B, T, T, Hk * group, Hk, D, dtype)
    options, seen = {"scale": scale, "softcap": softcap}, causal(T)
    if kind == "packed":
        options |= {"lengths": lengths, "window": window}
        seen = causal(T, window, lengths)
    elif kind == "masked":
        options["mask"] = seen = causal(T, window)
    assert takes(given, options.get("mask")) == (T > 1)
    within_budget(way, given, options, seen.expand(B, 1, T, T))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_real_heads(way, D):
    T = 300 if way[0] != "scalar" else 130
    within_budget(way, made(D, 1, T, T, 6, 2, D), {}, causal(T))


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="the processor has no pairs of bf16")
def test_a_processor_whose_pairs_are_slow_has_the_bits_of_one_without_them():
    given = made(0, 1, 200, 200, 6, 2, 64, torch.bfloat16)
    found = []
    for way in [("avx512", False), ("avx512bf16", False), ("avx512bf16", True)]:
        with on_cpu_by(way):
            found.append(value_and_grads(kernels.attention, *given))
    for none, slow, fast in zip(*found, strict=True):
        assert torch.equal(none, slow)
        assert not torch.equal(slow, fast)


@settings(max_examples=30)
@given(
    ways,
    st.integers(2, 150),
    st.integers(1, 200),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from(DTYPES[:2]),
    seeds,
)
def test_any_mask(way, T, S, batched, density, dtype, seed):
    """Keys of other number than queries, none in a row's sight or in a block's, and all of them."""
    B, gen = 2, torch.Generator().manual_seed(seed)
    given = made(seed, B, T, S, 4, 2, 12, dtype)
    mask = torch.rand(B if batched else 1, 1, T, S, generator=gen) < density
    mask[:, :, T // 3 : T // 2] = False  # rows that see nothing
    mask[..., S // 4 : 3 * S // 4] = False
    if not batched:
        mask = mask[0, 0].t().contiguous().t()  # not dense in S
    assert takes(given, mask)
    seen = mask.expand(B, 1, T, S)
    with on_cpu_by(way), guarded():
        views = [between_nan(x) for x in given]
        ours = value_and_grads(functools.partial(kernels.attention, mask=mask), *views)
    truth = value_and_grads(
        lambda *x: formula(*x, seen, 12**-0.5, None), *(x.double() for x in given)
    )
    # fp32 sums of up to 200 terms near 1; of bf16, terms rounded to 2^-9 and the result once more
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for y, exact in zip(ours, truth, strict=True):
        assert (y - exact).abs().max() <= tolerance * (1 + exact.abs().max())
    for x in ours[:2]:  # torch may make anything of a row that sees nothing
        assert not x[:, T // 3 : T // 2].any()


def test_left_padding():
    T, pad = 150, torch.tensor([0, 70, 149])
    given = made(1, 3, T, T, 6, 3, 64)
    real = torch.arange(T) >= pad[:, None]
    seen = causal(T) & real[:, None, None] | torch.eye(T, dtype=torch.bool)
    within_budget(WAYS[-1], given, {"mask": seen}, seen)


def test_scores_that_grow_beyond_any_base():
    """Each key scores 30 more than the one before it: the base is raised again and again, from one
    that a query in the middle has never left.
    """
    T, D = 200, 8
    q, k, v, grad = made(2, 1, T, T, 2, 1, D)
    q[..., 0], k[..., 0] = 1.0, 30.0 * torch.arange(T)[None, :, None]
    q[:, T // 2, :, 0] = -1.0
    # scores near 6000 are known to 2^-11 in fp32, whoever computes them
    within_budget(WAYS[-1], (q, k, v, grad), {"scale": 1.0}, causal(T), factor=4)


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=4),
    st.integers(2, 150),
    st.lists(st.integers(0, 150), max_size=4),
    st.none() | st.integers(1, 70),
    st.sampled_from(DTYPES[:2]),
    seeds,
)
def test_a_document_does_not_depend_on_its_neighbours(before, length, after, window, dtype, seed):
    """Whatever they hold, NaN too, and however many they are: the same bits, those that it has
    alone.
    """
    lengths = [*before, length, *after]
    T, start = sum(lengths), sum(before)
    alone = [x.contiguous() for x in made(seed, 1, length, length, 6, 2, 20, dtype)]
    packed = [torch.full((1, T, *x.shape[2:]), math.nan, dtype=dtype) for x in alone]
    for whole, part in zip(packed, alone, strict=True):
        whole[:, start : start + length] = part
    with on_cpu():
        options = {"window": window}
        one = value_and_grads(lambda *x: kernels.attention(*x, lengths=[length], **options), *alone)
        many = value_and_grads(
            lambda *x: kernels.attention(*x, lengths=lengths, **options), *packed
        )
    for x, y in zip(one, many, strict=True):
        assert torch.equal(x, y[:, start : start + length])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind", ["causal", "windowed", "masked"])
def test_threads_change_no_bit(kind, dtype):
    """Also more of them than there are processors or units."""
    T = 500
    given = made(3, 1, T, T, 6, 2, 32, dtype)
    options = {
        "causal": {},
        "windowed": {"lengths": [400, 100], "window": 70},
        "masked": {"mask": causal(T, 70)},
    }[kind]
    found = []
    with on_cpu():
        for count in (1, 2, 3, 16):
            with threads(count):
                f = functools.partial(kernels.attention, **options)
                found.append(value_and_grads(f, *given))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


def test_rows_of_a_batch_are_alike():
    q, k, v, grad = (x.expand(3, -1, -1, -1) for x in made(4, 1, 100, 100, 4, 4, 16))
    with on_cpu():
        for x in value_and_grads(kernels.attention, q, k, v, grad):
            assert torch.equal(x, x[:1].expand(x.shape))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_views_of_one_projection_and_gradients_without_strides(dtype):
    """Heads that lie as a fused projection has them, or with their values apart; the gradient of a
    sum, whose strides are 0.
    """
    fused = torch.randn(2, 70, 8, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    parts = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in parts]
    one = torch.ones(1, dtype=dtype).expand(2, 70, 4, 16)
    with on_cpu():
        first = value_and_grads(kernels.attention, *(x.contiguous() for x in parts), one)
        for views in (parts, apart):
            found = value_and_grads(kernels.attention, *views, one)
            assert all(torch.equal(x, y) for x, y in zip(first, found, strict=True))


def test_nothing_of_the_size_of_the_scores_is_kept():
    T, most, allocate = 1024, [], torch.empty

    def empty(shape, **options):
        most.append(math.prod(shape))
        return allocate(shape, **options)

    given = made(6, 1, T, T, 4, 4, 16)
    with on_cpu(), threads(1), mock.patch.object(torch, "empty", empty):
        value_and_grads(kernels.attention, *given)
    assert (
        max(most) < 1 << 17
    )  # floats, a thread's space; of one head there would be 1 << 20 scores


def test_what_runs_the_reference():
    """A single token, other dtypes, float masks, keys of other number without a mask."""
    q, k, v, _ = made(7, 2, 6, 6, 4, 2, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    assert cpu.fits(q, k, v, None, None)
    assert cpu.fits(q, k, v, mask, 0.5)
    assert not cpu.fits(q, k, v, None, -1.0)
    assert not cpu.fits(q[:, :1], k, v, None, None)
    assert not cpu.fits(q[:, :5], k, v, None, None)
    assert not cpu.fits(q, k, v[..., :4], None, None)
    assert not cpu.fits(q[:, :, :3], k, v, None, None)
    assert not cpu.fits(q.double(), k.double(), v.double(), None, None)
    assert not cpu.fits(q, k.half(), v, None, None)
    assert not cpu.fits(q, k, v, mask.float(), None)
    assert not cpu.fits(q, k, v, mask[:5], None)
    with on_cpu(), mock.patch.object(cpu, "attention", side_effect=AssertionError):
        y = kernels.attention(q[:, :1], k, v)  # sees every key
    exact = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q[:, :1], k, v)), enable_gqa=True
    )
    assert torch.equal(y, exact.transpose(1, 2))


def test_lengths_that_do_not_add_up():
    q, k, v, _ = made(8, 1, 6, 6, 2, 2, 8)
    with on_cpu():
        for lengths in ([5], [4, 3], [7, -1]):
            with pytest.raises(ValueError, match="do not add up to the 6 tokens"):
                kernels.attention(q, k, v, lengths=lengths)
        assert kernels.attention(q[:, :0], k[:, :0], v[:, :0]).shape == (1, 0, 2, 8)
