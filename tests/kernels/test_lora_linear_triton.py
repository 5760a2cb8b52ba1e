"""The LoRA products where Triton runs: A and s B cast in one launch, gate and up side by side."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels.ops.lora_linear import reference
from lorakit.kernels.ops.lora_linear import triton as lora_triton
from lorakit.kernels.ops.lora_linear.tensors import LoraTensors
from tests.triton_budget import guarded, random, within_budget
from tests.triton_interpreter import on_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Base:
    """A frozen layer without a bias."""

    bias = None

    def __init__(self, weight):
        self.stored = weight

    def __call__(self, x):
        return x @ self.stored.t()


@settings(max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=3),
    K=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_cast_is_torchs(shapes, K, dtype, seed):
    """All A stacked, and s B of each layer, to the last bit: r x K and N x r of each."""
    pairs = [
        (random(seed + i, r, K), random(seed + 10 + i, N, r)) for i, (r, N) in enumerate(shapes)
    ]
    scalings = [0.5 * i + 0.3 for i in range(len(pairs))]
    parts = [LoraTensors(a, b, None, None) for a, b in pairs]
    expected, of_each = reference.cast_pairs(parts, scalings, dtype)
    with on_triton(), guarded(*(m for pair in pairs for m in pair)) as copies:
        parts = [LoraTensors(*copies[i : i + 2], None, None) for i in range(0, len(copies), 2)]
        found, pieces = reference.cast_pairs(parts, scalings, dtype)
        assert torch.equal(found, expected)
        for (A, sB), (expected_A, expected_sB) in zip(pieces, of_each, strict=True):
            assert torch.equal(A, expected_A)
            assert torch.equal(sB, expected_sB)


@settings(max_examples=10)
@given(
    rows=st.integers(reference.FEW - 2, reference.FEW + 40),
    r=st.integers(1, 4),
    keep=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_an_mlp(rows, r, keep, dtype, seed):
    """Values and gradients of x, A and B within the error budget, with few rows and with more."""
    hidden, inner = 24, 40
    weights = [random(seed + i, inner, hidden, scale=0.2) for i in range(2)]
    weights.append(random(seed + 2, hidden, inner, scale=0.2))
    inputs = [random(seed + 3, rows, hidden).to(dtype)]
    for i, (N, K) in enumerate(w.shape for w in weights):
        inputs += [random(seed + 4 + i, r, K, scale=0.2), random(seed + 8 + i, N, r, scale=0.2)]

    def mlp(x, *small):
        layers = [
            kernels.LoraWeights(Base(w.to(dtype).to(x.dtype)), *small[2 * i : 2 * i + 2], 0.7)
            for i, w in enumerate(weights)
        ]
        return kernels.lora_mlp(x, *layers, "silu", keep=keep)

    # gradients of A and B are sums over the rows, of products that are rounded to `dtype` before
    within_budget(mlp, mlp, inputs, terms=rows * torch.finfo(dtype).eps * 2**21)


def test_gate_and_up_are_multiplied_together():
    """They lie in one memory, forward and backward, when they differ in values alone."""
    layers = [
        kernels.LoraWeights(Base(random(i, 8, 6)), random(3 + i, 2, 6), random(6 + i, 8, 2), 0.5)
        for i in range(2)
    ]
    tensors = [t for w in layers for t in (w.lora_A, w.lora_B, None, None)]
    static, x = [(w.base, w.scaling, None) for w in layers], random(9, reference.FEW + 1, 6)
    no_dropout = reference.Dropout(0.0, 0)
    with on_triton():
        group = reference.Group(static, no_dropout, tensors, torch.float32)
        gate, up = group.forward(x, by_base=True)
        assert reference.stacked([gate, up]) is not None
        group.take(torch.ones(2, len(x), 8).unbind(), [])
        assert group.together is not None
        other = reference.Group(
            [static[0], (static[1][0], 0.6, None)], no_dropout, tensors, x.dtype
        )
        assert other.stacked is None


def test_what_lies_one_after_the_other():
    memory = torch.arange(24.0)
    a, b, c = memory[:6].view(2, 3), memory[6:12].view(2, 3), memory[12:18].view(2, 3)
    assert torch.equal(reference.stacked([a, b, c]), memory[:18].view(3, 2, 3))
    for others in ([b, a], [a, c], [a, b.clone()], [a, b.view(3, 2)], [a, b.t()]):
        assert reference.stacked(others) is None


@settings(max_examples=12)
@given(
    layers=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 64)), min_size=1, max_size=3),
    rows=st.integers(1, 700),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_gradients_from_one_reading(layers, rows, dtype, seed):
    """dlow = dy sB is rounded once, and dB = s dy^T low is as exact as an fp32 sum."""
    R, dys, sBs = sum(r for _, r in layers), [], []
    for i, (N, r) in enumerate(layers):
        dys.append(random(seed + i, rows, N).to(dtype))
        sBs.append(random(seed + 5 + i, N, r).to(dtype))
    beside = random(seed + 9, rows, R + 3).to(dtype)
    scalings = [0.5, 2.0, 3.0][: len(layers)]
    with on_triton(), guarded(*dys, *sBs, beside) as copies:
        low = copies[-1][:, :R]
        dlow = torch.empty((rows, R + 5), dtype=dtype)[:, :R]
        found = lora_triton.of_gradients(
            copies[: len(dys)], copies[len(dys) : -1], low, scalings, dlow, torch.float32
        )
    exact = [dy.double() @ sB.double() for dy, sB in zip(dys, sBs, strict=True)]
    sizes = [dy.double().abs() @ sB.double().abs() for dy, sB in zip(dys, sBs, strict=True)]
    exact, size = torch.cat(exact, 1), torch.cat(sizes, 1)
    # half a unit of the rounding, and of each of 300 sums in fp32 at most 2^-24
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 300 * 2**-24 * size + 2**-24
    assert ((dlow.double() - exact).abs() <= allowed).all()
    lows = low.split([r for _, r in layers], 1)
    for dy, of_layer, s, dB in zip(dys, lows, scalings, found, strict=True):
        exact = s * dy.double().t() @ of_layer.double()
        size = s * dy.double().abs().t() @ of_layer.double().abs()
        assert ((dB.double() - exact).abs() <= (rows + 1) * 2**-24 * size).all()


def test_who_adds_up_what_one_reading_gives(monkeypatch):
    """It is how backward goes in 16 bits with many rows, and not in fp32 or with few."""
    monkeypatch.setattr(reference, "MANY", 130)  # the interpreter is slow
    for dtype, rows, once in (
        (torch.bfloat16, 130, True),
        (torch.bfloat16, 129, False),
        (torch.float32, 130, False),
    ):
        A, B = random(0, 2, 6), random(1, 8, 2)
        static = [(Base(random(2, 8, 6).to(dtype)), 0.5, None)]
        with on_triton():
            group = reference.Group(static, reference.Dropout(0.0, 0), [A, B, None, None], dtype)
            group.take([torch.ones(rows, 8, dtype=dtype)], [], x=random(3, rows, 6).to(dtype))
        assert (group.of_B is not None) == once


# ---- all layers of an input as one product ------------------------------------------------------


class PackedBase:
    """A frozen layer in 4 bits."""

    def __init__(self, weight, bias=None, quantize=kernels.quantize_nf4, **options):
        self.stored, self.bias = quantize(weight, **options), bias

    def __call__(self, x):
        return kernels.frozen_linear(x, self.stored, self.bias)


@settings(max_examples=20)
@given(
    heights=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    ranks=st.lists(st.sampled_from([1, 3, 4, 8, 16, 64, 256]), min_size=3, max_size=3),
    block=st.sampled_from([64, 128, 512]),
    fp4=st.booleans(),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_weights_and_updates_as_one_matrix(heights, ranks, block, fp4, double, dtype, seed):
    """J = [W, sB; A, .] has the bits of its parts, and zeros beside the blocks of s B."""
    K, ranks = 512, ranks[: len(heights)]
    quantize = kernels.quantize_fp4 if fp4 else kernels.quantize_nf4
    weights = [
        quantize(random(seed + i, 8 * h, K), block_size=block, double_quant=double)
        for i, h in enumerate(heights)
    ]
    pairs = [
        (random(seed + 5 + i, r, K), random(seed + 9 + i, w.shape[0], r))
        for i, (w, r) in enumerate(zip(weights, ranks, strict=True))
    ]
    assert lora_triton.joins(weights, sum(ranks)) == (sum(ranks) % 8 == 0)
    with on_triton(), guarded():
        As, Bs = ([pair[i] for pair in pairs] for i in (0, 1))
        A, sBs = lora_triton.cast(As, Bs, [0.7] * len(pairs), dtype)
        room = -(-sum(ranks) // 16) * 16
        J = lora_triton.join(weights, A, sBs, room)
        dense = torch.cat([kernels.dequantize_nf4(w, dtype) for w in weights])
    N = len(dense)
    assert torch.equal(J[:N, :K], dense)
    assert torch.equal(J[:N, K : K + sum(ranks)], torch.block_diag(*sBs))
    assert torch.equal(J[N:, :K], A)


def test_what_is_joined():
    pack = kernels.quantize_nf4
    w = pack(random(0, 8, 512))
    assert lora_triton.joins([w, w, w], 8)
    assert not lora_triton.joins([w, w, w, w], 8)
    assert not lora_triton.joins([w], 12)
    assert not lora_triton.joins([random(0, 8, 512)], 8)
    assert not lora_triton.joins([kernels.quantize_int8(random(0, 8, 512))], 8)
    assert not lora_triton.joins([w, pack(random(0, 16, 256))], 8)
    assert not lora_triton.joins([w, kernels.quantize_fp4(random(0, 8, 512))], 8)
    assert not lora_triton.joins([w, pack(random(0, 8, 512), block_size=128)], 8)
    assert not lora_triton.joins([pack(random(0, 9, 512))], 8)  # no whole number of programs


def small_matrices(seed, shapes, r):
    """A and B of layers [N, K]."""
    return [
        t
        for i, (N, K) in enumerate(shapes)
        for t in (random(seed + i, r, K, scale=0.2), random(seed + 9 + i, N, r, scale=0.2))
    ]


def with_room(x, layers):
    """A copy of x with room beside its rows where the layers run as one product, and the room."""
    room = kernels.lora_room(x, layers)
    beside = torch.full((*x.shape[:-1], room), torch.nan, dtype=x.dtype, device=x.device)
    return torch.cat([x, beside], dim=-1)[..., : x.shape[-1]], room


SHAPES = [(128, 64), (64, 64), (64, 64)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_k_and_v_as_one_product(dtype, dropout, bias):
    rows, r = reference.FEW + 9, 8
    bases = [
        PackedBase(random(i, *shape, scale=0.2), random(40 + i, shape[0]).to(dtype))
        if bias
        else PackedBase(random(i, *shape, scale=0.2))
        for i, shape in enumerate(SHAPES)
    ]
    inputs = [random(30, 2, rows, 64).to(dtype), *small_matrices(3, SHAPES, r)]
    rooms = []

    def ours(x, *small):
        torch.manual_seed(5)
        layers = [
            kernels.LoraWeights(base, *small[2 * i : 2 * i + 2], 0.7, dropout)
            for i, base in enumerate(bases)
        ]
        x, room = with_room(x, layers)
        rooms.append(room)
        return kernels.lora_qkv(x, layers, room=room)

    def exactly(x, *small):
        torch.manual_seed(5)
        dense = [kernels.dequantize_nf4(base.stored, dtype).to(x.dtype) for base in bases]
        layers = [
            kernels.LoraWeights(Base(w), *small[2 * i : 2 * i + 2], 0.7, dropout)
            for i, w in enumerate(dense)
        ]
        ys = kernels.lora_qkv(x, layers)
        return tuple(
            y if base.bias is None else y + base.bias.to(y.dtype)
            for y, base in zip(ys, bases, strict=True)
        )

    # gradients of A and B are sums over the rows, of products that are rounded to `dtype` before
    within_budget(ours, exactly, inputs, terms=rows * torch.finfo(dtype).eps * 2**21)
    assert rooms[0] == 32  # a multiple of 16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_as_one_product(dtype, keep, dropout):
    """Also with ranks that differ, and with an x that is made again: without room, or with new."""
    rows, shapes = reference.FEW + 3, [(128, 64), (128, 64), (64, 128)]
    bases = [PackedBase(random(i, *shape, scale=0.2)) for i, shape in enumerate(shapes)]
    cases = ((8, 8, 8), ""), ((8, 16, 8), "plain"), ((8, 8, 4), ""), ((8, 8, 8), "with room")
    for ranks, again in cases:
        inputs = [random(30, rows, 64).to(dtype)]
        for i, (shape, r) in enumerate(zip(shapes, ranks, strict=True)):
            inputs += small_matrices(50 + i, [shape], r)
        rooms = []

        def mlp(x, small, bases, room):
            torch.manual_seed(5)
            layers = [
                kernels.LoraWeights(base, *small[2 * i : 2 * i + 2], 0.7, dropout)
                for i, base in enumerate(bases)
            ]
            recipe = (torch.clone, x) if again else None  # noqa: B023
            if room and again == "with room":  # noqa: B023
                recipe = (lambda x: with_room(x, layers[:2])[0], x)
            if room:
                x, room = with_room(x, layers[:2])
                rooms.append(room)  # noqa: B023
            return kernels.lora_mlp(x, *layers, "silu", keep=keep, again=recipe, room=room)

        def ours(x, *small):
            return mlp(x, small, bases, True)

        def exactly(x, *small):
            dense = [Base(kernels.dequantize_nf4(b.stored, dtype).to(x.dtype)) for b in bases]
            return mlp(x, small, dense, False)

        terms = rows * torch.finfo(dtype).eps * 2**21
        within_budget(ours, exactly, inputs, terms=terms)
        assert rooms[0] == (16 if ranks[1] == 8 else 32)


def test_two_backward_passes():
    """The graph is kept: what the second finds is what the first found, and so is a third."""
    bases = [PackedBase(random(i, *shape, scale=0.2)) for i, shape in enumerate(SHAPES)]
    with on_triton():
        small = [t.requires_grad_() for t in small_matrices(3, SHAPES, 8)]
        layers = [
            kernels.LoraWeights(base, *small[2 * i : 2 * i + 2], 0.7)
            for i, base in enumerate(bases)
        ]
        x = random(30, reference.FEW + 1, 64).requires_grad_()
        roomy, room = with_room(x, layers)
        ys = kernels.lora_qkv(roomy, layers, room=room)
        grads = [torch.ones_like(y) for y in ys]
        passes = [torch.autograd.grad(ys, [x, *small], grads, retain_graph=True) for _ in range(3)]
    for found in passes[1:]:
        for one, other in zip(found, passes[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_kept_of_the_inputs(keep, again):
    """The groups hold low between the passes, and neither x nor the hidden state beside it."""
    rows, shapes, r = reference.FEW + 3, [(128, 64), (128, 64), (64, 128)], 8
    with on_triton():
        bases = [PackedBase(random(i, *shape, scale=0.2)) for i, shape in enumerate(shapes)]
        small = [t.requires_grad_() for t in small_matrices(3, shapes, r)]
        layers = [
            kernels.LoraWeights(base, *small[2 * i : 2 * i + 2], 0.7)
            for i, base in enumerate(bases)
        ]
        x, room = with_room(random(30, rows, 64), layers[:2])
        recipe = (torch.clone, x) if again else None
        y = kernels.lora_mlp(x, *layers, "silu", keep=keep, again=recipe, room=room)
    groups = y.grad_fn.next_functions[0][0].groups
    assert [group.room for group in groups] == [16, 16]
    held = [
        t.untyped_storage().nbytes()
        for group in groups
        for t in (*(group.lows or ()), *(t for pair in group.pairs for t in pair))
    ]
    assert max(held) <= 4 * max(rows * 2 * r, r * 128 * 2)
    assert all(group.weights is None for group in groups)


def test_what_wants_no_room():
    """Few rows, DoRA, other weights, another backend, A or B that are not cast in line."""
    bases = [PackedBase(random(i, *shape)) for i, shape in enumerate(SHAPES)]
    small = small_matrices(3, SHAPES, 8)
    layers = [kernels.LoraWeights(b, *small[2 * i : 2 * i + 2], 1.0) for i, b in enumerate(bases)]
    x = random(0, 200, 64)
    assert kernels.lora_room(x, layers) == 0
    with on_triton():
        assert kernels.lora_room(x, layers) == 32
        assert kernels.lora_room(x[: reference.FEW], layers) == 0
        assert kernels.lora_room(x.double(), layers) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels.lora_room(x, layers) == 0
        dora = kernels.LoraWeights(bases[0], *small[:2], 1.0, magnitude=torch.ones(128))
        assert kernels.lora_room(x, [dora, *layers[1:]]) == 0
        A, B = small[:2]
        for pair in ((A.t().contiguous().t(), B), (A, B.t().contiguous().t()), (A.double(), B)):
            other = kernels.LoraWeights(bases[0], *pair, 1.0)
            assert kernels.lora_room(x, [other, *layers[1:]]) == 0
        dense = kernels.LoraWeights(Base(random(0, 128, 64)), *small[:2], 1.0)
        assert kernels.lora_room(x, [dense, *layers[1:]]) == 0
