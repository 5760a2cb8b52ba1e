"""The hand-derived backward of LoRA against autograd in fp64, and what it keeps."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import LoraWeights, dispatch
from lorakit.kernels.ops import products
from lorakit.kernels.ops.dropout import seeded_dropout
from lorakit.kernels.ops.frozen_linear.dense import weight_panels
from lorakit.kernels.ops.swiglu import Activation


class Dense:
    """A base in the test's dtype."""

    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)

    @property
    def stored(self):
        return self.weight.detach()


class NF4(Dense):
    """A base that has to be unpacked."""

    def __init__(self, weight):
        self.q, self.bias = kernels.quantize_nf4(weight), None

    def __call__(self, x):
        return kernels.frozen_linear(x, self.q)

    @property
    def stored(self):
        return self.q


def layer(K, N, r=2, dtype=torch.float64, *, bias=False, dora=False, scaling=1.7, **options):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    base = Dense(torch.randn(N, K, dtype=dtype), leaf(N) if bias else None)
    magnitude = leaf(N) if dora else None
    return LoraWeights(base, leaf(r, K), leaf(N, r), scaling, magnitude=magnitude, **options)


def leaves(*layers):
    found = [
        t for each in layers for t in (each.lora_A, each.lora_B, each.base.bias, each.magnitude)
    ]
    return [t for t in found if t is not None]


def spelled_out(x, each, mask=None):
    """The definition, for autograd."""
    seen = x if mask is None else x * mask
    weight = torch.cat([W for _, W in weight_panels(each.base.stored, x.dtype)])
    A, B = each.lora_A.to(x.dtype), each.lora_B.to(x.dtype)
    y = x @ weight.t() + each.scaling * (seen @ A.t()) @ B.t()
    if each.magnitude is not None:
        norms = (weight + each.scaling * B.detach() @ A.detach()).norm(dim=1)
        y = y * (each.magnitude / norms)
    return y if each.base.bias is None else y + each.base.bias


def act(z, hidden_act):
    if hidden_act == "silu":
        return F.silu(z)
    if hidden_act == "swiglu_oai":
        return z.clamp(max=7) * torch.sigmoid(1.702 * z.clamp(max=7))
    return F.gelu(z, approximate="tanh" if hidden_act == "gelu_pytorch_tanh" else "none")


def beside(up, hidden_act):
    """What the activation is multiplied by."""
    return up.clamp(-7, 7) + 1 if hidden_act == "swiglu_oai" else up


def same(ours, truth, inputs, tolerance=1e-9):
    """Values and gradients, for one gradient of the outputs; fp64 throughout."""
    grads = [torch.randn_like(y) for y in ours]
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(ours, inputs, grads)
    for a, b in zip(found, torch.autograd.grad(truth, inputs, grads), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


ACTIVATIONS = list(Activation.__members__)
shapes = st.sampled_from([(3,), (2, 3), (1, 1)])


@settings(max_examples=30)
@given(shapes, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_layers_that_share_an_input(shape, sizes, bias, dora):
    torch.manual_seed(len(sizes))
    x = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    layers = [layer(7, N, r=1 + i, bias=bias, dora=dora) for i, N in enumerate(sizes)]
    ours = kernels.lora_qkv(x, layers)
    same(ours, [spelled_out(x, each) for each in layers], [x, *leaves(*layers)])


@settings(max_examples=30)
@given(shapes, st.integers(1, 9), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())
def test_mlp(shape, inner, hidden_act, bias, dora):
    torch.manual_seed(inner)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    gate, up = (layer(5, inner, r=1 + i, bias=bias, dora=dora) for i in range(2))
    down = layer(inner, 6, bias=bias, dora=dora)
    ours = kernels.lora_mlp(x, gate, up, down, hidden_act)
    hidden = act(spelled_out(x, gate), hidden_act) * beside(spelled_out(x, up), hidden_act)
    same([ours], [spelled_out(hidden, down)], [x, *leaves(gate, up, down)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_that_keeps_gate_and_up(dtype):
    """Keeping them gives the bits of computing them again, for 4 I bytes a token more, 8 I in fp32.
    The rows are so many that forward, too, makes the weights dense, and that none are filled up.
    """
    gate, up, down = qlora_mlp(4, 64, 192)
    x, found = torch.randn(72, 64, dtype=dtype).requires_grad_(), []
    for keep in (False, True):
        kept, y = saved_bytes(lambda k=keep: kernels.lora_mlp(x, gate, up, down, "silu", keep=k))
        grads = torch.autograd.grad(y.float().square().sum(), [x, *leaves(gate, up, down)])
        found.append((kept, y.detach(), grads))
    (less, y, grads), (more, same_y, same_grads) = found
    # rounded where the kernel computes them, and as torch multiplies where it does
    wide = (x.dtype if products.available(x) else dispatch.product_dtype(x)).itemsize
    assert more == less + 2 * 72 * 192 * wide
    assert torch.equal(y, same_y)
    for a, b in zip(grads, same_grads, strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    """Finite differences; with DoRA only for what its held norm does not depend on."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    plain, dora = layer(7, 5, bias=True), layer(7, 5, dora=True)
    assert torch.autograd.gradcheck(
        lambda x, *_: kernels.lora_linear(x, plain), (x, *leaves(plain))
    )
    assert torch.autograd.gradcheck(lambda x, m: kernels.lora_linear(x, dora), (x, dora.magnitude))
    gate, up, down = layer(7, 4), layer(7, 4), layer(4, 7)
    assert torch.autograd.gradcheck(
        lambda x, *_: kernels.lora_mlp(x, gate, up, down, "silu"), (x, *leaves(gate, up, down))
    )


def masks(calls):
    """The masks that `calls` draw, found through a layer that passes its dropped input on."""
    eye = torch.eye(7, dtype=torch.float64)
    nothing = Dense(torch.zeros(7, 7, dtype=torch.float64))
    probe = LoraWeights(nothing, eye, eye, 1.0, dropout=0.4)
    return [
        kernels.lora_linear(torch.ones(50, 7, dtype=torch.float64), probe) for _ in range(calls)
    ]


def test_dropout():
    """One mask for the layers that share an input, the same in backward; it keeps the mean."""
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    layers = [layer(7, 5, dropout=0.4), layer(7, 3, dropout=0.4)]
    torch.manual_seed(3)
    (mask,) = masks(1)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.6}
    assert 0.2 < (mask == 0).double().mean() < 0.6
    torch.manual_seed(3)
    ours = kernels.lora_qkv(x, layers)
    same(ours, [spelled_out(x, each, mask) for each in layers], [x, *leaves(*layers)])


@pytest.mark.parametrize("shape", [(7, 50), (1, 7, 50)])
def test_dropout_of_an_input_that_is_not_row_major(shape):
    """The mask of backward is that of forward, element by element, whatever the strides."""
    x = torch.randn(shape, dtype=torch.float64).transpose(-1, -2).requires_grad_()
    each = layer(7, 5, dropout=0.4)
    torch.manual_seed(3)
    (mask,) = masks(1)
    torch.manual_seed(3)
    y = kernels.lora_linear(x, each)
    same([y], [spelled_out(x, each, mask.view(x.shape))], [x, *leaves(each)])


def test_dropout_by_a_counter():
    """The mask follows from the generator's number and the counter, in backward too."""
    counter = torch.zeros((), dtype=torch.int64)
    each = layer(7, 5, dropout=0.4, counter=counter)
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    found = []
    for number in (0, 1, 0):
        counter.fill_(number)
        torch.manual_seed(3)
        seed = int(torch.randint(2**62, ()))
        mask = seeded_dropout(torch.ones_like(x), 0.4, seed, counter)
        torch.manual_seed(3)
        y = kernels.lora_linear(x, each)
        same([y], [spelled_out(x, each, mask)], [x, *leaves(each)])
        found.append(y)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_dropout_of_an_mlp():
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    gate, up, down = (layer(7, 7, dropout=0.4) for _ in range(3))
    torch.manual_seed(4)
    shared, of_down = masks(2)
    assert not torch.equal(shared, of_down)
    torch.manual_seed(4)
    ours = kernels.lora_mlp(x, gate, up, down, "gelu")
    hidden = F.gelu(spelled_out(x, gate, shared)) * spelled_out(x, up, shared)
    same([ours], [spelled_out(hidden, down, of_down)], [x, *leaves(gate, up, down)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_within_the_error_of_plain_autograd(dtype, adapter_dtype):
    """|ours - fp64| <= 2 |autograd in the same dtype - fp64| + a rounding of the largest value."""
    torch.manual_seed(0)
    kind = adapter_dtype or dtype
    x = torch.randn(64, 96, dtype=dtype, requires_grad=True)
    wide = layer(96, 80, r=8, dtype=dtype, scaling=0.5)
    A, B = (t.detach().to(kind).requires_grad_() for t in (wide.lora_A, wide.lora_B))
    base = wide.base
    grad = torch.randn(64, 80, dtype=dtype)
    y = kernels.lora_linear(x, LoraWeights(base, A, B, 0.5))
    ours = [y, *torch.autograd.grad(y, (x, A, B), grad)]

    def plain(kind):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, A, B)]
        out = F.linear(inputs[0], base.weight.to(kind))
        out = out + 0.5 * F.linear(F.linear(inputs[0], inputs[1]), inputs[2])
        return [out, *torch.autograd.grad(out, inputs, grad.to(kind))]

    for mine, same, truth in zip(ours, plain(dtype), plain(torch.float64), strict=True):
        allowed = 2 * (same.double() - truth).abs().max()
        allowed += torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed
    assert ours[2].dtype == A.dtype


def test_the_norms_of_dora_without_the_sum():
    """fp32 and bf16 against ||W + s B A|| formed in fp64; the cross term is a product in dtype."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        torch.manual_seed(1)
        x, each = torch.randn(4, 300, dtype=dtype), layer(300, 50, 8, dtype, dora=True)
        truth = spelled_out(x.double(), each)
        y = kernels.lora_linear(x, each)
        assert (y.double() - truth).abs().max() < tolerance * truth.abs().max()


def saved_bytes(call):
    """Count what autograd keeps from the call to its backward, each memory once."""
    found = {}

    def note(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = call()
    return sum(found.values()), y


def qlora_mlp(r=16, H=1024, I=3584):  # noqa: E741
    def one(K, N):
        return LoraWeights(
            NF4(torch.randn(N, K, dtype=torch.bfloat16)),
            torch.randn(r, K).requires_grad_(),
            torch.randn(N, r).requires_grad_(),
            2.0,
        )

    return one(H, I), one(H, I), one(I, H)


@pytest.mark.parametrize("which", [0, 2])
def test_an_mlp_half_of_which_has_dora(which):
    """torch multiplies that half, in fp32 where it has no products of 16 bits, the kernel the other
    half in bf16. Both get one dtype: 8 bits of every value on the way, some four times.
    """
    torch.manual_seed(which)
    layers = list(qlora_mlp(4, 64, 192))
    magnitude = (torch.rand(len(layers[which].lora_B)) + 0.5).requires_grad_()
    layers[which] = replace(layers[which], magnitude=magnitude)
    x = torch.randn(72, 64, dtype=torch.bfloat16).div(8).requires_grad_()
    wide = x.detach().double().requires_grad_()
    gate, up, down = layers
    truth = spelled_out(act(spelled_out(wide, gate), "silu") * spelled_out(wide, up), down)
    dy = torch.randn_like(x)
    y = kernels.lora_mlp(x, *layers, "silu", keep=True)
    ours = [y, *torch.autograd.grad(y, [x, *leaves(*layers)], dy)]
    theirs = [truth, *torch.autograd.grad(truth, [wide, *leaves(*layers)], dy.double())]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 4 * 2**-8 * b.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_qlora_mlp_keeps_its_input_alone(dropout):
    """It keeps at most 2,100 bytes a token at H = 1024, I = 3584: x in bf16 is 2,048."""
    layers = [replace(each, dropout=dropout) for each in qlora_mlp()]
    found = {}
    for T in (64, 192):
        x = torch.randn(1, T, 1024, dtype=torch.bfloat16, requires_grad=True)
        found[T], y = saved_bytes(lambda x=x: kernels.lora_mlp(x, *layers, "silu"))
        y.sum().backward()
    assert (found[192] - found[64]) / 128 <= 2100
    # and what does not grow with the tokens are the adapters: no dense weight among it
    small = sum(t.numel() * t.element_size() for t in leaves(*layers))
    assert found[64] <= small + 64 * 2100


def test_the_callers_tensors_stay_as_they_are():
    gate, up, down = qlora_mlp(4, 64, 64)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 64, dtype=torch.bfloat16)
    before = [t.clone() for t in (x, grad, *leaves(gate, up, down))]
    y = kernels.lora_mlp(x, gate, up, down, "silu")
    first = torch.autograd.grad(y, leaves(gate), grad, retain_graph=True)
    again = torch.autograd.grad(y, leaves(gate), grad)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip((x, grad, *leaves(gate, up, down)), before, strict=True):
        assert torch.equal(a, b)


def test_no_rows():
    each, mlp = layer(7, 5), [layer(7, 5), layer(7, 5), layer(5, 7)]
    for shape in ((0, 7), (2, 0, 7)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for call, N in (
            (lambda x: kernels.lora_linear(x, each), 5),
            (lambda x: kernels.lora_mlp(x, *mlp, "silu"), 7),
        ):
            y = call(x)
            assert y.shape == (*shape[:-1], N)
            y.sum().backward()
            assert x.grad.shape == shape
    assert (each.lora_A.grad == 0).all()


def test_the_output_may_be_changed_in_place():
    each = layer(7, 5)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    same([torch.relu_(kernels.lora_linear(x, each))], [spelled_out(x, each).relu()], [x])


@pytest.mark.skipif(dispatch._multiplies_bf16(), reason="the processor has 16-bit products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_multiplied_in_fp32_where_that_is_faster(dtype):
    """Dtypes stay, values are nearer to fp64 than products in 16 bits; forced torch stays so."""
    torch.manual_seed(0)
    each = layer(300, 200, 8, dtype)
    x = torch.randn(40, 300, dtype=dtype, requires_grad=True)
    grad = torch.randn(40, 200, dtype=dtype)

    def run():
        y = kernels.lora_linear(x, each)
        return [y, *torch.autograd.grad(y, (x, each.lora_A), grad)]

    ours = run()
    with kernels.use_backend("reference"):
        plain = run()
    wide = x.detach().double().requires_grad_()
    y = spelled_out(wide, each)
    truth = [y, *torch.autograd.grad(y, (wide, each.lora_A), grad.double())]
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert a.dtype == b.dtype
        error, usual = ((t.double() - exact).norm() for t in (a, b))
        assert error < 0.9 * usual


def test_frozen_input_gets_no_gradient():
    x, each = torch.randn(4, 7, dtype=torch.float64), layer(7, 5)
    kernels.lora_linear(x, each).sum().backward()
    assert each.lora_A.grad is not None
    assert each.lora_B.grad is not None


def test_under_autocast():
    """The caller's autocast is followed: bf16 products, gradients in the inputs' dtypes."""
    torch.manual_seed(0)
    x = torch.randn(16, 64, requires_grad=True)
    each = layer(64, 48, 4, torch.float32)
    layers = layer(64, 48, 4, torch.float32), layer(64, 48, 4, torch.float32)
    layers = *layers, layer(48, 64, 4, torch.float32, scaling=1 / math.sqrt(3))
    dora = layer(64, 48, 4, torch.float32, dora=True)
    for call, tensors in (
        (lambda: kernels.lora_linear(x, each), leaves(each)),
        (lambda: kernels.lora_linear(x, dora), leaves(dora)),
        (lambda: kernels.lora_mlp(x, *layers, "silu"), leaves(*layers)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call()
        exact = call()
        assert y.dtype == torch.bfloat16
        assert (y - exact).abs().max() < 0.02 * exact.abs().max()  # a few roundings of bf16
        grads = torch.autograd.grad(y.float().sum(), (x, *tensors))
        truth = torch.autograd.grad(exact.sum(), (x, *tensors))
        for grad, wide in zip(grads, truth, strict=True):
            assert grad.dtype == torch.float32
            assert (grad - wide).norm() < 0.03 * wide.norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # around backward alone: as without
            inside = torch.autograd.grad(call_exactly(call), (x, *tensors))
        for grad, wide in zip(inside, truth, strict=True):
            assert torch.equal(grad, wide)


def call_exactly(call):
    with torch.autocast("cpu", enabled=False):
        return call().sum()


def test_refusals():
    x = torch.randn(2, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="same dropout"):
        kernels.lora_qkv(x, [layer(7, 5), layer(7, 5, dropout=0.1)])
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        kernels.lora_mlp(x, layer(7, 5), layer(7, 5), layer(5, 7), "relu")
    with pytest.raises(ValueError, match="approximate is 'tan'"):
        kernels.geglu(x, x, approximate="tan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_that_is_made_again_is_not_kept(dtype):
    """The bits stay, and nothing of x is left until backward."""
    gate, up, down = qlora_mlp(4, 64, 192)
    source = torch.randn(2, 40, 64, dtype=dtype)

    def make(s):
        return s * 2

    calls = (
        lambda x, **how: torch.cat(kernels.lora_qkv(x, [gate, up], **how), dim=-1),
        lambda x, **how: kernels.lora_mlp(x, gate, up, down, "silu", keep=True, **how),
    )
    for call in calls:
        found = []
        for how in ({}, {"again": (make, source)}):
            x, kept = make(source).requires_grad_(), []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t
            ):
                y = call(x, **how)
            assert (x.data_ptr() in kept) == (not how)
            grads = torch.autograd.grad(y.float().square().sum(), [x, *leaves(gate, up)])
            found.append([y.detach(), *grads])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
