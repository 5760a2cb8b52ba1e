"""The Triton kernels against fp64 and against their references: in the interpreter, or compiled
where there is a GPU (`make gpu`).

Error budget: |kernel - fp64| <= |reference - fp64| + a few roundings, in every dtype; NF4 bit for
bit. Few programs and odd sizes: the interpreter costs a millisecond a program.

Every tensor that a kernel gets or makes lies between guard zones of NaN (`guarded`): a read beyond
its end shows in the result, a write beyond it and an output left unwritten fail.
"""

import dataclasses
import math
import re
import threading
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import frozen_linear, swiglu
from lorakit.kernels.ops.adamw import triton as adamw
from lorakit.kernels.ops.adamw.lists import fits
from lorakit.kernels.ops.nf4.tensor import BLOCK_SIZES, LEVELS
from lorakit.kernels.ops.swiglu import Activation
from tests.conftest import tiny
from tests.exact import exact_norm, exact_turn
from tests.triton_budget import guarded, random, run, within_budget
from tests.triton_interpreter import DEVICE, interpreted, narrow, on_triton, widen

ACTIVATIONS = list(Activation.__members__)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


# ---- the instrument -----------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_the_interpreters_rounding_is_torchs(value):
    x = torch.tensor([value])
    bits = torch.from_numpy(narrow(x.numpy()).view("int16")).view(torch.bfloat16)
    expected = x.bfloat16()
    assert torch.equal(bits.isnan(), expected.isnan())
    assert math.isnan(value) or torch.equal(bits, expected)
    assert math.isnan(value) or widen(narrow(x.numpy()))[0] == expected.float()[0]


def test_bf16_arithmetic_in_the_interpreter():
    """Sums, products, reductions and dot products of bf16, as torch computes them."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(X, Y, SUM, PRODUCT, TOTAL, LARGEST, DOT, N: tl.constexpr):
        at = tl.arange(0, N)
        x, y = tl.load(X + at), tl.load(Y + at)
        tl.store(SUM + at, x + y)
        tl.store(PRODUCT + at, x * y)
        tl.store(TOTAL, tl.sum(x))
        tl.store(LARGEST, tl.max(x))
        square = at[:, None] % N * N + at[None, :] * 0
        a = tl.load(X + (square // N))  # rows of equal values
        b = tl.load(Y + at[None, :] + square * 0)
        tl.store(DOT + at[:, None] * N + at[None, :], tl.dot(a, b))

    N = 16
    x, y = random(0, N).bfloat16().cpu(), random(1, N).bfloat16().cpu()
    out = [torch.zeros(N, dtype=torch.bfloat16) for _ in range(2)]
    single = [torch.zeros(1, dtype=torch.bfloat16) for _ in range(2)]
    dot = torch.zeros(N, N)
    with interpreted():
        kernel[(1,)](x, y, *out, *single, dot, N)
    assert torch.equal(out[0], x + y)
    assert torch.equal(out[1], x * y)
    assert single[0] == x.float().sum().bfloat16()
    assert single[1] == x.max()
    expected = x.float()[:, None].expand(N, N) @ y.float()[None, :].expand(N, N)
    assert torch.allclose(dot, expected, rtol=1e-6, atol=1e-6)


def test_the_same_kernel_compiles_after_it_was_interpreted():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lorakit.kernels.ops.swiglu import triton as activations

    gate = random(0, 64).cpu()
    with interpreted(), kernels.use_backend("triton"):
        kernels.swiglu(gate, gate)
    signature = {"GATE": "*bf16", "UP": "*bf16", "Y": "*bf16", "width": "i32"}
    others = "gate_row", "up_row", "y_row", "HIDDEN_ACT", "BLOCK"
    constants = dict.fromkeys([(4,), (5,), (6,)]) | {(7,): "silu", (8,): 1024}
    signature |= dict.fromkeys(others, "constexpr")
    source = ASTSource(activations._forward, signature, constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_without_a_gpu_the_backend_is_refused_on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    with kernels.use_backend("triton"), pytest.raises(RuntimeError, match="tensor is on cpu"):
        kernels.swiglu(torch.ones(3), torch.ones(3))


# ---- the ops ------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.integers(1, 5), st.integers(1, 300), dtypes, st.sampled_from([0.0, 1.0]),
    st.sampled_from(["llama", "gemma"]), seeds,
)  # fmt: skip
def test_rms_norm(rows, width, dtype, offset, casting_mode, seed):
    x, w = random(seed, rows, width, scale=3).to(dtype), random(seed + 1, width).to(dtype)
    options = {"weight_offset": offset, "casting_mode": casting_mode}

    slope = x.double().square().mean(-1).add(1e-5).rsqrt().max() * (offset + w.double()).abs().max()
    within_budget(
        lambda x, w: kernels.rms_norm(x, w, 1e-5, **options),
        lambda x, w: exact_norm(x, w, offset),
        (x, w),
        terms=4 * slope,
    )


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 300), dtypes, st.booleans(), seeds)
def test_add_rms_norm(rows, width, dtype, gemma, seed):
    """Bit for bit the sum; the norm and all gradients within the budget of the two steps."""
    x, residual = (random(seed + i, rows, width, scale=2).to(dtype) for i in range(2))
    w = random(seed + 2, width).to(dtype)
    options = {"weight_offset": float(gemma), "casting_mode": "gemma" if gemma else "llama"}
    within_budget(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5, **options)[0],
        lambda x, r, w: exact_norm((x + r), w, float(gemma)),
        (x, residual, w),
        # the sum is rounded to the dtype before it is normalized
        terms=2**21 * torch.finfo(dtype).eps * 16 * (float(gemma) + w.float()).abs().max(),
    )
    ours, reference = (
        run(lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5, **options), (x, residual, w), b)
        for b in ("triton", None)
    )
    assert torch.equal(ours[1], reference[1])
    assert torch.equal(ours[2], ours[3])  # one gradient for both


def test_rms_norm_of_a_frozen_weight_and_of_strided_rows():
    weight = random(1, 24)
    x = random(0, 2, 3, 48)[..., :24]
    grads = {}
    for backend in ("reference", "triton"):
        leaf = x.detach().requires_grad_()
        with on_triton(), kernels.use_backend(backend):
            kernels.rms_norm(leaf, weight, 1e-5).backward(torch.ones_like(leaf))
        grads[backend] = leaf.grad
    # fp32 sums of 24 values in another order
    assert torch.allclose(grads["triton"], grads["reference"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", [0, 16, 5])
def test_rms_norm_leaves_room(room):
    """The room is beside each row of the result; values and gradients are as without."""
    x, residual, weight = random(0, 2, 3, 24), random(1, 2, 3, 24), random(2, 24)
    found = []
    for wanted in (0, room):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        with on_triton():
            y = kernels.rms_norm(leaves[0], weight, 1e-5, room=wanted)
            z, total = kernels.add_rms_norm(*leaves, weight, 1e-5, room=wanted)
            assert y.stride() == z.stride() == (3 * (24 + wanted), 24 + wanted, 1)
            assert total.is_contiguous()
            grads = torch.autograd.grad((y + z + total).sum(), leaves)
        found.append([y, z, total, *grads])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


heads = st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 3)))  # B, T, Hq, Hk


def tables(B, T, half, seed):
    angle = random(seed, B, T, half, scale=5)
    return angle.cos(), angle.sin()


@settings(max_examples=25)
@given(heads, st.integers(1, 40), st.integers(0, 9), st.booleans(), st.booleans(), dtypes, seeds)
def test_rope(sizes, half, still, one_table, inplace, dtype, seed):
    """Views of one projection, as in a model; whole heads or the first values of each; over its
    operands or not.
    """
    B, T, q_heads, k_heads = sizes
    fused = random(seed, B, T, q_heads + k_heads, 2 * half + still).to(dtype)
    cos, sin = tables(1 if one_table else B, T, half, seed + 1)

    def turn(fused):
        fused = fused * 1  # that may be written to
        return kernels.rope(fused[:, :, :q_heads], fused[:, :, q_heads:], cos, sin, inplace=inplace)

    def exactly(fused):
        turned = exact_turn(fused, cos, sin)
        return turned[:, :, :q_heads], turned[:, :, q_heads:]

    within_budget(turn, exactly, (fused,), terms=8)


def test_rope_in_place_of_shared_memory():
    """Heads that are one in memory are turned once each."""
    cos, sin = tables(1, 3, 4, 1)
    one = random(0, 2, 3, 1, 8)
    for q, k in ((one, one), (one.expand(2, 3, 5, 8), random(2, 1, 3, 2, 8).expand(2, 3, 2, 8))):
        with kernels.use_backend("reference"):
            expected = kernels.rope(q, k, cos, sin)
        with on_triton():
            ours = kernels.rope(q, k, cos, sin, inplace=True)
        for a, b in zip(ours, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # one fp32 rounding, contracted


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_rope_of_heads_that_lie_apart(batch, inplace):
    """Heads before tokens in memory, or one token a row: the bits of tokens as rows."""
    cos, sin = tables(1, 3, 4, 1)
    wide = random(1, batch, 3, 7, 10)
    for q, k in (
        (random(2, batch, 2, 3, 10).transpose(1, 2), random(3, batch, 3, 3, 10).transpose(1, 2)),
        (wide[:, 1:2, :4], wide[:, 1:2, 4:]),
        (wide[:, :2, :4], wide[:, 1:, 4:]),
    ):
        T = q.shape[1]
        with on_triton():
            expected = kernels.rope(q.contiguous(), k.contiguous(), cos[:, :T], sin[:, :T])
            ours = kernels.rope(q, k, cos[:, :T], sin[:, :T], inplace=inplace)
        for operand, y, wanted in zip((q, k), ours, expected, strict=True):
            assert torch.equal(y, wanted)
            assert (y.data_ptr() == operand.data_ptr()) == inplace


def test_rope_in_place_tells_autograd():
    q = random(0, 1, 2, 3, 8).requires_grad_()
    cos, sin = tables(1, 2, 4, 1)
    with on_triton():
        kept = q * 1
        squared = kept.square()  # keeps what is about to be overwritten
        turned, _ = kernels.rope(kept, kept.detach().clone(), cos, sin, inplace=True)
        assert turned.data_ptr() == kept.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()


@settings(max_examples=25)
@given(
    heads, st.integers(1, 40), dtypes, st.sampled_from([0.0, 1.0]),
    st.sampled_from(["llama", "gemma"]), seeds,
)  # fmt: skip
def test_norm_rope(sizes, half, dtype, offset, casting_mode, seed):
    B, T, q_heads, k_heads = sizes
    q, k = (random(seed + n, B, T, n, 2 * half, scale=2).to(dtype) for n in (q_heads, k_heads))
    weights = [random(seed + i, 2 * half).to(dtype) for i in range(2)]
    cos, sin = tables(1, T, half, seed + 1)
    options = {"weight_offset": offset, "casting_mode": casting_mode}

    def exactly(q, k):
        return tuple(
            exact_turn(exact_norm(x, w.double(), offset), cos, sin)
            for x, w in zip((q, k), weights, strict=True)
        )

    slope = max(
        (x.double().square().mean(-1) + 1e-5).rsqrt().max() * (offset + w.double()).abs().max()
        for x, w in zip((q, k), weights, strict=True)
    )
    within_budget(
        lambda q, k: kernels.norm_rope(q, k, *weights, 1e-5, cos, sin, **options),
        exactly,
        (q, k),
        # the reference rounds to the dtype between the two steps, the kernel in forward only
        terms=8 * slope + 2**21 * torch.finfo(dtype).eps * slope,
    )


def test_norm_rope_of_a_trained_weight():
    q, weight = random(0, 1, 2, 3, 8), random(1, 8)
    cos, sin = tables(1, 2, 4, 1)

    def f(q, w):
        return kernels.norm_rope(q, q, w, w, 1e-5, cos, sin)

    for ours, expected in zip(run(f, (q, weight), "triton"), run(f, (q, weight)), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


@settings(max_examples=25)
@given(st.integers(1, 2500), dtypes, st.sampled_from(["silu", "tanh", "none"]), seeds)
def test_gated_activations(n, dtype, kind, seed):
    gate, up = random(seed, n, scale=3).to(dtype), random(seed + 1, n).to(dtype)

    def f(gate, up):
        if kind == "silu":
            return kernels.swiglu(gate, up)
        return kernels.geglu(gate, up, approximate=kind)

    def exactly(gate, up):
        if kind == "silu":
            return torch.nn.functional.silu(gate) * up
        return torch.nn.functional.gelu(gate, approximate=kind) * up

    within_budget(f, exactly, (gate, up), terms=4)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 1100), st.integers(0, 20), dtypes, seeds)
def test_gated_activations_of_rows_that_lie_apart(rows, width, room, dtype, seed):
    """gate and up in one memory, gradients in another: the bits of contiguous ones, and no other
    value is written.
    """
    both = random(seed, rows, 2 * width + room).to(dtype)
    gate, up = both[:, :width], both[:, width : 2 * width]
    grad = random(seed + 1, rows, width).to(dtype)
    into = torch.full_like(both, 7)
    with on_triton():
        y = swiglu.gated_beside(gate, up, "silu", room)
        expected = kernels.gated(gate.contiguous(), up.contiguous(), "silu")
        plain = [t.clone(memory_format=torch.contiguous_format) for t in (grad, gate, up)]
        kernels.gated_backward_(*plain, "silu")
        kernels.gated_backward_(
            grad, gate, up, "silu", (into[:, :width], into[:, width : 2 * width])
        )
    assert y.stride() == (width + room, 1)
    assert torch.equal(y, expected)
    assert torch.equal(
        torch.cat([into[:, : 2 * width], grad], 1), torch.cat([*plain[1:], plain[0]], 1)
    )
    assert (into[:, 2 * width :] == 7).all()


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 300), st.tuples(*[st.sampled_from([0, 3, 8, 24])] * 3),
    st.sampled_from([torch.bfloat16, torch.float16]), seeds,
)  # fmt: skip
def test_gated_activations_with_updates(rows, width, ranks, dtype, seed):
    """What is left to be added is added in fp32, as fp64 has it: y and the gradients are rounded
    once. The updates' columns lie beside each other, and so do the gradients.
    """
    grad, gate, up = (random(seed + i, rows, width, scale=2).to(dtype) for i in range(3))
    lows = random(seed + 3, rows, sum(ranks) + 5).to(dtype).split([*ranks, 5], dim=1)[:3]
    shapes = (ranks[0], width), (width, ranks[1]), (width, ranks[2])
    small = [random(seed + 4 + i, *shape).to(dtype) for i, shape in enumerate(shapes)]
    updates = [
        swiglu.Update(low, m) if m.numel() else None for low, m in zip(lows, small, strict=True)
    ]
    right = small[0], small[1].t(), small[2].t()
    whole = [
        t.double() + low.double() @ m.double()
        for t, low, m in zip((grad, gate, up), lows, right, strict=True)
    ]
    into = torch.full((rows, 2 * width + 3), 7, dtype=dtype, device=DEVICE)
    halves = into[:, :width], into[:, width : 2 * width]
    given = [t.clone() for t in (grad, gate, up)]
    with on_triton():
        y = swiglu.gated_beside(gate, up, "silu", 2, updates[1:]) if all(ranks[1:]) else None
        kernels.gated_backward_(*given, "silu", halves, updates)
    leaves = [t.requires_grad_() for t in whole[1:]]
    with kernels.use_backend("reference"):
        exact = kernels.gated(*leaves, "silu")
        truth = [exact, *torch.autograd.grad(exact, leaves, whole[0])]
    for ours, wanted in zip((given[0], *halves), truth, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * wanted.abs().max() + 2**-19
        assert (ours.double() - wanted).abs().max() <= rounding
    assert y is None or (torch.equal(y, given[0]) and y.stride() == (width + 2, 1))
    assert (into[:, 2 * width :] == 7).all()
    assert torch.equal(given[1], gate)
    assert torch.equal(given[2], up)


@settings(max_examples=15)
@given(st.integers(1, 2500), dtypes, st.sampled_from(ACTIVATIONS), seeds)
def test_gated_activations_backward_in_place(n, dtype, hidden_act, seed):
    """What forward and backward give stands over grad, gate and up, each rounded once."""
    grad, gate, up = (random(seed + i, n, scale=2).to(dtype) for i in range(3))
    given = [t.clone() for t in (grad, gate, up)]
    with on_triton():
        kernels.gated_backward_(*given, hidden_act)
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    with kernels.use_backend("reference"):
        y = kernels.gated(*leaves, hidden_act)
        truth = [y, *torch.autograd.grad(y, leaves, grad.double())]
        plain = [t.clone() for t in (grad, gate, up)]
        kernels.gated_backward_(*plain, hidden_act)
    for ours, same, exact in zip(given, plain, truth, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * exact.abs().max() + 2**-19
        assert (ours.double() - exact).abs().max() <= rounding
        assert (same.double() - exact).abs().max() <= 2 * rounding  # several roundings to dtype


def some_labels(rows, vocabulary, seed):
    """Make labels, of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < 0.3, -100).to(DEVICE)


def exact_loss(logits, labels, softcap, label_smoothing, z_loss, dft=False):
    """The definition: sum of lse - (1 - e) z_y - e mean(z) + a lse^2 over the labels that count.

    With dft each is weighed by exp(z_y - lse), a constant.
    """
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z, y = z[labels != -100], labels[labels != -100]
    lse, e = z.logsumexp(-1), label_smoothing
    chosen = z.gather(-1, y[:, None])[:, 0]
    loss = lse - (1 - e) * chosen - e * z.mean(-1) + z_loss * lse**2
    return ((chosen - lse).exp().detach() * loss if dft else loss).sum()


@settings(max_examples=25)
@given(
    st.integers(1, 5), st.integers(2, 9000), st.booleans(), st.sampled_from([None, 4.0, 30.0]),
    st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-3]), st.booleans(), dtypes, seeds,
)  # fmt: skip
def test_cross_entropy(rows, vocabulary, padded, cap, smoothing, z_loss, dft, dtype, seed):
    labels = some_labels(rows, vocabulary, seed)
    buffer = torch.full((rows, -(-vocabulary // 16) * 16), math.nan, dtype=dtype, device=DEVICE)
    logits = random(seed, rows, vocabulary, scale=4).to(dtype)

    def f(logits):
        if padded:  # rows that lie apart, and poison between them
            view = buffer.clone()[:, :vocabulary]
            logits = view.copy_(logits)
        return kernels.cross_entropy(logits, labels, **options)[0]

    options = {"softcap": cap, "label_smoothing": smoothing, "z_loss": z_loss, "dft": dft}
    exactly = partial(exact_loss, labels=labels, **options)

    within_budget(f, exactly, (logits,), terms=rows * 32)


@pytest.mark.parametrize(("V", "scale"), [(1, 1), (300, 0.1), (9001, 5), (9001, 40)])
def test_accuracy_and_entropy(V, scale):
    """They are added to what is there, and change no bit of the loss."""
    labels = some_labels(20, V, 0).to(DEVICE)
    logits = random(V, 20, V, scale=scale).to(DEVICE)
    logits[1::3, V // 3] = logits[1::3, V // 2] = 99.0  # equals, of which the first counts
    labels[1::3] = torch.tensor([V // 3, V // 2] * 3 + [-100], device=DEVICE)
    logits[2, : V // 2] = float("-inf")  # words that are ruled out
    labels[2] = logits[2].argmax()
    told = torch.tensor([1.0, 2.0], device=DEVICE)
    with interpreted(), kernels.use_backend("triton"):
        plain, _ = kernels.cross_entropy(logits, labels)
        loss, _ = kernels.cross_entropy(logits, labels, statistics=told)
    assert torch.equal(loss, plain)
    wide = logits[labels != -100].double()
    assert told[0] == 1 + (wide.argmax(-1) == labels[labels != -100]).sum()
    log_p = wide.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum().item()
    # 20 entropies of at most log V, each of some units of fp32
    assert told[1].item() == pytest.approx(2 + entropy, rel=4e-6, abs=4e-5)


def test_cross_entropy_writes_its_gradient_and_nothing_else():
    from lorakit.kernels.ops.cross_entropy import triton as ours
    from lorakit.kernels.ops.cross_entropy.linear import Form

    rows, vocabulary = 3, 37
    memory = torch.full((rows + 2, 64), 7.0, device=DEVICE)
    logits = memory[1:-1, :vocabulary]
    logits.copy_(random(0, rows, vocabulary))
    labels = torch.tensor([3, -100, 36], device=DEVICE)
    with on_triton():
        _, lse = ours.loss_and_lse(logits, labels, Form(), -100)
        ours.gradient(logits, labels, lse, torch.tensor(2.0, device=DEVICE), Form(), -100, logits)
    assert (memory[0] == 7).all()
    assert (memory[-1] == 7).all()
    assert (memory[1:-1, 48:] == 7).all()  # what lies after the padding to 16
    expected = random(0, rows, vocabulary).softmax(-1)
    expected[0, 3] -= 1
    expected[2, 36] -= 1
    expected[1] = 0
    # exp2 of a rounded product instead of exp
    assert torch.allclose(logits, 2 * expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=12)
@given(
    st.integers(1, 9), st.integers(2, 400), st.sampled_from([None, 5.0]), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-3]),
    st.booleans(), dtypes, seeds,
)  # fmt: skip
def test_linear_cross_entropy(
    rows, vocabulary, cap, packed, adapted, chosen, smoothing, z_loss, dft, dtype, seed
):
    labels = some_labels(rows, vocabulary, seed)
    hidden, head = random(seed, rows, 64).to(dtype), random(seed + 1, vocabulary, 64).to(dtype)
    if packed:
        q = kernels.quantize_nf4(head)
        head = kernels.dequantize_nf4(q)
    inputs = [hidden] if packed else [hidden, head]
    if adapted:
        inputs += [random(seed + 2, 3, 64, scale=0.1), random(seed + 3, vocabulary, 3)]

    def taken(inputs):
        inputs = list(inputs)
        lora = (*inputs[-2:], 0.5) if adapted else None
        return inputs[0], None if packed else inputs[1], lora

    def f(*inputs):
        hidden, weight, lora = taken(inputs)
        # all rows in another order, and those without a label do nothing
        order = torch.arange(rows, device=DEVICE).flip(0) if chosen else None
        return kernels.linear_cross_entropy(
            hidden, q if packed else weight, labels.flip(0) if chosen else labels, rows=order,
            lora=lora, softcap=cap,
            label_smoothing=smoothing, z_loss=z_loss, dft=dft,
        )[0]  # fmt: skip

    def exactly(*inputs):
        hidden, weight, lora = taken(inputs)
        weight = head.double() if packed else weight
        z = hidden @ (weight if lora is None else weight + 0.5 * lora[1] @ lora[0]).t()
        return exact_loss(z, labels, cap, smoothing, z_loss, dft)

    # the logits are rounded to the dtype, as a model's are: rows of |z| up to 40, and their slopes
    terms = rows * 40 * torch.finfo(dtype).eps * 2**21 * max(t.float().abs().max() for t in inputs)
    within_budget(f, exactly, inputs, terms=terms)


@settings(max_examples=40)
@given(
    st.integers(1, 9000), seeds, st.sampled_from(BLOCK_SIZES), st.booleans(), st.booleans(),
    st.booleans(), dtypes,
)  # fmt: skip
def test_nf4_equals_the_reference_bit_for_bit(
    n, seed, block_size, fp4, double_quant, search, dtype
):
    quantize = kernels.quantize_fp4 if fp4 else kernels.quantize_nf4
    options = {"block_size": block_size, "double_quant": double_quant, "search_scales": search}
    w = random(seed, n, scale=2.0 ** (seed % 40 - 20)).clamp(-60000, 60000).to(dtype)
    with kernels.use_backend("reference"):
        truth = quantize(w, **options)
    with on_triton():
        ours = quantize(w, **options)
    assert torch.equal(ours.codes, truth.codes)
    assert torch.equal(ours.absmax, truth.absmax)
    for out in DTYPES:
        with kernels.use_backend("reference"):
            expected = kernels.dequantize_nf4(truth, out)
        with on_triton():
            assert torch.equal(kernels.dequantize_nf4(truth, out), expected)


def run_ptx(code, words):
    """The registers $0 to $7 after the instructions of `code`, with $8 = words uint32 [n]."""
    registers = {"$8": words.astype(np.uint64)}

    def value(name):
        return registers[name] if name in registers else np.uint64(int(name, 0))

    for name, arguments in re.findall(r"(\w+\.b32|shr\.u32) ([^;]+);", code.partition("p3; ")[2]):
        target, *operands = arguments.split(", ")
        a, b, *rest = map(value, operands)
        if name == "and.b32":
            found = a & b
        elif name == "shr.u32":
            found = a >> b
        elif name == "lop3.b32":
            assert rest[1] == 0xCA  # a ? b : c, bit by bit
            found = (a & b) | (~a & rest[0] & np.uint64(0xFFFFFFFF))
        else:
            assert name == "prmt.b32"
            bytes_, found = a | (b << np.uint64(32)), np.uint64(0)
            for i in map(np.uint64, range(0, 32, 8)):
                nibble = (rest[0] >> (i >> np.uint64(1))) & np.uint64(15)
                assert (nibble < 8).all()  # from 8 on the sign would be spread
                byte = (bytes_ >> (nibble * np.uint64(8))) & np.uint64(255)
                found = found | (byte << i)
        registers[target] = found
    return [registers[f"${i}"].astype(np.uint32).view(np.float32) for i in range(8)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_look_up_in_ptx(quant_type):
    """Inline assembly is not interpreted: its instructions, carried out here, for all bytes in all
    four places, give the levels bit for bit.
    """
    from lorakit.kernels.ops.nf4.triton import ptx

    words = np.random.default_rng(0).permutation(2**16).astype(np.uint32)
    words = np.concatenate(
        [words | words[::-1] << 16, np.arange(256, dtype=np.uint32) * 0x01010101]
    )
    found = run_ptx(ptx(quant_type), words)
    table = np.array(LEVELS[quant_type], dtype=np.float32).view(np.uint32)
    for i in range(4):
        byte = (words >> (8 * i)) & 255
        assert (found[i].view(np.uint32) == table[byte >> 4]).all()
        assert (found[4 + i].view(np.uint32) == table[byte & 15]).all()


@settings(max_examples=15)
@given(
    st.integers(1, 9), st.integers(1, 6), st.sampled_from(BLOCK_SIZES[:4]), st.booleans(), dtypes,
    seeds,
)  # fmt: skip
def test_rows_of_nf4_bit_for_bit(N, blocks, block_size, double_quant, dtype, seed):
    w = random(seed, N, blocks * block_size)
    q = kernels.quantize_nf4(w, block_size=block_size, double_quant=double_quant)
    ids = torch.randint(N, (2, 3), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with on_triton(), guarded():
        ours = kernels.dequantize_rows(q, ids, dtype)
    assert torch.equal(ours, kernels.dequantize_nf4(q, dtype)[ids])


def test_a_row_that_is_not_there_is_nan():
    q = kernels.quantize_nf4(random(0, 10, 128))
    with on_triton():
        rows = kernels.dequantize_rows(q, torch.tensor([10, 3, -1], device=DEVICE))
    assert rows.isnan().all(1).tolist() == [True, False, True]


@settings(max_examples=30)
@given(
    st.integers(1, 40), st.integers(1, 140), st.integers(1, 5), st.sampled_from([32, 64, 256]),
    st.booleans(), st.booleans(), dtypes, seeds,
)  # fmt: skip
def test_products_of_few_rows(M, N, blocks, block_size, double_quant, with_bias, dtype, seed):
    """Straight from the packed weight, forward and backward; the truth has the dense weight."""
    x, bias = random(seed, M, blocks * block_size).to(dtype), random(seed + 1, N).to(dtype)
    w = random(seed + 2, N, blocks * block_size).to(dtype)
    q = kernels.quantize_nf4(w, block_size=block_size, double_quant=double_quant)
    dense = kernels.dequantize_nf4(q, torch.float32).double()
    inputs = (x, bias) if with_bias else (x,)
    few = frozen_linear.FewRows(1, 64)
    with mock.patch.dict(frozen_linear.FEW_ROWS, {(0, 0): few, (9, 0): few}, clear=True):
        within_budget(
            lambda x, b=None: kernels.frozen_linear(x, q, b),
            lambda x, b=None: torch.nn.functional.linear(x, dense, b),
            inputs,
            terms=4 * len(dense.flatten()) ** 0.5,  # fp32 sums in another order
        )


def test_long_sums_are_cut_into_parts():
    """And an x that is a view, in three dimensions."""
    q = kernels.quantize_nf4(random(0, 70, 4096))
    x = random(1, 2, 3, 8192)[..., ::2]
    ours, reference = (
        run(lambda x: kernels.frozen_linear(x, q), (x,), backend) for backend in ("triton", None)
    )
    for a, b in zip(ours, reference, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)  # fp32 sums of 4096 in another order


@pytest.mark.parametrize("backend", ["triton", None])
def test_products_of_no_rows(backend):
    q = kernels.quantize_nf4(random(0, 8, 128))
    for x in (random(1, 0, 128), random(1, 2, 0, 128)):
        y, grad = run(lambda x: kernels.frozen_linear(x, q), (x,), backend)
        assert (y.shape, grad.shape) == ((*x.shape[:-1], 8), x.shape)


def test_autocast_is_followed_whatever_the_rows():
    q = kernels.quantize_nf4(random(0, 8, 128))
    with on_triton(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        dtypes = {kernels.frozen_linear(random(1, M, 128), q).dtype for M in (1, 5, 40)}
    assert dtypes == {torch.bfloat16}


def test_which_products_take_the_packed_weight():
    narrow, odd = kernels.quantize_nf4(random(0, 8, 128)), kernels.quantize_nf4(random(0, 8, 96))
    with on_triton():
        assert max(frozen_linear.few_rows(random(0, 2, 128), narrow)) > 1
        assert max(frozen_linear.few_rows(random(0, 2, 96), odd)) == 0  # a block holds two rows
        assert max(frozen_linear.few_rows(random(0, 2, 128).double(), narrow)) == 0
        for capability, expected in {(7, 0): 0, (7, 5): 4, (8, 7): 64, (12, 1): 64}.items():
            with mock.patch.object(dispatch, "capability", return_value=capability):
                assert max(frozen_linear.few_rows(random(0, 2, 128), narrow)) == expected
        with mock.patch.object(dispatch, "compiles_to", return_value="amdgcn"):
            few = frozen_linear.few_rows(random(0, 2, 128), narrow)
            assert few == frozen_linear.FEW_ROWS_AMD
    with kernels.use_backend("reference"):
        assert max(frozen_linear.few_rows(random(0, 2, 128), narrow)) == 0


def test_an_unknown_option_raises_with_its_name():
    x = random(0, 2, 8)
    with on_triton():
        with pytest.raises(ValueError, match="casting_mode is 'bf16'"):
            kernels.rms_norm(x, x[0], 1e-5, casting_mode="bf16")
        with pytest.raises(ValueError, match="casting_mode is 'Llama'"):
            kernels.add_rms_norm(x, x, x[0], 1e-5, casting_mode="Llama")
        with pytest.raises(ValueError, match="hidden_act is 'relu'"):
            kernels.gated(x, x, "relu")
        with pytest.raises(ValueError, match="approximate is 'erf'"):
            kernels.geglu(x, x, approximate="erf")
        with pytest.raises(ValueError, match="block_size is 48"):
            kernels.quantize_nf4(x, block_size=48)


def test_the_guard_zones_see_what_they_should():
    with pytest.raises(AssertionError, match="beyond the end"), guarded(random(0, 5)) as (x,):
        torch.as_strided(x, (1,), (1,), x.storage_offset() + 5).fill_(1)
    with guarded():
        assert torch.empty((2, 3), dtype=torch.bfloat16, device=DEVICE).isnan().all()
    with pytest.raises(AssertionError, match="before the start"), guarded(random(0, 5)) as (x,):
        torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).fill_(1)
    with pytest.raises(AssertionError), guarded(random(0, 5)) as (x,):
        x[2] = 0


def test_nf4_refuses_nan():
    w = torch.ones(200, device=DEVICE)
    w[77] = math.nan
    with on_triton(), pytest.raises(ValueError, match="NaN or infinite"):
        kernels.quantize_nf4(w)


@pytest.mark.parametrize("blocked", [slice(0, 4096), slice(0, 4500), slice(4096, None)])
def test_cross_entropy_of_words_that_are_ruled_out(blocked):
    """-inf is a logit like any other, also where a whole piece of the row is nothing else."""
    logits = random(0, 2, 5000)
    logits[0, blocked] = -math.inf
    labels = torch.tensor([4600 if blocked.start == 0 else 5, 7], device=DEVICE)
    ours, reference = (
        run(lambda z: kernels.cross_entropy(z, labels)[0], (logits,), b) for b in ("triton", None)
    )
    for a, b in zip(ours, reference, strict=True):  # exp2 of a rounded product instead of exp
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [50, -1, 10**9])
def test_a_label_outside_of_the_vocabulary_is_nan(label):
    hidden, head = random(0, 4, 16), random(1, 50, 16)
    labels = torch.tensor([1, label, 3, -100], device=DEVICE)
    for f in (
        lambda h: kernels.cross_entropy(h @ head.t(), labels)[0],
        lambda h: kernels.linear_cross_entropy(h, head, labels)[0],
    ):
        loss, grad = run(f, (hidden,), "triton")
        assert loss.isnan()
        assert grad[1].isnan().all()
        assert grad[0].isfinite().all()


def test_labels_that_are_a_view():
    logits, labels = random(0, 4, 9), torch.arange(8, device=DEVICE)[::2]
    for chosen in (labels, torch.tensor(3, device=DEVICE).expand(4)):
        ours, reference = (
            run(lambda z, y=chosen: kernels.cross_entropy(z, y)[0], (logits,), backend)
            for backend in ("triton", None)
        )
        assert torch.allclose(ours[0], reference[0])


def test_shapes_that_broadcast_take_the_reference():
    x, weight = random(0, 4, 8), random(1, 8)
    q, table = random(2, 1, 3, 2, 8), random(3, 1, 1, 4)
    calls = [
        lambda: kernels.rms_norm(x, weight[:1], 1e-5),
        lambda: kernels.swiglu(x, weight),
        lambda: kernels.geglu(x, weight),
        lambda: kernels.add_rms_norm(x, weight, weight, 1e-5)[0],
        lambda: kernels.rope(q, q, table, table)[0],
        lambda: kernels.swiglu(x.bfloat16(), x),
    ]
    for call in calls:
        with on_triton():
            ours = call()
        with kernels.use_backend("reference"):
            expected = call()
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


def test_the_backend_holds_in_other_threads():
    """torch runs backward in threads of its own."""
    found = []
    with kernels.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: found.append(dispatch.pick(torch.device("cpu"), "cpu", "triton"))
        )
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_nf4_of_strided_parts():
    q = kernels.quantize_nf4(random(0, 1000), double_quant=False)
    apart = torch.zeros(2 * len(q.codes), dtype=torch.uint8, device=DEVICE)
    apart[::2] = q.codes
    strided = dataclasses.replace(q, codes=apart[::2])
    with on_triton():
        assert torch.equal(kernels.dequantize_nf4(strided), kernels.dequantize_nf4(q))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.integers(1, 1000), seeds)
def test_adamw(sizes, step, seed):
    """Three steps over many tensors, against fp64; what lies between them is not touched."""
    # a multiple of 16 values a row, so that all of them begin on 16 bytes
    memory = torch.full((4, sum(n // 16 * 16 + 64 for n in sizes) + 64), 7.0, device=DEVICE)
    places, start = [], 0
    for n in sizes:
        places.append(slice(start, start + n))
        start += -(-n // 16) * 16 + 16
    lists = [[row[place] for place in places] for row in memory]  # p, g, m, v
    for i, tensors in enumerate(lists):
        for j, t in enumerate(tensors):
            t.copy_(random(seed + 10 * i + j, len(t)))
    for v in lists[3]:
        v.abs_()
    assert fits(*lists, alignment=adamw.ALIGNMENT)
    exact = [[t.double() for t in tensors] for tensors in lists]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for t in range(step, step + 3):
        with on_triton():
            kernels.adamw_step(*lists, step=t, **options)
        for p, g, m, v in zip(*exact, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p.mul_(1 - 1e-3)
            p -= 1e-2 / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for ours, truth in zip(lists, exact, strict=True):
        for a, b in zip(ours, truth, strict=True):
            # three steps of a few fp32 roundings each; early steps divide by 1 - 0.999^t
            assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)
    assert all(t._version > 3 for t in lists[0] + lists[2] + lists[3])  # autograd sees the change
    inside = torch.zeros(memory.shape[1], dtype=torch.bool)
    for place in places:
        inside[place] = True
    assert (memory[:, ~inside] == 7).all()


def test_adamw_of_other_tensors_takes_the_reference():
    odd = torch.ones(9, device=DEVICE)[1:]  # not on 16 bytes
    lists = [[odd], *([torch.full((8,), x, device=DEVICE)] for x in (1.0, 0.0, 0.0))]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    with on_triton():
        kernels.adamw_step(*lists, step=1, **options)
    assert torch.allclose(odd, torch.full_like(odd, 0.99))


@pytest.mark.parametrize(
    ("family", "dtype", "targets"),
    [
        ("llama", "float32", r".*_proj|lm_head"),
        ("llama", "bfloat16", "all-linear"),
        ("qwen3", "float32", "all-linear"),  # normalizes its heads
        ("gemma3_text", "float32", ["q_proj", "down_proj"]),
    ],
)
def test_a_training_step_of_a_whole_model(tmp_path, family, dtype, targets):
    """QLoRA on a tiny model: loss and gradients of every adapter, kernel against reference."""
    import lorakit as lk

    tiny(family, tie_word_embeddings=family != "llama").save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = {}
    for backend in ("reference", "triton"):
        with on_triton(), kernels.use_backend(backend):
            model = lk.load_model(tmp_path, dtype=dtype, quantize="nf4", device=DEVICE)
            torch.manual_seed(1)
            lk.attach(model, lk.LoraConfig(r=4, target_modules=targets))
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    torch.nn.init.normal_(parameter, std=0.1)
            loss, count = model.loss(ids, ids)
            (loss / count).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[backend] = (loss.detach(), grads)
    (loss, grads), (expected, expected_grads) = found["triton"], found["reference"]
    # the reference rounds after every operation, the kernels once: a few roundings of bf16
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert torch.allclose(loss, expected, rtol=tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        difference = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert difference < tolerance, name
