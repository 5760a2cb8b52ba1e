"""Sums of products straight from packed weights, against fp64, and the layers that consist of them
against the ones that consist of torch's products.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import products
from lorakit.kernels.ops.lora_linear import cpu, reference
from lorakit.kernels.ops.lora_linear.tensors import Dropout
from lorakit.kernels.ops.products import Sum, Term, sums_of_products
from lorakit.kernels.ops.products import reference as spelled_out
from tests.instruction_sets import ISAS, on_cpu

BF16, FP32 = torch.bfloat16, torch.float32
# How the kernel multiplies: the instruction set, the dtype of a, and whether by pairs of bf16.
WAYS = [(isa, dtype, False) for isa in ISAS if isa in products.ISAS for dtype in (BF16, FP32)]
WAYS += [("avx512bf16", BF16, True)] if "avx512bf16" in ISAS else []
pytestmark = pytest.mark.skipif(not WAYS, reason="for processors with AVX2")

ways = st.sampled_from(WAYS or [None])
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 5, 6, 7, 12, 13, 17, 40, 63, 64, 65, 100, 130])


@contextmanager
def multiplied(way):
    """Sums are multiplied in one of the ways."""
    isa, _, pairs = way
    chosen = mock.patch.object(dispatch, "multiplies_pairs", return_value=pairs)
    with on_cpu(isa), chosen, mock.patch.object(cpu, "available", return_value=True):
        yield


def fenced(shape, dtype, width=None):
    """A matrix of NaN between others: rows `width` apart, with a row before and after it."""
    width = width or shape[1] + 3
    whole = torch.full((shape[0] + 2, width), float("nan"), dtype=dtype)
    return whole, whole[1:-1, : shape[1]]


def term(generator, M, N, depth, kind, turned, dtype=BF16):
    """Matrices whose rows lie apart, between NaN: what is read too far is seen."""

    def random(*shape):
        return torch.randn(shape, generator=generator)

    a = fenced((M, depth), dtype)[1].copy_(random(M, depth))
    shape = (N, depth) if turned else (depth, N)
    if kind in ("nf4", "fp4"):
        quantize = kernels.quantize_nf4 if kind == "nf4" else kernels.quantize_fp4
        return Term(a, quantize(random(*shape).to(dtype), double_quant=N % 2 == 0), turned)
    b = fenced(shape, BF16 if kind == "bf16" else torch.float32)[1].copy_(random(*shape))
    return Term(a, b, turned, 1.5 if kind == "fp32" else 1.0)


def exactly(terms, scale, bias, M):
    """Multiply in fp64 the values that the kernel multiplies, and their magnitudes."""
    total = size = 0
    for a, b, turned, factor, start in terms:
        b = spelled_out.dense(b, factor, a.dtype).double()
        b = b.t() if turned else b
        a = F.pad(a[:, : len(b)].double(), (0, 0, start, M - start - len(a)))
        total, size = total + a @ b, size + a.abs() @ b.abs()
    bias = torch.zeros(()) if bias is None else bias
    return scale * total + bias.double(), abs(scale) * size + bias.abs()


@settings(max_examples=150)
@given(
    ways, sizes, sizes,
    st.lists(st.tuples(st.sampled_from(["bf16", "fp32", "nf4", "fp4"]), st.booleans(),
                       st.sampled_from([2, 6, 16, 64, 128, 450])), min_size=1, max_size=3),
    st.booleans(), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_a_sum_is_exact_but_for_its_roundings(way, M, N, kinds, wide, biased, parted, seed):
    """Products are exact, of bf16 in fp32, and of fp32 in a fused multiply-add; each of the sums
    that add them up rounds to 2^-24, some more often than once a value, and the result rounds to
    its dtype. Turned it is the same, beside the other or alone. Terms may have some rows alone.
    """
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for kind, turned, depth in kinds:
        if kind in ("nf4", "fp4"):  # rows of whole blocks
            depth, N = (64 if turned else depth), (N if turned else 64 * -(-N // 64))
        terms.append((kind, turned, depth))
    dtype = way[1]
    terms = [term(generator, M, N, depth, kind, turned, dtype) for kind, turned, depth in terms]
    for i, each in enumerate(terms) if parted else ():
        start, end = sorted(torch.randint(M + 1, (2,), generator=generator).tolist())
        terms[i] = each._replace(a=each.a[start:end], start=start)
    bias = torch.randn(N, generator=generator) if biased else None
    whole, out = fenced((M, N), torch.float32 if wide else BF16)
    around, turned = fenced((N, M), out.dtype)
    alone = torch.empty_like(turned)
    with multiplied(way):
        both = Sum(terms, out, 0.75, bias, turned)
        sums_of_products([both, Sum(terms, None, 0.75, bias, alone)])
    assert torch.equal(turned, out.t())
    assert torch.equal(alone, turned)
    assert around[0].isnan().all()
    assert around[-1].isnan().all()
    assert around[1:-1, M:].isnan().all()
    exact, size = exactly(terms, 0.75, bias, M)
    depth = sum(a.shape[1] for a, *_ in terms)
    allowed = 2**-24 * (depth + 3) * size + (0 if wide else 2**-8) * exact.abs()
    assert ((out.double() - exact).abs() <= allowed).all()
    assert whole[0].isnan().all()
    assert whole[-1].isnan().all()
    assert whole[1:-1, N:].isnan().all()
    same, other = torch.empty_like(out), torch.empty_like(turned)
    spelled_out.sums_of_products([Sum(terms, same, 0.75, bias, other)])
    assert torch.equal(other, same.t())
    assert ((same.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("bias", [torch.arange(18.0)[1::2], torch.ones(1).expand(9)])
def test_values_of_a_bias_may_lie_apart(way, bias):
    out = torch.empty(3, 9)
    terms = [Term(torch.zeros(3, 2, dtype=way[1]), torch.zeros(2, 9), False)]
    with multiplied(way):
        sums_of_products([Sum(terms, out, bias=bias)])
    assert torch.equal(out, bias.expand(3, 9))


@settings(max_examples=40)
@given(ways, sizes, sizes, st.booleans(), seeds)
def test_what_is_less_deep_ends_in_zeros(way, M, N, turned, seed):
    """An odd number of values along the depth is filled up by a zero; a's counterpart is read."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(M, 8, generator=generator).to(way[1])
    b = fenced((N, 7) if turned else (7, N), BF16)[1]
    b.copy_(torch.randn(b.shape, generator=generator))
    out = torch.empty(M, N)
    with multiplied(way):
        sums_of_products([Sum([Term(a, b, turned)], out)])
    exact, size = exactly([Term(a, b, turned, 1.0)], 1.0, None, M)
    assert ((out.double() - exact).abs() <= 2**-24 * 11 * size).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_threads_and_other_rows_change_no_bit(way):
    """The second sum has some rows and columns of the first alone. Both are cut in their depth."""
    generator = torch.Generator().manual_seed(0)
    dtype = way[1]
    terms = [term(generator, 100, 200, depth, "fp32", True, dtype) for depth in (900, 64)]
    fewer = [Term(a[40:57], b[64:101], True, factor) for a, b, _, factor, _ in terms]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(100, 200, dtype=dtype))
            part = torch.empty(17, 37, dtype=dtype)
            with multiplied(way):
                sums_of_products([Sum(terms, found[-1]), Sum(fewer, part)])
            assert torch.equal(part, found[-1][40:57, 64:101])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_have_the_bits_of_their_own_terms(way, threads):
    """Adapters with 5, 13, 0 and 150 rows share two weights so deep that a panel of them is laid
    out in parts. Each row is that of a sum of its own terms alone.
    """
    generator, dtype, before = torch.Generator().manual_seed(0), way[1], torch.get_num_threads()
    shared = [term(generator, 170, 100, depth, "fp32", False, dtype) for depth in (1800, 200)]
    spans = [(0, 5, 4), (5, 18, 64), (18, 18, 8), (20, 170, 6)]  # and two rows of nobody
    own = [term(generator, end - start, 100, r, "fp32", True, dtype) for start, end, r in spans]
    own = [each._replace(start=start) for each, (start, *_) in zip(own, spans, strict=True)]
    found, alone = torch.empty(170, 100, dtype=dtype), torch.empty(170, 100, dtype=dtype)
    torch.set_num_threads(threads)
    try:
        with multiplied(way):
            sums_of_products([Sum([*shared, *own], found)])
            for (start, end, _), each in zip([*spans, (18, 20, 0)], [*own, None], strict=True):
                terms = [t._replace(a=t.a[start:end]) for t in shared]
                terms += [] if each is None else [each._replace(start=0)]
                sums_of_products([Sum(terms, alone[start:end])])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, alone)
    exact, size = exactly([*shared, *own], 1.0, None, 170)
    allowed = 2**-24 * 2100 * size + (2**-8 * exact.abs() if dtype == BF16 else 0)
    assert ((found.double() - exact).abs() <= allowed).all()


def test_where_it_multiplies(monkeypatch):
    """Elsewhere torch is faster: tiles in bf16, oneDNN in fp32 on AMD, scalar code."""
    bf16, fp32 = torch.zeros(1, 2, dtype=BF16), torch.zeros(1, 2)

    def machine(isa, tiles=False, amd=False):
        monkeypatch.setattr(dispatch, "isa", lambda: isa)
        monkeypatch.setattr(dispatch, "multiplies_tiles", lambda: tiles)
        monkeypatch.setattr(dispatch, "mkl_is_slow", lambda: amd)
        return products.available(bf16), products.available(fp32)

    assert machine("avx2") == machine("avx512") == machine("avx512bf16") == (True, True)
    assert machine("avx512bf16", amd=True) == (True, False)
    assert machine("avx512bf16", tiles=True) == (False, True)
    assert machine("scalar") == (False, False)
    machine("avx512bf16")
    assert not products.available(fp32.half())
    with kernels.use_backend("reference"):
        assert not products.available(bf16)


def test_which_weights_it_takes():
    w = torch.randn(6, 128)
    assert products.takes(w.to(BF16))
    assert products.takes(kernels.quantize_nf4(w))
    assert products.takes(w)
    assert not products.takes(w.half())
    assert not products.takes(kernels.quantize_nf4(w, block_size=32))
    assert not products.takes(kernels.quantize_nf4(torch.randn(6, 96)))  # rows end inside a block
    assert not products.takes(kernels.quantize_nf4(w[:5]))
    assert not products.takes(kernels.quantize_int8(w))


class Frozen:
    def __init__(self, stored, bias=None):
        self.stored, self.bias = stored, bias

    def __call__(self, x):
        raise AssertionError("the weight is not asked for by calling the layer")


def passes(group, x, dys, need):
    """Outputs and gradients, forward and backward."""
    ys = group.forward(x, by_base=False)
    small: list[Sum] = []
    later: list[Sum] = []
    group.take(dys, small)
    found = [*ys, group.grad_x(later), *group.grad_tensors(x, need, later)]
    sums_of_products(small, later)
    return found


@settings(max_examples=40)
@given(
    ways, st.sampled_from([1, 7, 50]), st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), seeds,
)  # fmt: skip
def test_layers_of_one_input_agree(way, M, ranks, packed, biased, rate, seed):
    """Outputs and gradients are those of torch's products of fp32 copies, up to three
    roundings to bf16: of A or B, of x A^T or s dy B, and of the result, each at most 2^-9 of the
    sum of the magnitudes. In fp32 what remains are the sums' own, of at most 100 values each in
    both, and in a row. Ranks may be odd, and 0.
    """
    torch.manual_seed(seed)
    dtype = way[1]
    K, static, dense, tensors = 64, [], [], []
    for rank, N in zip(ranks, [32, 64, 6], strict=False):
        w = torch.randn(N, K).to(dtype)
        if packed:
            stored = kernels.quantize_nf4(w)
            w = kernels.dequantize_nf4(stored)
        static.append((Frozen(stored if packed else w), 0.5, None))
        dense.append((Frozen(w.float()), 0.5, None))
        bias = torch.randn(N).to(dtype) if biased else None
        tensors += [torch.randn(rank, K), torch.randn(N, rank), bias, None]
    x = torch.randn(M, 2 * K).to(dtype)[:, ::2]  # values not side by side
    dys = [torch.randn(M, len(B)).to(dtype) for B in tensors[1::4]]
    need = [t is not None for t in tensors]

    def drop(t):  # the same mask for all
        return Dropout(rate, 3)(t.to(dtype)).to(t.dtype)

    drop.rate = rate
    with multiplied(way):
        ours = passes(cpu.group(x, static, drop, tensors), x, dys, need)
    wide = reference.Group(dense, drop, tensors, torch.float32)
    exact = passes(wide, x.float(), [dy.float() for dy in dys], need)
    positive = [(Frozen(base.stored.abs()), s, None) for base, s, _ in dense]
    magnitudes = [t if t is None else t.abs() for t in tensors]
    wide = reference.Group(positive, drop, magnitudes, torch.float32)
    sizes = passes(wide, x.float().abs(), [dy.float().abs() for dy in dys], need)
    for found, same, size in zip(ours, exact, sizes, strict=True):
        if same is None:
            assert found is None
        else:
            assert found.shape == same.shape
            allowed = 3 * 2**-9 if dtype == BF16 else 400 * 2**-24
            assert ((found.float() - same).abs() <= allowed * size + 1e-6).all()


@settings(max_examples=30)
@given(
    ways, st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=4), seeds
)  # fmt: skip
def test_an_adapter_among_others_gets_the_bits_that_it_gets_alone(way, adapters, seed):
    """Two layers read one input. Who has no row disturbs nobody, and gets gradients of zero."""
    torch.manual_seed(seed)
    K, widths, dtype = 64, (6, 10), way[1]
    bases = [Frozen(torch.randn(N, K).to(dtype)) for N in widths]
    ends = torch.tensor([rows for rows, _ in adapters]).cumsum(0).tolist()
    spans = [slice(end - rows, end) for (rows, _), end in zip(adapters, ends, strict=True)]
    M, count = ends[-1] + 2, len(adapters)  # two rows are nobody's
    tensors = [
        [torch.randn(r, K), torch.randn(N, r), None, None] for N in widths for _, r in adapters
    ]
    x, dys = torch.randn(M, K).to(dtype), [torch.randn(M, N).to(dtype) for N in widths]

    def run(rows, places, which):
        """Two outputs and the gradient of x, and then those of each update."""
        static = [(base, 0.5, place) for base in bases for place in places]
        flat = [t for i in which for t in tensors[i]]
        group = cpu.group(x[rows], static, Dropout(0.0, 0), flat)
        found = passes(group, x[rows], [dy[rows] for dy in dys], [t is not None for t in flat])
        return found[:3], [found[3 + 4 * i : 5 + 4 * i] for i in range(len(which))]

    with multiplied(way):
        by_rows, of_updates = run(slice(0, M), spans, range(2 * count))
        for i, rows in enumerate(spans):
            own = of_updates[i], of_updates[count + i]
            if rows.start == rows.stop:
                assert not any(grad.any() for pair in own for grad in pair)
                continue
            alone, expected = run(rows, [None], [i, count + i])
            assert all(torch.equal(a[rows], b) for a, b in zip(by_rows, alone, strict=True))
            for pair, theirs in zip(own, expected, strict=True):
                assert all(map(torch.equal, pair, theirs))


def test_a_layer_that_does_not_fit_takes_torchs_products(monkeypatch):
    x, A, B = torch.randn(40, 64).to(BF16), torch.randn(2, 64), torch.randn(6, 2)
    static, drop = [(Frozen(torch.randn(6, 64).to(BF16)), 1.0, None)], Dropout(0.0, 0)
    monkeypatch.setattr(cpu, "available", lambda x: True)
    assert cpu.group(x, static, drop, [A, B, None, None])
    for other in ([A, B, None, torch.ones(6)], [A.to(BF16), B, None, None]):  # the first is DoRA
        assert cpu.group(x, static, drop, other) is None
    assert cpu.group(x[:0], static, drop, [A, B, None, None]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.group(x, static, drop, [A, B, None, None]) is None
