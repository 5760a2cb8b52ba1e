"""One adapter from several, against PEFT's add_weighted_adapter and the definitions in fp64."""

import math
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import lorakit as lk
from lorakit.adapters.combine import KINDS, PRUNED, Combination, Update
from lorakit.adapters.combine import combine as combine_updates
from lorakit.config.errors import LorakitError

IN, OUT = 24, 40


def combine(kind, parts, weights, **options):
    """A and B of parts (A, B, scaling)."""
    return combine_updates([Update(*p) for p in parts], weights, Combination(kind, **options))


def peft_model(ranks, alphas, seed=0):
    """A PEFT model of one layer with adapters "0", "1", ..., none of them zero, and their parts."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(IN, OUT))
    configs = [
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=i == 1,
            target_modules=["0"],
            init_lora_weights=False,
        )
        for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]
    model = get_peft_model(base, configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    layer = model.base_model.model[0]
    names = [str(i) for i in range(len(ranks))]
    parts = [
        (layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, layer.scaling[n]) for n in names
    ]
    return model, layer, parts


def peft_combined(model, layer, kind, weights, monkeypatch, **options):
    """A and B of PEFT's result, what it draws for "dare" coming from seed 9: the new adapter, drawn
    by the same generator, is frozen just before it is computed."""
    monkeypatch.setattr(
        "peft.tuners.lora.model._freeze_adapter", lambda *args: torch.manual_seed(9)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1 prunes nothing
        model.add_weighted_adapter(
            [str(i) for i in range(len(weights))], weights, "new", kind, **options
        )
    assert layer.scaling["new"] == 1
    return layer.lora_A["new"].weight.data, layer.lora_B["new"].weight.data


def close(a, b, rtol=1e-5):
    """1e-5 of the whole: fp32 sums of at most 40 products, and singular vectors of matrices whose
    kept values are apart."""
    return (a.double() - b.double()).norm() <= rtol * b.double().norm()


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[0.7, 1.3, 0.4], [1.0, -0.9, 2.0]])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind, density, weights, method, monkeypatch):
    apart = kind == "cat" or kind.endswith("svd")
    model, layer, parts = peft_model([4, 6, 3] if apart else [4] * 3, [4, 12, 7])
    pruning = {"density": density} if kind.removesuffix("_svd") in PRUNED else {}
    A2, B2 = peft_combined(
        model, layer, kind, weights, monkeypatch, majority_sign_method=method, **pruning
    )
    A, B = combine(
        kind,
        parts,
        weights,
        majority_sign_method=method,
        generator=torch.Generator().manual_seed(9),
        **pruning,
    )
    assert A.shape == A2.shape
    assert B.shape == B2.shape
    assert close(B @ A, B2 @ A2)
    if kind.endswith("svd"):
        signs = (A * A2).sum(1).sign()
        A, B = signs[:, None] * A, B * signs
    assert close(A, A2)
    assert close(B, B2)


@pytest.mark.parametrize("rank", [1, 5, 13, 24])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_any_rank_equals_peft(kind, rank, monkeypatch):
    model, layer, parts = peft_model([4, 6, 3], [4, 12, 7])
    pruning = {"density": 0.5} if kind != "svd" else {}
    weights = [0.7, -0.2, 1.3]
    A2, B2 = peft_combined(model, layer, kind, weights, monkeypatch, svd_rank=rank, **pruning)
    A, B = combine(kind, parts, weights, rank=rank, **pruning)
    assert A.shape == A2.shape == (rank, IN)
    assert B.shape == B2.shape == (OUT, rank)
    assert close(B @ A, B2 @ A2)


def test_one_adapter_by_linear_equals_peft(monkeypatch):
    model, layer, parts = peft_model([4], [7])
    A2, B2 = peft_combined(model, layer, "cat", [-1.5], monkeypatch)  # PEFT: one is always linear
    A, B = combine("linear", parts, [-1.5])
    assert close(A, A2)
    assert close(B, B2)


# ---- the definitions ----


@st.composite
def adapters(draw, same_rank=False):
    """Shapes, parts and weights: ranks together below, at and beyond those of the layer."""
    features, out = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    n = draw(st.integers(1, 4))
    ranks = [draw(st.integers(1, 6)) for _ in range(n)]
    if same_rank:
        ranks = ranks[:1] * n
    weights = [round(draw(st.floats(-2, 2)), 3) for _ in range(n)]
    scalings = [draw(st.floats(0.1, 4)) for _ in range(n)]
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    parts = [
        (torch.randn(r, features, generator=g), torch.randn(out, r, generator=g), s)
        for r, s in zip(ranks, scalings, strict=True)
    ]
    return parts, weights


def total(parts, weights):
    """sum w s B A in fp64, and the size of what fp32 rounds in it.

    Each product of two numbers is rounded, so a sum B A that nearly cancels still has their error.
    """
    triples = [(A.double(), B.double(), w * s) for (A, B, s), w in zip(parts, weights, strict=True)]
    truth = sum(factor * B @ A for A, B, factor in triples)
    return truth, sum(abs(factor) * (B.abs() @ A.abs()).norm() for A, B, factor in triples)


# B A is the difference of two numbers that fp32 can hardly tell apart.
NEARLY_ZERO = (torch.tensor([[1.0], [1 + 2**-23]]), torch.tensor([[1.0, -1.0]]), 0.1)


@given(adapters())
@example(([NEARLY_ZERO], [1.0]))
def test_cat_is_the_sum(drawn):
    A, B = combine("cat", *drawn)
    truth, size = total(*drawn)
    assert len(A) == sum(len(part[0]) for part in drawn[0])
    assert (B.double() @ A.double() - truth).norm() <= 1e-6 * size  # fp32 rounds w s A


@given(adapters(), st.data())
def test_svd_is_the_best_approximation(drawn, data):
    parts, weights = drawn
    truth, size = total(parts, weights)
    rank = data.draw(st.none() | st.integers(1, min(truth.shape)))
    A, B = (t.double() for t in combine("svd", parts, weights, rank=rank))
    rank = rank or max(len(A) for A, _, _ in parts)  # which may be beyond the layer's own
    assert A.shape == (rank, truth.shape[1])
    assert B.shape == (truth.shape[0], rank)
    # 1e-5 of what was summed: two QR and one SVD in fp32
    slack = 1e-5 * size
    tail = torch.linalg.svdvals(truth)[rank:].norm()
    assert (truth - B @ A).norm() <= tail + slack
    found = A.norm(dim=1) > 0
    eye = torch.diag(found.double())
    assert torch.allclose(A @ A.t(), eye, atol=1e-5)
    gram = B.t() @ B
    assert (gram - gram.diag().diag()).norm() <= slack * (B.norm() + slack)


@given(adapters(same_rank=True))
def test_linear_of_one_is_itself_and_of_many_has_cross_terms(drawn):
    parts, weights = drawn
    truth, size = total(parts[:1], weights[:1])
    A, B = combine("linear", parts[:1], weights[:1])
    assert (B.double() @ A.double() - truth).norm() <= 1e-6 * size + 1e-30  # w = 0; fp32 roots
    A, B = combine("linear", parts, weights)
    roots = [math.sqrt(abs(w * s)) for w, (_, _, s) in zip(weights, parts, strict=True)]
    signed = [root if w >= 0 else -root for root, w in zip(roots, weights, strict=True)]
    low = sum(root * p[0].double() for root, p in zip(signed, parts, strict=True))
    high = sum(root * p[1].double() for root, p in zip(roots, parts, strict=True))
    # values of size 1 to 4, at most four roots below 3: 1e-5 is fp32's rounding of their sum
    torch.testing.assert_close(A.double(), low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.double(), high, rtol=1e-5, atol=1e-5)


@given(adapters(same_rank=True), st.floats(0.05, 1))
def test_trimming_keeps_the_largest(drawn, density):
    (A, B, _), *_ = drawn[0]
    for kept, t in zip(
        combine("magnitude_prune", [(A, B, 1.0)], [1.0], density=density), (A, B), strict=True
    ):
        mask = kept != 0
        assert mask.sum() == int(density * t.numel())
        assert torch.equal(kept[mask], t[mask])
        if mask.any() and not mask.all():
            assert t[mask].abs().min() >= t[~mask].abs().max()


@given(adapters(same_rank=True), st.floats(0.05, 1), st.integers(0, 99))
def test_dropping_keeps_values_or_nothing(drawn, density, seed):
    (A, B, _), *_ = drawn[0]
    pair = [
        combine(
            "dare_linear",
            [(A, B, 1.0)],
            [1.0],
            density=density,
            generator=torch.Generator().manual_seed(seed),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    for kept, t in zip(pair[0], (A, B), strict=True):
        mask = kept != 0
        torch.testing.assert_close(kept[mask], t[mask] / density)  # fp32


def test_dropping_keeps_the_mean_and_the_fraction():
    A, B = torch.ones(8, 5000), torch.ones(1, 8)
    kept, _ = combine(
        "dare_linear", [(A, B, 1.0)], [1.0], density=0.2, generator=torch.Generator().manual_seed(0)
    )
    # 40,000 draws: their mean has deviation sqrt(0.8 / 0.2 / 40,000) = 0.01, here four times
    assert kept.mean().item() == pytest.approx(1, abs=0.04)
    state = torch.get_rng_state()
    combine("dare_ties", [(A, B, 1.0)], [1.0], density=0.2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_ties_by_hand():
    """Four columns: all agree, two against one, one large against two small, a draw."""
    rows = [[1.0, 2.0, -9.0, 1.0], [2.0, 4.0, 1.0, -1.0], [3.0, -3.0, 2.0, 0.0]]
    parts = [(torch.tensor([row]), torch.ones(1, 1), 1.0) for row in rows]
    A, B = combine("ties", parts, [1.0] * 3, density=1.0)
    assert torch.equal(A, torch.tensor([[2.0, 3.0, -9.0, 1.0]]))
    assert torch.equal(B, torch.ones(1, 1))
    A, _ = combine("ties", parts, [1.0] * 3, density=1.0, majority_sign_method="frequency")
    assert torch.equal(A, torch.tensor([[2.0, 3.0, 1.5, 1.0]]))
    A, _ = combine("ties", parts, [1.0, 4.0, 0.0], density=1.0)  # roots 1, 2, 0 after the vote
    assert torch.equal(A, torch.tensor([[5 / 3, 5.0, -9.0, 1.0]]))


def test_svd_forms_no_dense_sum():
    """The largest tensor is a factor, not the [out, in] product."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    parts = [(torch.randn(4, 500), torch.randn(400, 4), 1.0) for _ in range(3)]
    with Largest() as seen:
        combine("svd", parts, [1.0, 2.0, 3.0])
    assert 0 < seen.size <= 12 * 500


def test_what_is_given_stays_and_the_result_is_fp32():
    parts = [
        (nn.Parameter(torch.randn(4, 6, dtype=dtype)), torch.randn(5, 4, dtype=dtype), 2.0)
        for dtype in (torch.bfloat16, torch.float64)
    ]
    before = [(A.detach().clone(), B.clone()) for A, B, _ in parts]
    for kind in KINDS:
        pruning = {"density": 0.5} if kind.removesuffix("_svd") in PRUNED else {}
        A, B = combine(kind, parts, [1.0, 0.5], **pruning)
        assert A.dtype == B.dtype == torch.float32
        assert not A.requires_grad
        A.fill_(3), B.fill_(3)
    for (A, B, _), (A2, B2) in zip(parts, before, strict=True):
        assert torch.equal(A, A2)
        assert torch.equal(B, B2)


def test_the_result_shares_nothing_with_its_parts():
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    for kind in KINDS:
        pruning = {"density": 1.0} if kind.removesuffix("_svd") in PRUNED else {}
        before = A.clone(), B.clone()
        for t in combine(kind, [(A, B, 1.0)], [1.0], **pruning):
            t.fill_(3)
        assert torch.equal(A, before[0])
        assert torch.equal(B, before[1])


def test_refusals():
    part, other = (torch.ones(4, 6), torch.ones(5, 4), 1.0), (torch.ones(2, 6), torch.ones(5, 2), 1)
    cases = [
        ("liner", [part], [1.0], {}, "did you mean 'linear'"),
        ("ties_sdv", [part], [1.0], {}, "did you mean 'ties_svd'"),
        ("linear", [], [], {}, "there is no adapter to combine"),
        ("linear", [part], [1.0, 2.0], {}, "1 adapters need as many weights, not 2"),
        ("cat", [part], [math.nan], {}, "a weight must be finite, not nan"),
        ("linear", [part, other], [1, 1], {}, "needs adapters of one rank, and these have \\[2, 4"),
        ("cat", [part, (torch.ones(4, 7), part[1], 1)], [1, 1], {}, "do not fit a layer of 6 inp"),
        ("cat", [(part[0], torch.ones(5, 3), 1)], [1], {}, "do not fit a layer of 6 inputs and 5"),
        ("ties", [part], [1], {}, "'ties' needs a density"),
        (
            "dare_ties_svd",
            [part],
            [1],
            {"density": 0.0},
            "density is 0.0; it must be in \\(0, 1\\]",
        ),
        ("ties", [part], [1], {"density": 1.5}, "density is 1.5; it must be in"),
        ("linear", [part], [1], {"density": 0.5}, "'linear' prunes nothing; leave density out"),
        ("svd", [part], [1], {"density": 0.5}, "'svd' prunes nothing"),
        ("cat", [part], [1], {"rank": 2}, "'cat' has a rank of its own"),
        ("svd", [part], [1], {"rank": 6}, "rank is 6; this layer has 5 at most"),
        ("svd", [part], [1], {"rank": 0}, "rank is 0"),
        ("svd", [part], [1], {"majority_sign_method": "totel"}, "did you mean 'total'"),
    ]
    for kind, parts, weights, options, message in cases:
        with pytest.raises(LorakitError, match=message):
            combine(kind, parts, weights, **options)


# ---- on a module ----


def two_adapters():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8), nn.Embedding(9, 8))
    lk.attach(module, lk.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"]), name="a")
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["1", "2"], use_rslora=True), name="b")
    for name, p in module.named_parameters():
        if "adapters" in name:
            nn.init.normal_(p)
    return module


@pytest.mark.parametrize(("kind", "tolerance"), [("cat", 1e-6), ("svd", 1e-5)])
def test_a_combined_adapter_computes_the_sum(kind, tolerance):
    """cat keeps all; svd of the whole rank too. A layer of one adapter alone has this one's."""
    module = two_adapters()
    x, weights = torch.randn(5, 10), {"a": 0.7, "b": -1.5}
    base = module[1].original(x)
    truth, alone = base.clone(), module[0].original(torch.eye(12))
    for name, weight in weights.items():
        lk.set_adapter(module, name)
        truth += weight * (module[1](x) - base)
    lk.set_adapter(module, "a")
    alone = alone + 0.7 * (module[0](torch.eye(12)) - alone)
    rank = {"rank": 5} if kind == "svd" else {}
    if kind == "svd":  # a layer of rank 3 alone has two zero rows then
        lk.combine_adapters(module, ["a", "b"], [0.7, -1.5], "c", kind, **rank)
    else:
        lk.combine_adapters(module, ["a", "b"], [0.7, -1.5], "c", kind)
    assert lk.adapter_names(module) == ["a", "b", "c"]
    assert not any(p.requires_grad for n, p in module.named_parameters() if ".c." in n)
    lk.set_adapter(module, "c")
    # fp32 products of rank 5 instead of two of rank 3 and 2; svd adds its own rounding
    assert (module[1](x) - truth).abs().max() <= 10 * tolerance * truth.abs().max()
    assert (module[0](torch.eye(12)) - alone).abs().max() <= 10 * tolerance * alone.abs().max()


def test_a_combined_adapter_is_saved(tmp_path):
    module = two_adapters()
    lk.combine_adapters(module, ["a", "b"], [1.0, 1.0], "c", "cat")
    lk.set_adapter(module, "c")
    lk.save_adapter(module, tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8), nn.Embedding(9, 8))
    lk.load_adapter(plain, tmp_path)
    x = torch.randn(5, 10)
    assert torch.equal(plain[1](x), module[1](x))
    assert torch.equal(plain[2](torch.arange(9)), module[2](torch.arange(9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "d"]}, "no adapter 'd'"),
        ({"name": "b"}, "'b' is attached already"),
        ({"weights": [1.0]}, "one weight for each adapter"),
        ({"names": [], "weights": []}, "name at least one adapter"),
        ({"kind": "linaer"}, "did you mean 'linear'"),
        ({"kind": "linear"}, r"one rank, and these have \[2, 3\]"),
    ],
)
def test_combining_refuses_and_changes_nothing(change, message):
    module = two_adapters()
    options = {"names": ["a", "b"], "weights": [1.0, 1.0], "name": "c", "kind": "cat"} | change
    with pytest.raises(LorakitError, match=message):
        lk.combine_adapters(module, **options)
    assert lk.adapter_names(module) == ["a", "b"]


def test_a_dora_adapter_is_not_combined():
    module = two_adapters()
    lk.attach(module, lk.LoraConfig(r=3, target_modules=["0"], use_dora=True), name="d")
    with pytest.raises(LorakitError, match="'d' holds more than A and B in 0"):
        lk.combine_adapters(module, ["a", "d"], [1.0, 1.0], "c", "cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": None}, "names and weights must be lists"),
        ({"weights": 1.0}, "names and weights must be lists"),
        ({"weights": ["0.5"]}, "a weight must be a number, not '0.5'"),
        ({"weights": [10**400]}, "a weight must be a number, not 1000"),
        ({"rank": 2.5}, "rank must be a number, not 2.5"),
        ({"rank": True}, "rank must be a number, not True"),
        ({"density": "x"}, "density must be a number, not 'x'"),
        ({"seed": "a"}, "seed must be a number, not 'a'"),
    ],
)
def test_arguments_of_the_wrong_type(change, message):
    module = lk.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), lk.LoraConfig(r=2), name="a")
    options = {"names": ["a"], "weights": [1.0], "name": "b", **change}
    with pytest.raises(lk.LorakitError, match=message):
        lk.combine_adapters(module, **options)
    assert lk.adapter_names(module) == ["a"]
