"""float8 on a GPU: the roundings bit for bit the reference, torch's product beside it."""

import pytest
import torch

from lorakit import kernels

pytest.importorskip("triton")
from lorakit.kernels import Float8Linear, Float8Weight, LoraWeights, dispatch
from lorakit.kernels.ops import float8
from lorakit.kernels.ops.cross_entropy import triton as cross_entropy
from lorakit.kernels.ops.float8.reference import E4M3
from tests.triton_budget import guarded, random
from tests.triton_interpreter import DEVICE, on_triton

BITS = torch.uint8
COUNTS = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
pytestmark = pytest.mark.skipif(COUNTS, reason="this GPU has no float8")


def same_bits(a, b):
    return torch.equal(a.contiguous().view(BITS), b.contiguous().view(BITS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(16,), (1040,), (4096 + 32,), (48, 16), (4112, 48, 16)])
def test_rows(widths, dtype):
    parts = [random(i, 5, n).to(dtype) for i, n in enumerate(widths)]
    parts[0][2] = 0
    scales = [torch.tensor(0.3 + i, device=DEVICE) for i in range(len(widths))]
    for given in (scales, [None] * len(widths)):
        with kernels.use_backend("reference"):
            wanted = float8.scaled_rows(parts, given)
        with on_triton(), guarded(*parts) as copies:
            found = float8.scaled_rows(copies, given)
        assert torch.equal(found.scale, wanted.scale)
        assert same_bits(found.values, wanted.values)


def test_rows_that_lie_apart_and_none():
    wide = random(0, 6, 64).bfloat16()
    with on_triton():
        found = float8.scaled_rows([wide[:, 16:48]], [None])
        none = float8.scaled_rows([wide[:0]], [None])
    with kernels.use_backend("reference"):
        assert same_bits(found.values, float8.scaled_rows([wide[:, 16:48]], [None]).values)
    assert [t.shape for t in none] == [(0, 64), (0, 1)]


@pytest.mark.parametrize(
    ("shape", "block", "double"),
    [
        ((160, 256), 64, True),
        ((48, 192), 32, False),
        ((144, 128), 128, True),
        ((16, 4096), 64, True),
    ],
)
def test_weights(shape, block, double):
    w = (random(0, *shape) * 0.02).bfloat16()
    with kernels.use_backend("reference"):
        q = kernels.quantize_nf4(w, block_size=block, double_quant=double)
        weight = Float8Weight(q)
        rows = weight.rows()
    apart = torch.empty(shape[1], shape[0] + 32, dtype=E4M3, device=DEVICE)
    with on_triton(), guarded(q.codes):
        found = Float8Weight(q).rows()
        turned = torch.empty(shape[1], shape[0], dtype=E4M3, device=DEVICE)
        weight.columns_to(turned)
        weight.columns_to(apart[:, 16 : 16 + shape[0]])
    assert same_bits(found, rows)
    assert same_bits(turned, rows.t())
    assert same_bits(apart[:, 16 : 16 + shape[0]], rows.t())


class Base:
    bias = None

    def __init__(self, stored):
        self.stored = stored

    def __call__(self, x):
        return kernels.frozen_linear(x, self.stored)


def run(backend):
    w = [
        (random(i, n, k) * 0.05).bfloat16()
        for i, (n, k) in enumerate(((64, 64), (64, 64), (48, 64)))
    ]
    with kernels.use_backend("reference"):
        packed = [kernels.quantize_nf4(each) for each in w]
    head = (random(9, 512, 64) * 0.2).bfloat16()
    x = random(7, 20, 64).bfloat16().requires_grad_()
    labels = torch.arange(20, device=DEVICE)
    with backend:
        layers = []
        for i, q in enumerate(packed):
            base = Float8Linear(Base(q), Float8Weight(q))
            A, B = (random(20 + i, 8, 64) / 8, random(30 + i, q.shape[0], 8) / 8)
            layers.append(LoraWeights(base, A.requires_grad_(), B.requires_grad_(), 2.0))
        ys = kernels.lora_qkv(x, layers)
        loss, _ = kernels.linear_cross_entropy(ys[0] + ys[1], Float8Weight(head), labels)
        total = loss + ys[2].float().square().sum()
        small = [t for layer in layers for t in (layer.lora_A, layer.lora_B)]
        return [loss, *ys, *torch.autograd.grad(total, [x, *small])]


def test_layers_and_head_are_those_of_the_reference():
    """Sums in another order round otherwise to bf16, and rounded again to e4m3 they may differ by a
    step of it, 1/8: of few values.
    """
    for one, other in zip(run(on_triton()), run(kernels.use_backend("reference")), strict=True):
        assert (one.double() - other.double()).norm() <= 0.01 * other.double().norm()


@pytest.mark.parametrize(
    ("keep", "dropout", "more"),
    [
        (True, 0.0, ""),
        (False, 0.0, ""),
        (True, 0.3, ""),
        (True, 0.0, "turned"),
        (True, 0.0, "autocast"),
        (False, 0.0, "autocast"),
    ],
)
def test_an_mlp_whose_activation_adds_the_updates(keep, dropout, more):
    """The reference adds them before; three roundings to e4m3 follow each other, each with the
    tolerance of the layers above. A B whose columns lie together gets the same results, and so does
    a forward pass under autocast, which the backward pass is not under.
    """
    shapes = (96, 64), (96, 64), (64, 96)
    with kernels.use_backend("reference"):
        packed = [
            kernels.quantize_nf4((random(i, *shape) * 0.2).bfloat16())
            for i, shape in enumerate(shapes)
        ]
    x = random(7, 40, 64).bfloat16().requires_grad_()
    # updates as large as the products: without them nothing would be near
    A = [(random(20 + i, 8, k) / 4).requires_grad_() for i, (_, k) in enumerate(shapes)]
    B = [random(30 + i, n, 8) / 4 for i, (n, _) in enumerate(shapes)]
    B = [(b.t().contiguous().t() if more == "turned" else b).requires_grad_() for b in B]
    found = []
    # on a CPU torch's autocast does not know the float8 of the reference
    for backend, under in (
        (on_triton(), more == "autocast"),
        (kernels.use_backend("reference"), False),
    ):
        with backend:
            layers = [
                LoraWeights(Float8Linear(Base(q), Float8Weight(q)), *pair, 0.5, dropout)
                for q, *pair in zip(packed, A, B, strict=True)
            ]
            torch.manual_seed(0)  # of the masks
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=under):
                y = kernels.lora_mlp(x, *layers, "silu", keep=keep)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *A, *B])])
    for one, other in zip(*found, strict=True):
        assert (one.double() - other.double()).norm() <= 0.03 * other.double().norm()


@pytest.mark.parametrize("vocabulary", [48, 4112])
def test_gradients_of_logits(vocabulary):
    """They are within e4m3's bound of fp64, with the scale of the label's gradient, 1 - p."""
    logits = (random(0, 6, vocabulary) * 4).bfloat16()
    labels = torch.tensor([0, 5, vocabulary - 1, 7, -100, 2], device=DEVICE)
    logits[3, 7] = 90  # p is 1: nothing to learn
    with on_triton(), guarded(logits, labels) as copies:
        loss, grad = cross_entropy.loss_and_rounded_gradient(*copies, -100)
    counted, z = labels != -100, logits.double()
    exact = z.softmax(1) - torch.nn.functional.one_hot(labels.clamp(min=0), vocabulary)
    exact *= counted[:, None]
    wanted = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    largest = exact.abs().amax(1, keepdim=True)
    scale = (grad.scale.double() * 448)[counted]
    assert torch.allclose(scale, largest.clamp(min=2**-20)[counted], rtol=1e-3)
    error = (grad.values.double() * grad.scale - exact).abs()
    # and e^x in fp32, whose argument has a rounding of up to 2^-24 of 90
    assert (error <= exact.abs() / 16 + 2**-10 * grad.scale.double() + 2**-17).all()


def test_gpus_without_float8(monkeypatch):
    with on_triton():
        assert float8.runs_on(DEVICE)
        monkeypatch.setattr(dispatch, "capability", lambda device: (8, 6))
        assert not float8.runs_on(DEVICE)
        monkeypatch.setattr(dispatch, "capability", lambda device: (8, 9))
        assert float8.runs_on(DEVICE)
        monkeypatch.setattr(dispatch, "compiles_to", lambda: "amdgcn")
        assert not float8.runs_on(DEVICE)
