"""Products in float8: rounding against fp64, bounds of products, gradients, the Triton kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit import kernels
from lorakit.kernels import Float8Linear, Float8Weight, LoraWeights, dispatch
from lorakit.kernels.ops import float8
from lorakit.kernels.ops.float8.reference import E4M3

# e4m3 rounds a value to 1/17 of it at most, half a step of 2^-3 at 1 + 1/16. Near zero its steps
# are 2^-9 of what 448 is the scale of.
RELATIVE, SMALLEST = 1 / 17, 2**-10
BITS = torch.uint8


def e4m3_values() -> Tensor:
    """All finite values of e4m3, fp64, from its definition (arXiv:2209.05433, table 1)."""
    found = [m / 8 * 2.0**-6 for m in range(8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive = torch.tensor(found[:-1], dtype=torch.float64)  # the last one is NaN
    return torch.cat([-positive.flip(0)[:-1], positive])


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (made * scale).bfloat16()


def nf4(seed: int, *shape: int, block_size: int = 64, double: bool = True) -> kernels.NF4Tensor:
    w = random(seed, *shape, scale=0.02)
    return kernels.quantize_nf4(w, block_size=block_size, double_quant=double)


@pytest.fixture(autouse=True)
def plain_torch():
    with kernels.use_backend("reference"):
        yield


numbers = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=24))
def test_a_row_is_rounded_to_the_nearest_of_e4m3(values):
    x = torch.tensor([values], dtype=torch.float32)
    rows = float8.scaled_rows([x], [None])
    scale = rows.scale.double()
    largest = x.double().abs().max()
    if largest > 1e-29:  # below, a scale is bounded
        assert scale.item() == pytest.approx(largest.item() / 448, rel=1e-6)
    table = e4m3_values()
    wanted = x.double() / scale
    found = rows.values.double()
    assert torch.isin(found, table).all()
    best = (wanted[..., None] - table).abs().amin(-1)
    # two roundings of fp32, of the scale and of the quotient, may cross a middle
    assert ((found - wanted).abs() <= best + wanted.abs() * 2**-21).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(2.0**-60, 2.0**60), st.integers(1, 3))
def test_the_error_of_a_value_is_bounded(seed, size, count):
    parts = [random(seed + i, 3, 16 * (i + 1)) * size for i in range(count)]
    scales = [torch.tensor(2.0**i) for i in range(count)]
    rows = float8.scaled_rows(parts, list(scales))
    exact = torch.cat([p.double() * s for p, s in zip(parts, scales, strict=True)], dim=1)
    error = (rows.values.double() * rows.scale - exact).abs()
    assert (error <= exact.abs() * RELATIVE * (1 + 1e-6) + SMALLEST * rows.scale.double()).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    x = random(0, 3, 32)
    x[1, 5] = value
    rows = float8.scaled_rows([x], [None])
    y = float8.product(rows, Float8Weight(random(1, 16, 32)))
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_a_row_of_zeros_is_zero():
    rows = float8.scaled_rows([torch.zeros(2, 16)], [None])
    assert not rows.values.float().any()
    assert rows.scale.isfinite().all()


@pytest.mark.parametrize("stored", ["nf4", "fp32 scales", "odd rows", "int8", "dense"])
def test_a_weight_is_rounded_once_in_both_orientations(stored):
    w = {
        "nf4": lambda: nf4(0, 48, 128),
        "fp32 scales": lambda: nf4(0, 48, 128, block_size=32, double=False),
        "odd rows": lambda: nf4(0, 48, 80),  # which begin inside of blocks
        "int8": lambda: kernels.quantize_int8(random(0, 48, 128)),
        "dense": lambda: random(0, 48, 128),
    }[stored]()
    weight = Float8Weight(w)
    assert weight.again == (stored in ("nf4", "fp32 scales"))
    dense = w.double() if isinstance(w, Tensor) else kernels.dequantize(w, torch.float32).double()
    rows = weight.rows()
    assert rows.double().abs().max() == 448
    error = (rows.double() * weight.scale - dense).abs()
    once = 2**-8 if stored in ("odd rows", "int8") else 0  # these are made bf16 first
    bound = dense.abs() * (RELATIVE + once) * (1 + 1e-6) + SMALLEST * weight.scale
    assert (error <= bound).all()
    turned = torch.empty(weight.shape[1], weight.shape[0], dtype=E4M3)
    weight.columns_to(turned)
    assert torch.equal(turned.view(BITS), rows.t().contiguous().view(BITS))


def test_a_product_is_within_its_bound():
    """|y - x W^T| <= |x| |W|^T ((1 + 1/17)^2 - 1) + what is lost near zero + one rounding."""
    x, w = random(0, 40, 256), random(1, 64, 256, scale=0.05)
    weight, rows = Float8Weight(w), float8.scaled_rows([x], [None])
    y = float8.product(rows, weight).double()
    sizes = x.double().abs() @ w.double().abs().t()
    of_x = rows.scale.double() * w.double().abs().amax(1)
    of_w = weight.scale.double() * x.double().abs().amax(1, keepdim=True)
    lost = SMALLEST * 256 * (of_x + of_w)
    bound = sizes * ((1 + RELATIVE) ** 2 - 1) + lost + y.abs() * 2**-8
    exact = x.double() @ w.double().t()
    assert ((y - exact).abs() <= bound).all()
    # the roundings are as good as independent: far within the bound
    assert (y - exact).norm() / exact.norm() < 0.05


def test_layers_of_one_backward_product_are_a_sum():
    grads = [random(i, 9, n) * 10.0**-i for i, n in enumerate((48, 16, 64))]
    weights = [Float8Weight(nf4(i, n, 128)) for i, n in enumerate((48, 16, 64))]
    dx = float8.product_back(grads, weights).double()
    exact = sum(
        dy.double() @ kernels.dequantize(w.stored, torch.float32).double()
        for dy, w in zip(grads, weights, strict=True)
    )
    assert (dx - exact).norm() / exact.norm() < 0.05


# ---- in layers ----------------------------------------------------------------------------------


class Base:
    """A frozen layer of a weight that is rounded as float8 rounds it, or as it is."""

    def __init__(self, stored: Tensor, bias: Tensor | None = None):
        self.stored, self.bias = stored, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.stored, self.bias)


class Rounded(torch.autograd.Function):
    """x rounded to e4m3 by rows forward, and what comes back rounded in the same way."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.back = back
        return x.clone() if back else _as_rounded(x)

    @staticmethod
    def backward(ctx, grad):
        return (_as_rounded(grad) if ctx.back else grad), None


def _as_rounded(x: Tensor) -> Tensor:
    rows = float8.scaled_rows([x.to(torch.bfloat16)], [None])
    return rows.values.to(x.dtype) * rows.scale


def small(seed: int, N: int, K: int, r: int = 8, **more) -> LoraWeights:
    base = Base(random(seed, N, K, scale=0.1), **more)
    A, B = random(seed + 1, r, K).float() / 8, random(seed + 2, N, r).float() / 8
    layer = Float8Linear(base, Float8Weight(base.stored))
    return LoraWeights(layer, A.requires_grad_(), B.requires_grad_(), 2.0)


def test_gradients_are_those_of_the_emulation():
    """The emulation is autograd in fp64, with x, W and dy rounded where float8 rounds them."""
    layer, x = small(0, 64, 96), random(7, 40, 96)
    weight = layer.base.stored
    dy = random(8, 40, 64)

    x1 = x.clone().requires_grad_()
    y = kernels.lora_linear(x1, layer)
    found = torch.autograd.grad(y, [x1, layer.lora_A, layer.lora_B], dy)

    x2 = x.double().requires_grad_()
    A, B = (t.detach().bfloat16().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    W = weight.rows().double() * weight.scale
    frozen = Rounded.apply(Rounded.apply(x2, False) @ W.t(), True)
    truth = frozen + 2.0 * (x2 @ A.t()) @ B.t()
    wanted = torch.autograd.grad(truth, [x2, A, B], dy.double())

    # what is left are roundings to bf16, of y, of x A^T and of dy B: 2^-9 of their sizes
    assert (y - truth).norm() / truth.norm() < 2**-7
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() / other.norm() < 2**-7


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_layers_and_the_mlp_are_near_bf16(dropout):
    def run(kind):
        layers = [small(i, n, 64) for i, n in enumerate((64, 32, 32))]
        gate, up, down = small(10, 96, 64), small(20, 96, 64), small(30, 64, 96)
        every = [*layers, gate, up, down]
        if kind == "bf16":
            every = [LoraWeights(e.base.base, e.lora_A, e.lora_B, 2.0) for e in every]
        every = [LoraWeights(e.base, e.lora_A, e.lora_B, 2.0, dropout) for e in every]
        x = random(5, 30, 64).requires_grad_()
        torch.manual_seed(0)
        ys = kernels.lora_qkv(x, every[:3])
        y = kernels.lora_mlp(ys[0], *every[3:], "silu", keep=dropout > 0)
        total = y.float().square().sum() + sum(t.float().square().sum() for t in ys[1:])
        small_ones = [t for e in every for t in (e.lora_A, e.lora_B)]
        return [y, *ys, *torch.autograd.grad(total, [x, *small_ones])]

    for one, other in zip(run("float8"), run("bf16"), strict=True):
        distance = (one.double() - other.double()).norm() / other.double().norm()
        assert 0 < distance < 0.12  # some 4 % a product, through up to four of them


def test_dora_and_a_bias_in_float8():
    base = Base(random(0, 64, 96, scale=0.1), random(3, 64))
    A, B = (random(1, 8, 96).float() / 8), (random(2, 64, 8).float() / 8)
    magnitude = random(4, 64).float().abs()
    x, found = random(7, 40, 96), []
    for layer in (base, Float8Linear(base, Float8Weight(base.stored))):
        m = magnitude.clone().requires_grad_()
        y = kernels.lora_linear(x, LoraWeights(layer, A, B, 2.0, magnitude=m))
        found.append((y, *torch.autograd.grad(y, [m], random(9, 40, 64))))
    for one, other in zip(*found, strict=True):
        assert 0 < (one - other).norm() / other.norm() < 0.05


def test_layers_of_which_one_is_not_in_float8_are_computed_in_bf16():
    first, other = small(0, 64, 96), small(1, 64, 96)
    plain = LoraWeights(other.base.base, other.lora_A, other.lora_B, 2.0)
    x = random(7, 40, 96)
    one = kernels.lora_qkv(x, [first, plain])
    bf16 = LoraWeights(first.base.base, first.lora_A, first.lora_B, 2.0)
    for a, b in zip(one, kernels.lora_qkv(x, [bf16, plain]), strict=True):
        assert torch.equal(a, b)


def test_the_head_in_float8():
    hidden, w = random(0, 50, 64), random(1, 512, 64, scale=0.2)
    labels = torch.arange(50) * 7
    labels[3] = -100
    losses, grads = [], []
    for weight in (w, Float8Weight(w)):
        h = hidden.clone().requires_grad_()
        loss, count = kernels.linear_cross_entropy(h, weight, labels)
        assert count == 49
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, h)[0])
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) / losses[0] < 0.02
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 0.08
    with torch.no_grad():
        assert kernels.linear_cross_entropy(hidden, Float8Weight(w), labels)[0] == losses[1]


def test_a_head_without_its_mean_row_has_the_same_loss():
    """Softmax takes away what all words have in common, here most of it: the error is smaller."""
    hidden, w = random(0, 50, 64), random(1, 512, 64, scale=0.1) + random(2, 1, 64, scale=2)
    labels, found = torch.arange(50) * 7, []
    h = hidden.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(h @ w.double().t(), labels, reduction="sum")
    truth = torch.autograd.grad(exact, h)[0]
    for centred in (False, True):
        h = hidden.clone().requires_grad_()
        weight = Float8Weight(w, centred=centred)
        loss, _ = kernels.linear_cross_entropy(h, weight, labels)
        found.append(abs(loss.double() - exact) / exact)
        grad = torch.autograd.grad(loss, h)[0]
    assert found[1] < found[0] / 4
    assert (grad - truth).norm() / truth.norm() < 0.08
    for options in ({"softcap": 30.0}, {"z_loss": 1e-4}):
        with pytest.raises(ValueError, match="mean row"):
            kernels.linear_cross_entropy(hidden, weight, labels, **options)


def test_a_head_in_float8_on_a_cpu(monkeypatch):
    """No kernel of a CPU has it: the reference runs."""
    monkeypatch.setattr(dispatch, "_forced", None)
    weight, hidden = Float8Weight(random(1, 512, 64)), random(0, 20, 64).requires_grad_()
    found = kernels.linear_cross_entropy(hidden, weight, torch.arange(20))[0]
    with kernels.use_backend("reference"):
        assert found == kernels.linear_cross_entropy(hidden, weight, torch.arange(20))[0]


def test_where_float8_runs():
    cpu = torch.device("cpu")
    assert float8.runs_on(cpu)  # the reference is forced here
    with kernels.use_backend("cpu"):
        assert not float8.runs_on(cpu)


def test_where_float8_does_not_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", None)
    assert not float8.runs_on(torch.device("cpu"))


def test_which_weights_are_taken():
    assert float8.takes(random(0, 32, 48))
    assert not float8.takes(random(0, 32, 40))
    assert not float8.takes(random(0, 24, 48))
    assert not float8.takes(random(0, 32, 48).float())
    assert float8.takes(nf4(0, 32, 64))
