"""The C++ kernels of the small ops against fp64 and against their references, for every instruction
set of this processor.

Error budget: |kernel - fp64| <= |reference - fp64| + 4 roundings of the largest value, and 2^-21 of
what may cancel inside, where fp32 sums run in another order.

Every tensor that a kernel gets or makes lies between guard zones of NaN, and is NaN before it is
written: a read beyond its end shows in the result, a write beyond it and a value left out fail.
"""

import contextlib
import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import Moment8bit, dispatch
from lorakit.kernels.ops.adamw.state import BLOCK, signed_map, unsigned_map
from lorakit.kernels.ops.swiglu import Activation
from tests.exact import exact_norm, exact_turn
from tests.instruction_sets import ISAS, on_cpu

pytestmark = pytest.mark.skipif(dispatch.library() is None, reason="the library was not built")

isas = st.sampled_from(ISAS)
ACTIVATIONS = list(Activation.__members__)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
modes = st.sampled_from([(0.0, "llama"), (1.0, "llama"), (0.0, "gemma"), (1.0, "gemma")])
seeds = st.integers(0, 2**31)
ZONE = 64  # bytes on either side
CPU = torch.device("cpu")


def random(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def fenced(shape, dtype, buffers, allocate=torch.empty):
    size = math.prod(shape) * dtype.itemsize
    buffer = allocate(size + 2 * ZONE, dtype=torch.uint8).fill_(255)  # NaN in every dtype
    buffers.append((buffer, size))
    return buffer[ZONE : ZONE + size].view(dtype).view(shape)


@contextlib.contextmanager
def guarded(*inputs):
    """Yields copies of the inputs between guard zones; so is what the kernels allocate inside.
    Raises if a zone or an input has changed.
    """
    buffers, allocate = [], torch.empty
    copies = [fenced(t.shape, t.dtype, buffers).copy_(t) for t in inputs]

    def empty(*shape, dtype=torch.float32, device="cpu"):
        assert str(device) == "cpu"
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        return fenced(tuple(shape), dtype, buffers, allocate)

    def like(t):
        return fenced(t.shape, t.dtype, buffers, allocate)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", like):
        yield copies
    for buffer, size in buffers:
        assert (buffer[:ZONE] == 255).all(), "written before the start of a tensor"
        assert (buffer[ZONE + size :] == 255).all(), "written beyond the end of a tensor"
    for before, after in zip(inputs, copies, strict=True):
        same = before.equal(after) or before.numel() == 0
        assert same, "an input has changed"


def value_and_grads(f, inputs):
    """Outputs of f and the gradients of its inputs, for fixed gradients of the outputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    given = [random(i, *y.shape).to(y.dtype) for i, y in enumerate(out)]
    return [*out, *torch.autograd.grad(out, inputs, given)]


def within_budget(isa, f, exactly, inputs, terms=0.0):
    """`exactly`: f in fp64. `terms`: the size of what may cancel inside, in fp32."""
    with on_cpu(isa), guarded(*inputs) as copies:
        ours = value_and_grads(f, copies)
        again = value_and_grads(f, copies)
    with kernels.use_backend("reference"):
        reference = value_and_grads(f, inputs)
    truth = value_and_grads(exactly, [t.double() for t in inputs])
    for y, twice, same, exact in zip(ours, again, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        assert torch.equal(y, twice)
        if y.numel():
            rounding = 4 * torch.finfo(y.dtype).eps * exact.abs().max() + 2**-21 * terms
            allowed = (same.double() - exact).abs().max() + rounding
            assert (y.double() - exact).abs().max() <= allowed


def called(module, name):
    """Counts the calls of the C++ function, so that a test sees which backend ran."""
    return mock.patch.object(module, name, wraps=getattr(module, name))


# ---- rms_norm -----------------------------------------------------------------------------------


def slope(x, w, offset):
    """The largest factor between a value and its norm."""
    factor = (x.double().square().mean(-1) + 1e-5).rsqrt() if x.numel() else torch.ones(1)
    return factor.max().item() * (offset + w.double()).abs().max().item()


@settings(max_examples=60)
@given(isas, st.integers(0, 70), st.integers(1, 300), dtypes, modes, st.booleans(), seeds)
def test_rms_norm(isa, rows, width, dtype, mode, frozen, seed):
    offset, casting_mode = mode
    x, w = random(seed, rows, width, scale=3).to(dtype), random(seed + 1, width).to(dtype)
    options = {"weight_offset": offset, "casting_mode": casting_mode}
    # dw is the sum over all rows of values near 3 times the norm
    terms = 4 * slope(x, w, offset) + (0 if frozen else math.sqrt(rows) * 4)

    def norm(x, *weight):
        return kernels.rms_norm(x, *(weight or (w,)), 1e-5, **options)

    def exactly(x, *weight):
        return exact_norm(x, *(weight or (w.double(),)), offset)

    within_budget(isa, norm, exactly, (x,) if frozen else (x, w), terms)


@settings(max_examples=40)
@given(isas, st.integers(0, 5), st.integers(1, 300), dtypes, modes, seeds)
def test_add_rms_norm(isa, rows, width, dtype, mode, seed):
    """Bit for bit the sum; the norm and all gradients within the budget of the two steps."""
    offset, casting_mode = mode
    x, residual = (random(seed + i, rows, width, scale=2).to(dtype) for i in range(2))
    w = random(seed + 2, width).to(dtype)
    options = {"weight_offset": offset, "casting_mode": casting_mode}
    # the sum is rounded to the dtype before it is normalized; its values are below 16
    rounding = 2**21 * torch.finfo(dtype).eps * 16 * slope(x + residual, w, offset)
    within_budget(
        isa,
        lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5, **options)[0],
        lambda x, r, w: exact_norm(x + r, w, offset),
        (x, residual, w),
        terms=rounding,
    )

    def both(x, r):
        return kernels.add_rms_norm(x, r, w, 1e-5, **options)

    with on_cpu(isa):
        _, total, dx, dresidual = value_and_grads(both, (x, residual))
        normalized = kernels.rms_norm(total.detach(), w, 1e-5, **options)
        assert torch.equal(both(x, residual)[0], normalized)
    assert torch.equal(total, x + residual)
    assert torch.equal(dx, dresidual)  # one gradient for both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_sum_joins_that_of_the_norm(dtype):
    x, residual, w = (random(i, *s).to(dtype) for i, s in enumerate([(3, 40), (3, 40), (40,)]))

    def both(x, r):
        return kernels.add_rms_norm(x, r, w, 1e-5)

    def exactly(x, r):
        return exact_norm(x + r, w.double(), 0.0), x + r

    # the sum is rounded to the dtype before it is normalized; its values are below 8
    terms = 2**21 * torch.finfo(dtype).eps * 8 * slope(x + residual, w, 0.0)
    within_budget(ISAS[-1], both, exactly, (x, residual), terms)


def test_strided_rows_and_gradients():
    """Rows of a wider tensor are read where they lie; other strides, and those of gradients that
    autograd expands, are copied.
    """
    wide, w = random(0, 2, 3, 48), random(1, 24)
    for x in (wide[..., :24], wide[:, :, ::2], wide.transpose(0, 2)[:24].transpose(0, 2)):
        found = []
        for backend in ("cpu", "reference"):
            leaf = x.detach().requires_grad_()
            with kernels.use_backend(backend):
                y = kernels.rms_norm(leaf, w, 1e-5)
                y.sum().backward()
            found.append((y, leaf.grad))
        for ours, reference in zip(*found, strict=True):
            # fp32 sums of 24 values in another order
            assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-6)


# ---- rope ---------------------------------------------------------------------------------------

sizes = st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 3)))  # B, T, Hq, Hk


def tables(B, T, half, seed):
    angle = random(seed, B, T, half, scale=5)
    return angle.cos(), angle.sin()


@settings(max_examples=60)
@given(
    isas, sizes, st.integers(1, 40), st.integers(0, 9), st.booleans(), st.booleans(), dtypes, seeds
)
def test_rope(isa, shape, half, still, one_table, inplace, dtype, seed):
    """Views of one projection, as in a model; whole heads or the first values of each; over its
    operands or not.
    """
    B, T, q_heads, k_heads = shape
    fused = random(seed, B, T, q_heads + k_heads, 2 * half + still).to(dtype)
    cos, sin = tables(1 if one_table else B, T, half, seed + 1)

    def turn(fused):
        fused = fused * 1  # that may be written to
        return kernels.rope(fused[:, :, :q_heads], fused[:, :, q_heads:], cos, sin, inplace=inplace)

    def exactly(fused):
        turned = exact_turn(fused, cos, sin)
        return turned[:, :, :q_heads], turned[:, :, q_heads:]

    within_budget(isa, turn, exactly, (fused,), terms=8)  # sums of two products of values below 8


def test_rope_in_place_tells_autograd_and_spares_shared_memory():
    q = random(0, 1, 2, 3, 8).requires_grad_()
    cos, sin = tables(1, 2, 4, 1)
    with on_cpu():
        kept = q * 1
        squared = kept.square()  # keeps what is about to be overwritten
        turned, _ = kernels.rope(kept, kept.detach().clone(), cos, sin, inplace=True)
        assert turned.data_ptr() == kept.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()
        same = q.detach().clone()
        a, b = kernels.rope(same, same, cos, sin, inplace=True)  # once for each
        assert torch.equal(a, b)
        assert torch.equal(a, turned)


@settings(max_examples=30)
@given(isas, sizes, st.integers(1, 40), dtypes, modes, seeds)
def test_norm_rope(isa, shape, half, dtype, mode, seed):
    B, T, q_heads, k_heads = shape
    q, k = (random(seed + n, B, T, n, 2 * half, scale=2).to(dtype) for n in (q_heads, k_heads))
    weights = [random(seed + i, 2 * half).to(dtype) for i in range(2)]
    cos, sin = tables(1, T, half, seed + 1)
    options = {"weight_offset": mode[0], "casting_mode": mode[1]}

    def exactly(q, k):
        return tuple(
            exact_turn(exact_norm(x, w.double(), mode[0]), cos, sin)
            for x, w in zip((q, k), weights, strict=True)
        )

    def fused(q, k):
        return kernels.norm_rope(q, k, *weights, 1e-5, cos, sin, **options)

    def one_by_one(q, k):
        heads = (
            kernels.rms_norm(x, w, 1e-5, **options) for x, w in zip((q, k), weights, strict=True)
        )
        return kernels.rope(*heads, cos, sin)

    with on_cpu(isa):
        found = [value_and_grads(f, (q, k)) for f in (fused, one_by_one)]
    # backward the two round to the dtype in between
    for i in range(4 if dtype == torch.float32 else 2):
        assert torch.equal(found[0][i], found[1][i])

    steepest = max(slope(x, w, mode[0]) for x, w in zip((q, k), weights, strict=True))
    within_budget(
        isa,
        fused,
        exactly,
        (q, k),
        # both round to the dtype between the two steps, where the sums may fall on either side
        terms=8 * steepest + 2**21 * torch.finfo(dtype).eps * steepest,
    )


def test_norm_rope_of_views_and_of_what_it_does_not_fuse():
    """Heads of one projection are read where they lie; a trained weight, one of another dtype and
    wide heads take the two ops.
    """
    from lorakit.kernels.ops.rope import cpu

    for D, dtype, trained, calls in (
        (16, torch.float32, False, 1),
        (16, torch.float32, True, 0),
        (16, torch.bfloat16, False, 0),
        (1026, torch.float32, False, 0),
    ):
        both = random(0, 2, 3, 5, D)
        q, k = both[:, :, :3], both[:, :, 3:]
        weights = [random(i, D).to(dtype).requires_grad_(trained) for i in (1, 2)]
        cos, sin = tables(1, 3, D // 2, 3)
        with on_cpu(), called(cpu, "head_norms") as fused:
            turned = kernels.norm_rope(q, k, *weights, 1e-5, cos, sin)
        assert fused.call_count == calls
        for x, w, y in zip((q, k), weights, turned, strict=True):
            exact = exact_turn(exact_norm(x.double(), w.double(), 0.0), cos, sin)
            # fp32 inside, a few roundings of values below 16
            assert (y - exact).abs().max() <= 2**-24 * 6 * 16


# ---- gated activations --------------------------------------------------------------------------


def exact_activation(z, hidden_act):
    if hidden_act == "silu":
        return z * torch.sigmoid(z)
    if hidden_act == "gelu":
        return z * 0.5 * torch.special.erfc(-z / 2**0.5)
    if hidden_act == "swiglu_oai":
        return z.clamp(max=7) * torch.sigmoid(1.702 * z.clamp(max=7))
    u = (2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)
    return z * torch.sigmoid(2 * u)


def exact_other(up, hidden_act):
    return up.clamp(-7, 7) + 1 if hidden_act == "swiglu_oai" else up


@settings(max_examples=60)
@given(
    isas, st.integers(0, 200), dtypes, st.sampled_from(ACTIVATIONS),
    st.sampled_from([0.01, 1.0, 10.0]), seeds,
)  # fmt: skip
def test_gated(isa, n, dtype, hidden_act, scale, seed):
    gate, up = (random(seed + i, n, scale=scale).to(dtype) for i in range(2))
    within_budget(
        isa,
        lambda gate, up: kernels.gated(gate, up, hidden_act),
        lambda gate, up: exact_activation(gate, hidden_act) * exact_other(up, hidden_act),
        (gate, up),
    )


@settings(max_examples=40)
@given(isas, st.integers(0, 200), dtypes, st.sampled_from(ACTIVATIONS), seeds)
def test_gated_backward_in_place(isa, n, dtype, hidden_act, seed):
    """The bits of forward and backward, over grad, gate and up."""
    grad, gate, up = (random(seed + i, n, scale=3).to(dtype) for i in range(3))
    with on_cpu(isa), guarded() as _:
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        y = kernels.gated(*leaves, hidden_act)
        expected = [y, *torch.autograd.grad(y, leaves, grad)]
        twice, into = grad.clone(), (torch.empty_like(gate), torch.empty_like(up))
        kernels.gated_backward_(twice, gate, up, hidden_act, into)
        kernels.gated_backward_(grad, gate, up, hidden_act)
    for one, other in zip((twice, *into), (grad, gate, up), strict=True):
        assert torch.equal(one, other)
    for ours, same in zip((grad, gate, up), expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("isa", ISAS)
def test_silu_is_good_to_three_ulp(isa):
    """Wherever the value is a normal number: a rounding each of e^-|z|, of the numerator, of the
    denominator and of the quotient. The largest found is 2.7; torch's is 2.3.
    """
    z = torch.linspace(-85, 85, 100_003)
    exact = exact_activation(z.double(), "silu")
    with on_cpu(isa):
        ours = kernels.gated(z, torch.ones_like(z), "silu")
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((ours.double() - exact).abs() / ulp).max() <= 3


@pytest.mark.parametrize("isa", ISAS)
def test_swiglu_oai_at_its_bounds(isa):
    """Values stop at 7, where slopes of 7 itself still count and those beyond are 0."""
    at = torch.tensor([-1e30, -8.0, -7.0, 0.0, 7.0, 7.5, 1e30, math.inf])
    gate, up = at.repeat_interleave(8).requires_grad_(), at.repeat(8).requires_grad_()
    found = []
    for way in (on_cpu(isa), kernels.use_backend("reference")):
        with way:
            y = kernels.gated(gate, up, "swiglu_oai")
            found.append([y, *torch.autograd.grad(y.sum(), (gate, up))])
    for ours, same in zip(*found, strict=True):
        assert torch.allclose(ours, same, rtol=1e-6, atol=1e-30)
    with on_cpu(isa):
        nan = torch.tensor([math.nan, 1.0])
        assert kernels.gated(nan, nan.flip(0), "swiglu_oai").isnan().all()


@pytest.mark.parametrize("hidden_act", [act for act in ACTIVATIONS if act != "swiglu_oai"])
def test_activations_of_extreme_values(hidden_act):
    """The value and slope of huge gates are those of the identity, or 0; NaN stays NaN."""
    gate = torch.tensor([-1e30, -1e4, -0.0, 0.0, 1e4, 1e30, math.nan]).requires_grad_()
    with on_cpu():
        y = kernels.gated(gate, torch.ones_like(gate), hidden_act)
        (slopes,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(y[:6], torch.tensor([0, 0, 0, 0, 1e4, 1e30]))
    # one rounding of 1/2; the others exactly
    assert (slopes[:6] - torch.tensor([0, 0, 0.5, 0.5, 1, 1])).abs().max() <= 2**-24
    assert y[6].isnan()
    assert slopes[6].isnan()


# ---- cross_entropy ------------------------------------------------------------------------------


def exact_loss(z, labels, softcap=None, label_smoothing=0.0, z_loss=0.0, dft=False):
    """Written out, in fp64."""
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    kept = labels != -100
    z, lse = z[kept], z[kept].logsumexp(-1)
    chosen = z.gather(-1, labels[kept][:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * chosen - label_smoothing * z.mean(-1) + z_loss * lse**2
    return ((chosen - lse).exp().detach() * losses if dft else losses).sum()


forms = st.fixed_dictionaries(
    {
        "softcap": st.none() | st.floats(0.5, 30),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "dft": st.booleans(),
    }
)


@settings(max_examples=60)
@given(
    isas, st.integers(0, 9), st.sampled_from([1, 7, 8, 40, 333, 4096, 4097, 9001]), dtypes, forms,
    st.floats(0, 1), st.sampled_from([0.1, 1.0, 30.0]), seeds,
)  # fmt: skip
def test_cross_entropy(isa, rows, V, dtype, form, ignored, scale, seed):
    """The rows lie apart, and are cut into pieces of 4096 and a rest of any length."""
    wide = random(seed, rows, V + 3, scale=scale).to(dtype)
    labels = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[random(seed + 1, rows) < 4 * ignored - 2] = -100
    # the log-sum-exp and the label's logit, of either sign, for every row
    terms = (1 + form["z_loss"] * 60) * 120 * scale * rows if wide.numel() else 0.0
    within_budget(
        isa,
        lambda wide: kernels.cross_entropy(wide[:, :V], labels, **form)[0],
        lambda wide: exact_loss(wide[:, :V], labels, **form),
        (wide,),
        terms=0.05 * terms,
    )


@settings(max_examples=60)
@given(
    isas, st.integers(1, 9), st.sampled_from([1, 7, 40, 4097, 9001]), dtypes, forms,
    st.sampled_from([0.1, 1.0, 30.0]), seeds,
)  # fmt: skip
def test_loss_and_gradient_of_a_chunk(isa, rows, V, dtype, form, scale, seed):
    """It lies in the memory of the logits, and has the bits of the op that keeps them."""
    from lorakit.kernels.ops.cross_entropy import cpu
    from lorakit.kernels.ops.cross_entropy.linear import Form

    logits = random(seed, rows, V, scale=scale).to(dtype)
    labels = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(seed))
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with on_cpu(isa), guarded():
        loss, _ = kernels.cross_entropy(leaf, labels, **form)
        (same,) = torch.autograd.grad(loss, leaf)
        given = torch.empty_like(logits).copy_(logits)
        alone = cpu.loss_and_gradient(given, labels, Form(**form), False, -100)
        assert torch.equal(given, logits)
        chunk = cpu.loss_and_gradient(given, labels, Form(**form), True, -100)
    assert torch.equal(chunk, loss)
    assert torch.equal(alone, loss)
    assert torch.equal(given, same)
    truth = exact_loss(exact, labels, **form)
    (expected,) = torch.autograd.grad(truth, exact)
    # fp32 inside: z - lse is rounded, as are lse itself and its square; then one rounding
    lse = 1 + exact.abs().max().item() + math.log(V)
    allowed = (
        torch.finfo(dtype).eps * expected.abs().max() + 2**-22 * (2 + form["z_loss"] * lse) * lse
    )
    assert (given.double() - expected).abs().max() <= allowed


def test_masked_words_and_a_label_that_is_none():
    """A logit of -inf has probability 0, also where it fills a whole piece."""
    z, labels = random(0, 2, 9000), torch.tensor([8999, -100])
    z[:, :5000] = -math.inf
    exact = torch.logsumexp(z[0, 5000:].double(), 0) - z[0, 8999]
    leaf = z.requires_grad_()
    with on_cpu():
        total, count = kernels.cross_entropy(leaf, labels)
        total.backward()
        assert count == 1
        assert abs(total - exact) <= 1e-6 * exact  # one rounding of the sum
        assert (leaf.grad[0, :5000] == 0).all()
        assert (leaf.grad[1] == 0).all()
        with pytest.raises(IndexError, match="label 9000 is outside of the vocabulary of 9000"):
            kernels.cross_entropy(z, torch.tensor([9000, 1]))
        with pytest.raises(IndexError, match="label -1 "):
            kernels.linear_cross_entropy(random(1, 1, 4), random(2, 9, 4), torch.tensor([-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_cross_entropy(dtype, softcap):
    """The truth is fp64 of the same bf16 values; there are two chunks."""
    hidden, weight = random(0, 9, 32).to(dtype), random(1, 300, 32).to(dtype)
    labels = torch.randint(300, (9,), generator=torch.Generator().manual_seed(0))

    def loss(hidden, weight):
        return kernels.linear_cross_entropy(hidden, weight, labels, softcap=softcap)[0]

    def exactly(hidden, weight):
        return exact_loss(hidden @ weight.t(), labels, softcap)

    from lorakit.kernels.ops.cross_entropy import linear

    with mock.patch.multiple(linear, CHUNK_BYTES=4 * 5 * 300, FEWEST=1):
        with on_cpu():
            ours = value_and_grads(loss, (hidden, weight))
        with kernels.use_backend("reference"):
            same = value_and_grads(loss, (hidden, weight))
    truth = value_and_grads(exactly, (hidden.double(), weight.double()))
    for y, reference, exact in zip(ours, same, truth, strict=True):
        # logits up to 30 and their gradients may be kept in the dtype of the hidden states
        allowed = 2 * (reference.double() - exact).abs().max()
        allowed += 2 * torch.finfo(dtype).eps * (30 if y.dim() else exact.abs().max())
        assert (y.double() - exact).abs().max() <= allowed


# ---- adamw --------------------------------------------------------------------------------------

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
lengths = st.lists(st.integers(0, 700) | st.integers(8100, 8500), min_size=1, max_size=4)


def scattered(sizes, dtype, fill):
    """Tensors of these sizes that begin anywhere in one memory, and what lies between them."""
    memory = torch.full((sum(sizes) + 7 * len(sizes) + 7,), fill, dtype=dtype)
    between, tensors, start = torch.ones(len(memory), dtype=torch.bool), [], 7
    for n in sizes:
        between[start : start + n] = False
        tensors.append(memory[start : start + n])
        start += n + 7
    return tensors, memory, between


def gradients(seed, sizes, decades):
    """Normal numbers times sizes spread evenly over so many decades."""
    return [
        random(seed + i, n)
        * 10 ** (-decades * torch.rand(n, generator=torch.Generator().manual_seed(seed + i)))
        for i, n in enumerate(sizes)
    ]


@settings(max_examples=30)
@given(isas, lengths, st.integers(1, 1000), st.floats(0, 6), seeds)
def test_adamw(isa, sizes, t, decades, seed):
    """A step of tensors that begin anywhere, against fp64. The moments are the reference's bit for
    bit where torch rounds a product and its sum in one, as the kernel does; its square root may be
    off by one unit in the last place, so p is held to the maths alone.
    """
    lists = [scattered(sizes, torch.float32, 7.0) for _ in range(4)]
    p, g, m, v = (tensors for tensors, _, _ in lists)
    torch._foreach_copy_(p, gradients(seed, sizes, 0))
    torch._foreach_copy_(g, gradients(seed + 10, sizes, decades))
    torch._foreach_copy_(m, gradients(seed + 20, sizes, decades))
    torch._foreach_copy_(v, torch._foreach_pow(gradients(seed + 30, sizes, decades), 2))
    before = [[x.clone() for x in tensors] for tensors in (p, g, m, v)]
    same = [[x.clone() for x in tensors] for tensors in (p, g, m, v)]
    with on_cpu(isa):
        kernels.adamw_step(p, g, m, v, step=t, **ADAMW)
    with kernels.use_backend("reference"):
        kernels.adamw_step(*same, step=t, **ADAMW)
    fused = isa != "scalar"
    fused &= torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for i in range(len(sizes)):
        old_p, old_g, old_m, old_v = (tensors[i].double() for tensors in before)
        new_m, new_v = 0.9 * old_m + 0.1 * old_g, 0.999 * old_v + 0.001 * old_g.square()
        terms = 0.9 * old_m.abs() + 0.1 * old_g.abs()  # of new_m, which may cancel
        rate = 1e-2 / (1 - 0.9**t) / ((new_v / (1 - 0.999**t)).sqrt() + 1e-8)
        new_p = old_p * (1 - 1e-3) - rate * new_m
        # the betas are fp32 numbers: one rounding, and three of the products and the sum
        assert ((m[i] - new_m).abs() <= 2**-22 * terms).all()
        assert ((v[i] - new_v).abs() <= 2**-22 * new_v).all()
        # these, and a dozen more of the quotient, the difference and v's root
        assert ((p[i] - new_p).abs() <= 2**-20 * (old_p.abs() + rate * terms)).all()
        assert torch.equal(g[i], before[1][i])
        if fused:
            assert torch.equal(m[i], same[2][i])
            assert torch.equal(v[i], same[3][i])
    assert all((memory[between] == 7).all() for _, memory, between in lists)


def of_8bit(sizes):
    """Moments of nothing, whose tensors begin anywhere, and all memories with what lies between."""
    codes, scales = (
        scattered(lengths, dtype, 7)
        for lengths, dtype in (
            (sizes, torch.uint8),
            ([-(-n // BLOCK) for n in sizes], torch.float32),
        )
    )
    for part in (*codes[0], *scales[0]):
        part.zero_()
    return [Moment8bit(*parts) for parts in zip(codes[0], scales[0], strict=True)], (codes, scales)


def both_8bit(isa, p, grads, m, v, t):
    """A step for each list of gradients by the kernel, and by the reference beside it."""
    for i, g in enumerate(grads):
        q = [x.clone() for x in p]
        m_too, v_too = ([Moment8bit(*map(torch.clone, x)) for x in moments] for moments in (m, v))
        before = [x.clone() for x in p]
        with on_cpu(isa):
            kernels.adamw_step_8bit(p, g, m, v, step=t + i, **ADAMW)
        with kernels.use_backend("reference"):
            kernels.adamw_step_8bit(q, g, m_too, v_too, step=t + i, **ADAMW)
        for ours, same in zip((*m, *v), (*m_too, *v_too), strict=True):
            assert torch.equal(ours.codes, same.codes)
            assert torch.allclose(ours.absmax, same.absmax, rtol=0, atol=0, equal_nan=True)
        for ours, same, old in zip(p, q, before, strict=True):
            # torch's square root may be off by one unit in the last place, 2^-23. Four operations
            # after it then round another number: 2^-24 each
            allowed = 1.5 * 2**-22 * (same.abs() + (old - same).abs())
            off = (ours - same).abs() > allowed
            assert not off.any()
            assert torch.equal(ours.isfinite(), same.isfinite())


@settings(max_examples=30)
@given(isas, lengths, st.integers(1, 1000), st.floats(0, 7), seeds)
def test_adamw_8bit(isa, sizes, t, decades, seed):
    """The state is the reference's bit for bit, of tensors that begin anywhere."""
    p, p_memory, p_between = scattered(sizes, torch.float32, 7.0)
    torch._foreach_copy_(p, gradients(seed, sizes, 0))
    (m, of_m), (v, of_v) = of_8bit(sizes), of_8bit(sizes)
    grads = gradients(seed + 10, sizes, decades)
    # the second takes m back to next to nothing, the smallest absmax there is
    both_8bit(isa, p, [grads, [-0.9 * g for g in grads], grads], m, v, t)
    assert (p_memory[p_between] == 7).all()
    for _, memory, between in (*of_m, *of_v):
        assert (memory[between] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf, -math.inf])
def test_adamw_8bit_of_a_gradient_that_is_not_finite(isa, number):
    """A whole block and a short one are lost from the next step on."""
    p, grads = [random(0, 700)], [[random(i, 700)] for i in range(1, 4)]
    grads[0][0][[300, 600]] = number
    both_8bit(isa, p, grads, [Moment8bit.zeros(700, CPU)], [Moment8bit.zeros(700, CPU)], 1)
    assert p[0].isfinite().tolist() == [True] * 256 + [False] * 444


@pytest.mark.parametrize("isa", ISAS)
def test_codes_around_every_edge(isa):
    """The moments are g and its square: betas are 0. g goes over every edge and level, the root of
    every one of v's, and the four numbers on either side of each, beside a 1 in every block.
    """
    signed, unsigned = signed_map(CPU), unsigned_map(CPU)
    at = [signed.edges[1:], signed.levels, unsigned.edges[1:].sqrt(), unsigned.levels.sqrt()]
    numbers = [torch.cat(at)]
    for end in (-math.inf, math.inf):
        x = numbers[0]
        for _ in range(4):
            x = x.nextafter(torch.full_like(x, end))
            numbers.append(x)
    numbers = torch.cat(numbers)
    numbers = torch.cat([numbers, -numbers]).clamp(-1, 1)
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % 255)).view(-1, 255)
    g = torch.nn.functional.pad(blocks, (1, 0), value=1.0).view(-1)
    m, v = (Moment8bit.zeros(len(g), CPU) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.0}
    with on_cpu(isa):
        kernels.adamw_step_8bit([torch.zeros_like(g)], [g], [m], [v], step=1, **options)
    assert torch.equal(m.codes.long(), torch.bucketize(g, signed.edges[1:]))
    assert torch.equal(v.codes.long(), torch.bucketize(g * g, unsigned.edges[1:]))
    for codes, count in ((m.codes, 256), (v.codes, 256)):
        assert len(codes.unique()) == count  # every code was asked for


# ---- what the kernels do not take ---------------------------------------------------------------


def test_which_backend_runs():
    """fp32 and bf16 by the kernels, everything else by the reference, as by use_backend."""
    from lorakit.kernels.ops.cross_entropy import cpu as cross_entropy
    from lorakit.kernels.ops.rms_norm import cpu as rms_norm
    from lorakit.kernels.ops.rope import cpu as rope
    from lorakit.kernels.ops.swiglu import cpu as swiglu

    def ops(x, w):
        q = x.view(1, 2, 2, 8)
        return {
            rms_norm: lambda: kernels.rms_norm(x, w, 1e-5),
            rope: lambda: kernels.rope(q, q, *tables(1, 2, 4, 0)),
            swiglu: lambda: kernels.swiglu(x, x),
            cross_entropy: lambda: kernels.cross_entropy(x, torch.tensor([1, 2])),
        }

    x, w = random(0, 2, 16), random(1, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for module, op in ops(x.to(dtype), w.to(dtype)).items():
            with called(module, "run") as run:
                op()
                ours = run.call_count
                with kernels.use_backend("reference"):
                    op()
            taken = dtype in (torch.float32, torch.bfloat16)
            assert (ours, run.call_count) == (taken, taken), (module, dtype)
    with called(rms_norm, "run") as run:
        assert kernels.rms_norm(x.bfloat16(), w, 1e-5).dtype == torch.bfloat16
        assert run.call_count == 0


def test_which_optimizer_runs():
    """The kernel for what is fp32, dense and in host memory, wherever it begins; the reference for
    the others of a list, one by one.
    """
    from lorakit.kernels.ops.adamw import cpu

    wide = random(0, 2, 601)

    def steps(p, g):
        lists = [random(1, 300), p], [random(2, 300), g]
        state = [[torch.zeros(x.shape) for x in lists[0]] for _ in range(2)]
        kernels.adamw_step(*lists, *state, step=1, **ADAMW)
        state = [[Moment8bit.zeros(x.numel(), CPU) for x in lists[0]] for _ in range(2)]
        kernels.adamw_step_8bit(*lists, *state, step=1, **ADAMW)

    for p, g, taken in (
        (wide[0, :600], wide[1, 1:], 2),
        (wide[0, :600].bfloat16(), wide[1, 1:], 1),
        (wide[0, 1:], wide[1, 1:].bfloat16(), 1),
        (wide[0, :600:2], wide[1, 1:301], 1),
    ):
        with called(cpu, "_run") as run:
            steps(p, g)
        assert run.call_count == 2  # of 32 and of 8 bits
        assert [len(call.args[1]) for call in run.call_args_list] == [taken, taken]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    """The rows are enough to be shared among threads, also to sum gradients of a weight."""
    before = torch.get_num_threads()
    lists = [gradients(seed, [90_000, 17], 2) for seed in range(3)]
    lists.append([x.square() for x in lists[2]])

    @functools.cache
    def found(count):
        torch.set_num_threads(count)
        x, w = random(0, 301, 520), random(1, 520)
        labels = torch.arange(301)
        parts = value_and_grads(lambda x, w: kernels.rms_norm(x, w, 1e-5), (x, w))
        parts += value_and_grads(lambda x, y: kernels.swiglu(x, y), (x, x.flip(0)))
        parts += value_and_grads(lambda x: kernels.cross_entropy(x, labels)[0], (x,))
        p, g, m, v = ([x.clone() for x in tensors] for tensors in lists)
        kernels.adamw_step(p, g, m, v, step=1, **ADAMW)
        parts += p + m + v
        p = [x.clone() for x in lists[0]]
        m, v = ([Moment8bit.zeros(len(x), CPU) for x in p] for _ in range(2))
        kernels.adamw_step_8bit(p, g, m, v, step=1, **ADAMW)
        return parts + p + [part for x in (*m, *v) for part in x]

    try:
        with on_cpu():
            for ours, one in zip(found(threads), found(1), strict=True):
                assert torch.equal(ours, one)
    finally:
        torch.set_num_threads(before)
