"""The MLPs of all experts in a few launches, beside each expert by itself."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import ExpertLayers
from lorakit.kernels.ops.experts import layers as experts_layers
from lorakit.kernels.ops.experts.layers import grouped
from lorakit.kernels.ops.nf4 import dequantize_nf4_each
from tests.triton_budget import random
from tests.triton_interpreter import DEVICE, on_triton

HIDDEN, INNER, EXPERTS, PICKS = 64, 96, 5, 2
KINDS = ["dense", "nf4", "int8"]


def layer(seed, N, K, kind, dtype, r=0, scaling=0.7, biased=False):
    """One layer of all experts; r: the rank of its adapter, 0 for none."""
    bias = [random(seed + 300 + i, N).to(dtype) for i in range(EXPERTS * biased)]
    W = [random(seed + i, N, K, scale=K**-0.5).to(dtype) for i in range(EXPERTS)]
    pack = {"nf4": kernels.quantize_nf4, "int8": kernels.quantize_int8}.get(
        kind, torch.Tensor.clone
    )
    if not r:
        return ExpertLayers([pack(w) for w in W], bias=bias)
    A = [random(seed + 100 + i, r, K, scale=K**-0.5) for i in range(EXPERTS)]
    B = [random(seed + 200 + i, N, r, scale=0.3) for i in range(EXPERTS)]
    return ExpertLayers([pack(w) for w in W], A, B, scaling, bias)


def mlp(kind, dtype, ranks, seed=0, biased=False):
    sizes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return [
        layer(seed + 1000 * i, *size, kind, dtype, r, biased=biased)
        for i, (size, r) in enumerate(zip(sizes, ranks, strict=True))
    ]


def exact(each):
    """Return the layers in fp64."""
    dense = [w if isinstance(w, torch.Tensor) else kernels.dequantize(w) for w in each.stored]
    small = [[t.double() for t in of_all] for of_all in (each.lora_A, each.lora_B)]
    bias = [t.double() for t in each.bias]
    return ExpertLayers([w.double() for w in dense], *small, each.scaling, bias)


def outputs(x, picked, weights, layers, keep=False, hidden_act="silu"):
    """The output, and the gradients of x, the weights, and all A and B; zeros for None."""
    inputs = [x, weights, *(t for each in layers for t in (*each.lora_A, *each.lora_B))]
    inputs = [t.detach().requires_grad_() for t in inputs]
    rest, own = iter(inputs[2:]), []
    for each in layers:
        small = [[next(rest) for _ in of_all] for of_all in (each.lora_A, each.lora_B)]
        own.append(ExpertLayers(each.stored, *small, each.scaling, each.bias))
    y = kernels.expert_mlp(inputs[0], picked, inputs[1], *own, hidden_act, keep=keep)
    grad = random(7, *y.shape).to(y.dtype)
    found = torch.autograd.grad(y, inputs, grad, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


def routed(seed, n, experts=EXPERTS):
    """Experts that are picked for n tokens, of the first `experts`, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    weights, picked = torch.rand(n, experts, generator=generator).topk(min(PICKS, experts))
    return picked.to(DEVICE), weights.to(DEVICE)


def check(x, picked, weights, layers, *, keep=False, hidden_act="silu"):
    """The error of each result is at most twice what the reference has in the same dtype."""
    with on_triton():
        assert kernels.takes_experts(x, *layers)
        ours = outputs(x, picked, weights, layers, keep, hidden_act)
    with kernels.use_backend("reference"):
        same = outputs(x, picked, weights, layers, hidden_act=hidden_act)
        of_fp64 = [exact(each) for each in layers]
        truth = outputs(x.double(), picked, weights.double(), of_fp64, hidden_act=hidden_act)
    for a, b, c in zip(ours, same, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # w multiplies the hidden state, which rounds in another place: 2, and some roundings more
        rounding = 8 * torch.finfo(x.dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [((2, 2, 3), True), ((0, 0, 0), False), ((3, 0, 4), False)]


@pytest.mark.parametrize(
    ("kind", "dtype", "ranks", "keep"),
    [
        pytest.param(*values, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, dtype in enumerate(DTYPES)
        for k, values in enumerate((kind, dtype, *each) for each in RANKS)
    ],
)
def test_values_and_gradients(kind, dtype, ranks, keep):
    """Any two of the options meet in the nine cases that are not slow, all three in the others."""
    x = random(1, 9, HIDDEN).to(dtype)
    check(x, *routed(2, len(x)), mlp(kind, dtype, ranks), keep=keep)


@settings(max_examples=6)
@given(n=st.integers(1, 40), experts=st.integers(1, EXPERTS), seed=st.integers(0, 2**31))
def test_any_number_of_tokens_on_some_of_the_experts(n, experts, seed):
    """One token, experts without any, and all tokens on one expert."""
    x = random(seed, n, HIDDEN)
    check(x, *routed(seed, n, experts), mlp("dense", torch.float32, (2, 2, 2)))


@pytest.mark.parametrize(
    ("kind", "dtype", "hidden_act", "keep"),
    [
        ("dense", torch.float32, "swiglu_oai", False),
        ("nf4", torch.bfloat16, "swiglu_oai", True),
        ("int8", torch.float16, "silu", False),
    ],
)
def test_experts_with_biases(kind, dtype, hidden_act, keep):
    """They are those of gpt-oss, whose dw has a path of its own: h is not linear in up."""
    x = 3 * random(1, 40, HIDDEN).to(dtype)  # some of gate and up are clamped
    layers = mlp(kind, dtype, (2, 0, 3), biased=True)
    check(x, *routed(3, 40), layers, keep=keep, hidden_act=hidden_act)


def test_an_expert_of_more_rows_than_a_tile():
    x = random(3, 150, HIDDEN)
    check(x, *routed(4, len(x), 2), mlp("dense", torch.float32, (2, 0, 2)))


def test_a_rank_that_is_not_a_power_of_two_and_odd_sizes():
    x = random(3, 7, 70)
    layers = [layer(i, *size, "dense", x.dtype, 19) for i, size in
              enumerate(((134, 70), (134, 70), (70, 134)))]  # fmt: skip
    check(x, *routed(5, len(x)), layers)


@pytest.mark.parametrize(
    ("dtype", "beside"), [(torch.float32, 1), (torch.bfloat16, 30), (torch.float32, 140)]
)
def test_no_token_changes_a_bit_of_anothers_result(dtype, beside):
    """Output and gradients of x and the weights, alone and among others, before and after it."""
    layers = mlp("nf4", dtype, (2, 2, 3))
    x, others = random(1, 11, HIDDEN).to(dtype), random(2, beside, HIDDEN).to(dtype)
    picked, weights = routed(3, len(x))
    their_picks, their_weights = routed(4, beside)

    def run(*parts):
        rows = [torch.cat(part) for part in zip(*parts, strict=True)]
        rows = rows[0].requires_grad_(), rows[1], rows[2].requires_grad_()
        y = kernels.expert_mlp(*rows, *layers, "silu")
        y.backward(torch.cat([part[0].sin() for part in parts]))
        return [t.detach() for t in (y, rows[0].grad, rows[2].grad)]

    mine, theirs = (x, picked, weights), (others, their_picks, their_weights)
    with on_triton():
        alone = run(mine)
        after = [t[beside:] for t in run(theirs, mine)]
        before = [t[: len(x)] for t in run(mine, theirs)]
    for a, b, c in zip(alone, after, before, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_do_not_fit_go_some_experts_at_a_time(kind):
    layers, x = mlp(kind, torch.float32, (2, 2, 3)), random(1, 9, HIDDEN)
    given_rows = x, *routed(2, len(x)), layers
    with on_triton():
        whole = outputs(*given_rows)
        with mock.patch.object(experts_layers, "WORKSPACE", 2 * 4 * HIDDEN * INNER):  # two of five
            steps = list(experts_layers.weights(layers[0].stored, x.dtype))
            parts = outputs(*given_rows)
    assert [step for step, _ in steps] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=15)
@given(
    count=st.integers(1, 4), N=st.integers(1, 9), K=st.integers(1, 300), double=st.booleans(),
    block_size=st.sampled_from([32, 64, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_tensors_dense_in_one_launch_are_those_of_a_launch_each(
    count, N, K, double, block_size, dtype
):
    packed = [
        kernels.quantize_nf4(random(i, N, K), block_size=block_size, double_quant=double)
        for i in range(count)
    ]
    with on_triton():
        found = dequantize_nf4_each(packed, dtype)
        expected = torch.stack([kernels.dequantize_nf4(q, dtype) for q in packed])
    assert torch.equal(found, expected)


@given(picks=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=20))
def test_groups_are_sorted_picks(picks):
    """Rows of an expert lie within its bounds, in the order of their tokens; places invert it."""
    picked = torch.tensor(picks)
    groups = grouped(picked, 7)
    assert groups.bounds.tolist() == [sum(e < i for row in picks for e in row) for i in range(8)]
    rows = picked.flatten()[groups.order]
    for e in range(7):
        mine = slice(*groups.bounds[e : e + 2].tolist())
        assert (rows[mine] == e).all()
        assert groups.tokens[mine].tolist() == sorted(groups.tokens[mine].tolist())
    assert torch.equal(groups.order[groups.places.flatten()], torch.arange(picked.numel()))


def test_layers_that_are_not_taken():
    """Weights of several kinds, shapes or dtypes, or ones that addresses do not reach."""
    x, W = random(0, 3, HIDDEN), [random(i, INNER, HIDDEN) for i in range(2)]
    odd = random(3, INNER * HIDDEN + 1)[1:].view(INNER, HIDDEN)
    q = kernels.quantize_nf4(W[0])
    with on_triton():
        assert kernels.takes_experts(x, ExpertLayers(W))
        assert not kernels.takes_experts(x.double(), ExpertLayers(W))
        assert not kernels.takes_experts(x.half(), ExpertLayers(W))
        for other in (q, W[1][1:], W[1].half(), W[1].t().contiguous().t(), odd):
            assert not kernels.takes_experts(x, ExpertLayers([W[0], other]))
        coarse = kernels.quantize_nf4(W[1], block_size=128)
        assert not kernels.takes_experts(x, ExpertLayers([q, coarse]))
        A, B = [random(0, r, HIDDEN) for r in (2, 3)], [random(0, INNER, r) for r in (2, 3)]
        assert not kernels.takes_experts(x, ExpertLayers(W, A, B))
    assert kernels.takes_experts(x, ExpertLayers(W)) == (DEVICE.type == "cuda")


def test_an_activation_that_is_not_known():
    x = random(0, 3, HIDDEN)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        kernels.expert_mlp(x, *routed(0, 3), *mlp("dense", x.dtype, (0, 0, 0)), "relu")
