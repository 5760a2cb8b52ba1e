"""The sizes of real models, against fp64; and tensors of more than 2^31 values.

Error budget: |kernel - fp64| <= |reference - fp64| + a few roundings, in every dtype.
"""

import pytest
import torch
import torch.nn.functional as F

from lorakit import kernels
from tests.gpu.operations import DTYPES, outputs_and_gradients, random, same_bits

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PAST = 2**31 + 2**20  # values


def within_budget(f, exactly, inputs, terms=0.0):
    """`exactly`: f in fp64. `terms`: the size of what may cancel inside, in fp32."""
    ours = outputs_and_gradients(f, inputs)
    with kernels.use_backend("reference"):
        reference = outputs_and_gradients(f, inputs)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    out = exactly(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    # the very gradients that `outputs_and_gradients` gives
    given = [
        random(y.device, *y.shape, seed=i).to(same.dtype).double()
        for i, (y, same) in enumerate(zip(out, reference, strict=False))
    ]
    truth = [*out, *torch.autograd.grad(out, leaves, given)]
    for y, same, exact in zip(ours, reference, truth, strict=True):
        assert (y.dtype, y.shape) == (same.dtype, same.shape)
        rounding = 4 * torch.finfo(y.dtype).eps * exact.abs().max() + 2**-21 * terms
        allowed = (same.double() - exact).abs().max() + rounding
        assert (y.double() - exact).abs().max() <= allowed


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def exact_norm(x, w, offset=0.0):
    return (offset + w) * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@dtypes
@pytest.mark.parametrize("width", [2304, 4096, 8192, 32768])
@pytest.mark.parametrize("casting_mode", ["llama", "gemma"])
def test_rms_norm(width, casting_mode, dtype, device, size, room):
    room(4)
    rows, width = size((2**24 // width, width), (2, width // 256))
    offset = float(casting_mode == "gemma")
    options = {"weight_offset": offset, "casting_mode": casting_mode}
    x, w = random(device, rows, width, scale=3).to(dtype), random(device, width, seed=1).to(dtype)
    slope = x.double().square().mean(-1).add(1e-5).rsqrt().max() * (offset + w.double()).abs().max()
    within_budget(
        lambda x: kernels.rms_norm(x, w, 1e-5, **options),
        lambda x: exact_norm(x, w.double(), offset),
        [x],
        terms=4 * slope,
    )


@dtypes
@pytest.mark.parametrize("width", [2304, 32768])
def test_rms_norm_of_a_trained_weight(width, dtype, device, size, room):
    """dw, a sum over all rows."""
    room(4)
    rows, width = size((2**24 // width, width), (2, width // 256))
    x, w = random(device, rows, width, scale=3).to(dtype), random(device, width, seed=1).to(dtype)
    *_, dw = outputs_and_gradients(lambda x, w: kernels.rms_norm(x, w, 1e-5), [x, w])
    given = random(device, rows, width).to(dtype).double()
    exact = (given * exact_norm(x.double(), 1.0)).sum(0)
    # one rounding of each value, and fp32 sums
    assert relative_error(dw, exact) < torch.finfo(dtype).eps + 1e-5


@dtypes
def test_add_rms_norm(dtype, device, size, room):
    room(4)
    shape = size((4096, 4096), (2, 64))
    x, residual = (random(device, *shape, seed=i, scale=2).to(dtype) for i in range(2))
    w = random(device, shape[1], seed=2).to(dtype)
    within_budget(
        lambda x, r: kernels.add_rms_norm(x, r, w, 1e-5)[0],
        lambda x, r: exact_norm(x + r, w.double()),
        [x, residual],
        # the sum is rounded to the dtype before it is normalized
        terms=2**21 * torch.finfo(dtype).eps * 16 * w.float().abs().max(),
    )


@dtypes
def test_rope(dtype, device, size, room):
    room(4)
    B, T, Hq, Hk, D = size((2, 4096, 32, 8, 128), (2, 3, 2, 1, 16))
    fused = random(device, B, T, Hq + Hk, D).to(dtype)
    angle = random(device, B, T, D // 2, seed=1, scale=5)
    cos, sin = angle.cos(), angle.sin()

    def exactly(fused):
        a, b = fused.chunk(2, -1)
        c, s = cos.double()[:, :, None], sin.double()[:, :, None]
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
        return turned[:, :, :Hq], turned[:, :, Hq:]

    within_budget(
        lambda x: kernels.rope(x[:, :, :Hq], x[:, :, Hq:], cos, sin), exactly, [fused], terms=8
    )


@dtypes
@pytest.mark.parametrize("hidden_act", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_gated(hidden_act, dtype, device, size, room):
    room(6)
    n = size(1024 * 14336 + 7, 1030)
    inputs = [random(device, n, seed=i, scale=3).to(dtype) for i in range(2)]
    approximate = "tanh" if hidden_act == "gelu_pytorch_tanh" else "none"

    def exactly(gate, up):
        if hidden_act == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate=approximate) * up

    # gate and up reach 16, and products of the three in backward are of that order
    within_budget(lambda g, u: kernels.gated(g, u, hidden_act), exactly, inputs, terms=4 * 16)


def check_cross_entropy(logits, labels):
    """Every value of loss and gradient, some rows at a time."""
    leaf = logits.requires_grad_()
    loss, count = kernels.cross_entropy(leaf, labels)
    scale = torch.tensor(0.5, device=logits.device)
    (grad,) = torch.autograd.grad(loss, leaf, scale)
    assert grad.dtype == logits.dtype
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(labels), 128):
        rows = slice(start, start + 128)
        z, y = logits.detach()[rows].double(), labels[rows]
        counted = (y != -100)[:, None]
        lse, chosen = z.logsumexp(-1, keepdim=True), y.clamp(min=0)[:, None]
        total += ((lse - z.gather(-1, chosen)) * counted).sum()
        exact = (z - lse).exp_()
        exact.scatter_add_(-1, chosen, -torch.ones_like(lse)).mul_(0.5 * counted)
        # one rounding; lse, z - lse of about 25, and that in base 2 are rounded to 2^-20 in fp32
        # each and become factors; and where the label's probability is near 1, p - 1 cancels
        allowed = (torch.finfo(grad.dtype).eps + 2**-16) * exact.abs() + 2**-21
        if grad.dtype == torch.float16:
            allowed += 2**-24  # subnormal numbers
        assert ((grad[rows].double() - exact).abs() <= allowed).all(), f"rows from {start}"
    assert count == (labels != -100).sum()
    # fp32 sums of some thousand losses
    assert abs(loss.double() - total) <= 1e-5 * total


@dtypes
@pytest.mark.parametrize("vocabulary", [128256, 151936, 50257])
def test_cross_entropy(vocabulary, dtype, device, size, room):
    room(8)
    rows, vocabulary = size((2048, vocabulary), (3, vocabulary // 1000))
    logits = random(device, rows, vocabulary, scale=2).to(dtype)
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[::3] = -100
    check_cross_entropy(logits, labels)


def test_cross_entropy_of_more_than_2_to_the_31_logits(device, size, room):
    room(14)  # logits and gradient of 4.3 GB each, and the rows in fp64
    rows, vocabulary = size((PAST // 128256 + 1, 128256), (130, 20))
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=device)
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[1::5] = -100
    check_cross_entropy(logits, labels)


def big(device, shape, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)


def check_last_rows(f, inputs):
    """Rows do not depend on each other: the last ones give the same bits alone, which are then of
    a size that other tests hold against fp64.
    """
    leaves = [x.requires_grad_() for x in inputs]
    out = f(*leaves)
    last = [x.detach()[-3:].clone().requires_grad_() for x in leaves]
    alone = f(*last)
    assert same_bits(out[-3:].detach(), alone.detach())
    grad = torch.autograd.grad(out, leaves, out.detach())
    expected = torch.autograd.grad(alone, last, alone.detach())
    for g, e in zip(grad, expected, strict=True):
        assert same_bits(g[-3:], e)


def test_rms_norm_of_more_than_2_to_the_31_values(device, size, room):
    room(15)  # x, y and dx of 4.3 GB each
    rows, width = size((PAST // 4096, 4096), (5, 64))
    w = random(device, width).bfloat16()
    check_last_rows(lambda x: kernels.rms_norm(x, w, 1e-5), [big(device, (rows, width), 0)])


def test_swiglu_of_more_than_2_to_the_31_values(device, size, room):
    room(24)  # gate, up, y, and the gradients of the first two
    shape = size((PAST // 4096, 4096), (5, 64))
    check_last_rows(kernels.swiglu, [big(device, shape, i) for i in range(2)])


def test_rope_of_more_than_2_to_the_31_values(device, size, room):
    room(12)
    T, heads, D = size((PAST // (16 * 128), 16, 128), (5, 2, 16))
    q, k = big(device, (1, T, heads, D), 0), big(device, (1, T, 1, D), 1)
    angle = random(device, 1, T, D // 2)
    cos, sin = angle.cos(), angle.sin()
    turned = kernels.rope(q, k, cos, sin)
    alone = kernels.rope(q[:, -3:], k[:, -3:], cos[:, -3:], sin[:, -3:])
    for whole, last in zip(turned, alone, strict=True):
        assert same_bits(whole[:, -3:], last)


def test_nf4_of_more_than_2_to_the_31_values(device, size, room):
    """Blocks do not depend on each other if they are not quantized twice."""
    room(12)
    w = big(device, size((PAST // 4096, 4096), (5, 256)), 0)
    q, last = (kernels.quantize_nf4(x, double_quant=False) for x in (w, w[-3:]))
    assert same_bits(q.codes[-len(last.codes) :], last.codes)
    assert same_bits(q.absmax[-len(last.absmax) :], last.absmax)
    del w
    assert same_bits(kernels.dequantize_nf4(q)[-3:], kernels.dequantize_nf4(last))


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64, 513, 4096])
def test_frozen_linear(rows, dtype, device, size, room):
    """Forward and dx, the weight as it is dequantized."""
    room(4)
    rows, N, K = size((rows, 14336, 4096), (min(rows, 9), 96, 64))
    q = kernels.quantize_nf4(random(device, N, K, scale=K**-0.5).to(dtype))
    x = random(device, rows, K, seed=1).to(dtype)
    found, grad = outputs_and_gradients(lambda x: kernels.frozen_linear(x, q), [x])
    w = kernels.dequantize_nf4(q, dtype).double()
    given = random(device, rows, N).to(dtype).double()
    # roundings of every output and of partial sums, and fp32 sums; tf32 would be off by 3e-4
    tolerance = 2 * torch.finfo(dtype).eps + 1e-5
    assert relative_error(found, x.double() @ w.t()) < tolerance
    assert relative_error(grad, given @ w) < tolerance


@pytest.mark.parametrize("packed", [False, True])
def test_linear_cross_entropy(packed, device, size, room):
    room(12)
    T, H, V = size((4096, 4096, 128256), (6, 64, 67))
    head = random(device, V, H, scale=H**-0.5).bfloat16()
    if packed:
        q = kernels.quantize_nf4(head)
        head = kernels.dequantize_nf4(q)
    hidden = random(device, T, H, seed=1).bfloat16()
    labels = torch.randint(V, (T,), device=device)
    labels[::4] = -100
    loss, grad = outputs_and_gradients(
        lambda h: kernels.linear_cross_entropy(h, q if packed else head, labels)[0], [hidden]
    )
    scale = random(device, seed=0).double()  # the gradient that was given to the loss
    total, exact, wide = torch.zeros((), dtype=torch.float64, device=device), [], head.float()
    for h, y in zip(hidden.split(512), labels.split(512), strict=True):
        z = (h.float() @ wide.t()).double()
        counted, chosen = (y != -100)[:, None], y.clamp(min=0)[:, None]
        lse = z.logsumexp(-1, keepdim=True)
        total += ((lse - z.gather(-1, chosen)) * counted).sum()
        slope = (z - lse).exp_().scatter_add_(-1, chosen, -torch.ones_like(lse)).mul_(counted)
        exact.append((slope.float() @ wide).double() * scale)
    # logits of up to 4, and their gradients, are rounded to bf16, at random: half an eps of 2^-7
    assert abs(loss.double() - total) <= 4 * 2**-8 * T**0.5
    assert relative_error(grad, torch.cat(exact)) < 2**-6


def test_adamw_of_an_8b_adapter(device, size):
    """Three steps over 448 tensors, against fp64."""
    shapes = size([(16, 4096), (4096, 16), (16, 14336), (14336, 16)] * 112, [(2, 9), (70, 2)])
    lists = [[random(device, *s, seed=4 * j + i) for j, s in enumerate(shapes)] for i in range(4)]
    for v in lists[3]:
        v.abs_()
    exact = [[t.double() for t in tensors] for tensors in lists]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for t in range(1, 4):
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
