"""The maths of EVA, against PEFT's incremental PCA and its whole procedure, and against the
decomposition of all rows in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict, initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

import lorakit as lk
from lorakit.adapters.eva import IncrementalSVD, redistribute
from lorakit.adapters.layers.lora import LoraLinear, lora_layers
from lorakit.config.errors import LorakitError


def rows(n, features, seed=0, decay=0.8, rank=None, offset=3.0):
    """Random rows whose directions have deviations decay^i, `rank` of them, about a mean."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=g)).Q[: rank or features]
    x = torch.randn(n, len(basis), generator=g) * decay ** torch.arange(len(basis))
    return x @ basis + offset * torch.randn(features, generator=g)


def fitted(batches, k):
    svd = IncrementalSVD(k)
    for x in batches:
        svd.update(x)
    return svd


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double()).abs()


@pytest.mark.parametrize("features", [8, 12, 16])
@pytest.mark.parametrize("sizes", [[40], [30, 20, 50], [8] * 12])
def test_equals_peft_incremental_pca(features, sizes):
    """Its plain mode, whose decomposition of each batch is exact; ours is for 2 k >= features."""
    batches = rows(sum(sizes), features).split(sizes)
    peft = IncrementalPCA(n_components=8)
    for x in batches:
        peft.partial_fit(x)
    svd = fitted(batches, 8)
    assert svd.rows == sum(sizes) == peft.n_samples_seen_
    # PEFT goes on in fp64 after the first batch; fp32 turns a vector by 6e-8 of the largest value
    # over the gap to its neighbour, here 0.8^7 / 5 = 1 / 25 or more: 1e-5 with room for the batches
    components = peft.components_.float()
    signs = (svd.components * components).sum(1, keepdim=True).sign()
    torch.testing.assert_close(signs * svd.components, components, rtol=0, atol=1e-5)
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(svd.singular_values, peft.singular_values_.float(), **close)
    torch.testing.assert_close(svd.explained_variance, peft.explained_variance_.float(), **close)
    torch.testing.assert_close(
        svd.explained_variance_ratio, peft.explained_variance_ratio_.float(), **close
    )


@given(
    st.integers(1, 6),
    st.integers(2, 24),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_rows_of_low_rank_give_their_own_decomposition(k, features, sizes, seed):
    """Rows in k directions about a mean: nothing is cut away, however they were split."""
    k = min(k, features)
    sizes = [*sizes, k]  # enough to take
    x = rows(sum(sizes), features, seed, rank=k)
    svd = fitted(x.split(sizes), k)
    taken = x[: svd.rows].double()
    centred = taken - taken.mean(0)
    values = torch.linalg.svdvals(centred)
    values = torch.cat([values, values.new_zeros(k)])[:k]
    # fp32 of rows of size 3 sqrt(features): 1e-5 of their norm
    size = 1e-5 * taken.norm()
    assert (svd.singular_values.double() - values).norm() < size
    found = svd.components.double()
    assert (centred - centred @ found.t() @ found).norm() < size
    assert torch.allclose(found @ found.t(), torch.eye(k, dtype=torch.float64), atol=1e-5)


@given(
    st.integers(1, 12),
    st.lists(st.integers(12, 40), min_size=1, max_size=5),
    st.floats(0.5, 1.0),
    st.integers(0, 1000),
)
def test_what_is_kept_is_at_most_the_best(k, sizes, decay, seed):
    """S never exceeds the singular values of all rows, and the whole variance is exact."""
    x = rows(sum(sizes), 12, seed, decay)
    svd = fitted(x.split(sizes), k)
    assert svd.rows == len(x)
    centred = x.double() - x.double().mean(0)
    values = torch.linalg.svdvals(centred)
    # fp32 of 12 columns: 1e-5
    assert (svd.singular_values <= values[:k] * (1 + 1e-5) + 1e-5).all()
    whole = svd.singular_values.double().square().sum() / svd.explained_variance_ratio.sum()
    assert whole.item() == pytest.approx(centred.square().sum().item(), rel=1e-5)
    expected = svd.singular_values.square() / (len(x) - 1)
    torch.testing.assert_close(svd.explained_variance, expected)
    if k == 12:
        torch.testing.assert_close(svd.singular_values.double(), values, rtol=1e-4, atol=1e-5)
        assert svd.explained_variance_ratio.sum().item() == pytest.approx(1, rel=1e-5)


def test_the_leading_directions_of_a_wide_layer():
    """Subspace iteration in each batch, and k of 256 directions: what EVA is used for."""
    x = rows(2000, 256, decay=0.9)
    svd = fitted(x.split(250), 16)
    centred = x.double() - x.double().mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    # what each batch cuts is a tenth below the last direction kept: that one turns by a cosine of
    # 1 - 3e-3 and loses 3e-3 of its size (measured, three seeds), the first eight hardly at all
    found = cosines(svd.components, vectors[:16])
    assert (found > 0.99).all()
    assert (found[:8] > 1 - 1e-4).all()
    lost = 1 - svd.singular_values / values[:16]
    assert ((lost > -1e-5) & (lost < 0.01)).all()  # fp32 of nothing lost
    again = fitted(x.split(250), 16)
    assert torch.equal(svd.components, again.components)


def test_rows_wait_until_there_are_enough():
    x = rows(20, 6)
    svd = IncrementalSVD(5)
    for small in x[:4].split(2):
        svd.update(small)
    assert svd.rows == 0
    assert svd.components.numel() == svd.explained_variance_ratio.numel() == 0
    assert not svd.converged(0.1).any()
    svd.update(x[4:10])
    assert svd.rows == 10
    whole = fitted([x[:10]], 5)
    assert torch.equal(svd.components, whole.components)
    svd.update(x[10:13])
    assert svd.rows == 10
    assert torch.equal(svd.components, whole.components)


def test_more_components_than_features():
    svd = fitted([rows(20, 6), rows(9, 6)], 9)
    assert svd.components.shape == (6, 6)
    assert svd.similarity.shape == (6,)


def test_rows_that_never_vary():
    svd = fitted([torch.ones(5, 4), torch.ones(5, 4)], 2)
    assert torch.equal(svd.explained_variance_ratio, torch.zeros(2))
    assert torch.isfinite(svd.components).all()


def test_any_dtype_and_the_rows_and_generator_stay():
    state = torch.get_rng_state()
    x = rows(30, 40).bfloat16().requires_grad_()
    before = x.detach().clone()
    svd = fitted([x, x], 4)
    assert svd.components.dtype == svd.singular_values.dtype == torch.float32
    assert not svd.components.requires_grad
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(svd.components, fitted([x.float(), x.float()], 4).components)


@pytest.mark.parametrize("tau", [0.9, 0.99, 0.999])
def test_convergence_as_peft_sees_it(tau):
    """Its hook on the same batches; 2 k >= features, where its decomposition is exact too."""
    batches = rows(40 * 8, 10, decay=0.6).split(40)
    hook = SVDHook(n_components=5, sim_thresh=tau, name="layer")
    svd = IncrementalSVD(5)
    seen = set()
    for x in batches:
        hook(None, x, None)
        svd.update(x)
        assert torch.equal(svd.converged(tau), hook.converged)
        seen |= set(svd.converged(tau).tolist())
    assert seen == {True, False}


# ---- ranks ----


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.first.weight.data *= 0.6 ** torch.arange(16)[:, None]  # few directions in what follows

    def forward(self, x):
        h = torch.tanh(2 * self.first(x))
        return self.third(h * torch.sigmoid(self.second(h)))


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_a_model_gets_the_ranks_of_peft(rho, adjust):
    """The whole of PEFT's procedure on a model of three layers. The same batch twice, where it sees
    that all has settled."""
    r, alpha, names = 4, 6, ["first", "second", "third"]
    batches = [rows(128, 16, decay=0.9, offset=0.0)] * 2
    model, inputs = Tiny(), {name: [] for name in names}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        for x in batches:
            model(x)
    svds = {name: fitted(xs, round(r * rho)) for name, xs in inputs.items()}
    ratios = {name: svd.explained_variance_ratio for name, svd in svds.items()}
    ranks, alphas = redistribute(ratios, r, alpha, rho=rho, adjust_scaling_factors=adjust)

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=names,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, adjust_scaling_factors=adjust),
    )
    model = get_peft_model(Tiny(), config, low_cpu_mem_usage=True)
    own = {
        "forward_fn": lambda m, x: m(x),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    state = get_eva_state_dict(model, batches, **own)
    state = {name.rpartition(".")[2]: A for name, A in state.items()}
    assert ranks == {name: len(state[name]) for name in names}
    assert sum(ranks.values()) == 12
    if rho == 2:
        assert len(set(ranks.values())) > 1  # otherwise this compares nothing
    for name, A in state.items():
        found = cosines(svds[name].components[: ranks[name]], A)
        # where 2 k is all of the layer's 16 both are exact; else from two random starts
        assert (found > 1 - (1e-6 if rho == 2 else 1e-3)).all()

    initialize_lora_eva_weights(model, batches, **own)
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == ranks[name]
        assert layer.lora_alpha["default"] == pytest.approx(alphas[name])


ratio_lists = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)


@given(
    st.lists(ratio_lists, min_size=1, max_size=6),
    st.integers(1, 6),
    st.floats(1, 4),
    st.integers(1, 64),
)
def test_the_budget_goes_to_the_largest(values, r, rho, alpha):
    ratios = {f"layer{i}": v for i, v in enumerate(values)}
    ranks, alphas = redistribute(ratios, r, alpha, rho=rho)
    most = {name: min(round(r * rho), len(v)) for name, v in ratios.items()}
    assert list(ranks) == list(alphas) == list(ratios)
    assert sum(ranks.values()) == min(r * len(ratios), sum(most.values()))
    assert all(0 <= ranks[name] <= most[name] for name in ratios)
    given_ = [v for name in ratios for v in ratios[name][: ranks[name]].tolist()]
    denied = [v for name in ratios for v in ratios[name][ranks[name] : most[name]].tolist()]
    assert not denied or not given_ or min(given_) >= max(denied)
    for name, rank in ranks.items():
        assert alphas[name] * r == pytest.approx(alpha * rank)  # the scaling alpha / r stays
    assert set(
        redistribute(ratios, r, alpha, rho=rho, adjust_scaling_factors=False)[1].values()
    ) == {alpha}


@given(ratio_lists, st.integers(2, 4), st.integers(1, 6))
def test_layers_that_read_the_same_share_alike(values, n, r):
    ranks, _ = redistribute({str(i): values for i in range(n)}, r, 1.0)
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)


def test_refusals():
    with pytest.raises(LorakitError, match="n_components must be positive, not 0"):
        IncrementalSVD(0)
    svd = IncrementalSVD(2)
    with pytest.raises(LorakitError, match=r"must be \[n, features\], not \[2, 3, 4\]"):
        svd.update(torch.ones(2, 3, 4))
    svd.update(torch.ones(1, 4))
    with pytest.raises(LorakitError, match=r"must be \[n, 4\], not \[2, 5\]"):
        svd.update(torch.ones(2, 5))
    svd.update(rows(5, 4))
    with pytest.raises(LorakitError, match=r"must be \[n, 4\], not \[2, 5\]"):
        svd.update(torch.ones(2, 5))
    before = svd.components.clone()
    with pytest.raises(LorakitError, match="hold NaN or infinite values"):
        svd.update(torch.full((5, 4), torch.nan))
    assert torch.equal(svd.components, before)
    with pytest.raises(LorakitError, match="rho must be at least 1, not 0.5"):
        redistribute({"a": torch.ones(2)}, 2, 1.0, rho=0.5)
    with pytest.raises(LorakitError, match="r must be positive, not 0"):
        redistribute({"a": torch.ones(2)}, 0, 1.0)


# ---- on a module ----


def test_an_adapter_starts_from_what_its_layers_read():
    """Ranks as PEFT gives them, the update still zero, and A along the inputs."""
    r, names = 4, ["first", "second", "third"]
    batches = [rows(128, 16, decay=0.9, offset=0.0)] * 2
    theirs = get_peft_model(
        Tiny(),
        LoraConfig(r=r, lora_alpha=6, target_modules=names, init_lora_weights="eva",
                   eva_config=EvaConfig(rho=2.0)),
        low_cpu_mem_usage=True,
    )  # fmt: skip
    own = {
        "forward_fn": lambda m, x: m(x),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    state = get_eva_state_dict(theirs, batches, **own)
    ours = Tiny()
    before = ours(batches[0])
    config = lk.LoraConfig(r=r, lora_alpha=6, target_modules=names, init_lora_weights="eva")
    lk.attach(ours, config)
    result = lk.eva(ours, batches, rho=2.0)
    assert result.converged
    assert result.batches == 2
    assert result.ranks == {n.rpartition(".")[2]: len(A) for n, A in state.items()}
    layers = lora_layers(ours)
    assert torch.equal(ours(batches[0]), before)
    for key, A in state.items():
        layer = layers[key.rpartition(".")[2]]
        assert layer.part.scaling == 6 / r
        assert layer.part.awaits is None
        # single directions whose variance is nearly equal may be found turned into each other
        assert torch.linalg.svdvals(A.float() @ layer.lora_A.detach().t()).min() > 0.99


def test_a_layer_without_rank_is_left_out(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(8))
        module[0].bias.zero_()
    x = torch.randn(64, 8) * torch.tensor([3.0] + [1e-3] * 7)
    module[1].register_forward_pre_hook(lambda m, args: (torch.randn(64, 8),))
    lk.attach(module, lk.LoraConfig(r=1, target_modules=["0", "1"], init_lora_weights="eva"))
    result = lk.eva(module, [x, x], rho=2.0, tau=0.0)
    assert sum(result.ranks.values()) == 2
    assert all((place in lora_layers(module)) == (r > 0) for place, r in result.ranks.items())
    lk.save_adapter(module, tmp_path)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.b = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():  # `a` reads few directions, `b` more
            self.embed.weight *= 0.2 ** torch.arange(16)
            self.a.weight *= 30

    def forward(self, ids):
        return self.b(torch.tanh(self.a(self.embed(ids))))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed", "a", "b"]},
        {"target_modules": ["a", "b"], "trainable_token_indices": [1, 2]},
        {"target_modules": ["a", "b"], "use_dora": True},
        {"target_modules": ["a", "b"], "lora_bias": True, "init_lora_weights": True},
        {"target_modules": ["a", "b"], "bias": "lora_only"},
    ],
    ids=["embedding", "tokens", "dora", "lora_bias", "bias"],
)
def test_the_output_stays_and_the_file_loads(tmp_path, options):
    """Whatever the adapter held before, and whatever else is adapted beside the linear layers."""
    module = Reader()
    batches = [torch.randint(0, 40, (8, 12)) for _ in range(3)]
    before = module(batches[0])
    lk.attach(module, lk.LoraConfig(**{"r": 3, "init_lora_weights": "eva", **options}))
    with torch.no_grad():
        for each in lora_layers(module).values():
            if isinstance(each, LoraLinear):
                for parameter in each.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
    result = lk.eva(module, batches)
    assert len(set(result.ranks.values())) > 1  # or nothing would be in the patterns
    # fp32 sums of 16 products in another order
    torch.testing.assert_close(module(batches[0]), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lk.save_adapter(module, tmp_path)
    again = lk.load_adapter(Reader(), tmp_path)
    assert torch.equal(again(batches[0]), module(batches[0]))


def test_a_merged_adapter_is_not_started():
    module = nn.Sequential(nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, init_lora_weights="eva"))
    lk.merge(module)
    with pytest.raises(lk.LorakitError, match="the adapter is merged; unmerge it"):
        lk.eva(module, [torch.randn(64, 8)])


def test_eva_refuses_and_changes_nothing():
    module = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.eva(module, [])
    lk.attach(module, lk.LoraConfig(r=2, init_lora_weights="eva"))
    A = module[0].lora_A
    with pytest.raises(lk.LorakitError, match="0 saw too few rows in 0 batches"):
        lk.eva(module, [])
    with pytest.raises(lk.LorakitError, match="NaN or infinite"):
        lk.eva(module, [torch.full((9, 8), float("nan"))])
    assert module[0].lora_A is A
    assert module[0].part.awaits == "eva"
    assert not module[0]._forward_pre_hooks


def test_padding_does_not_count(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    config = lk.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="eva")
    ids = torch.arange(24).view(2, 12)
    padded = torch.nn.functional.pad(ids, (0, 5), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    found = []
    for batch in (ids, {"input_ids": padded, "attention_mask": mask}):
        lk.attach(model, config)
        lk.eva(model, [batch], rho=1.0)
        found.append(lora_layers(model)["model.layers.0.self_attn.o_proj"].lora_A.detach())
        lk.detach(model)
    # the same rows, from products of another size: fp32 sums in another order
    assert torch.linalg.svdvals(found[0] @ found[1].t()).min() > 0.9999


def test_training_starts_it(tiny_dir, tmp_path, capsys):
    model, tok = lk.load_model(tiny_dir, dtype="float32"), lk.load_tokenizer(tiny_dir)
    lk.attach(model, lk.LoraConfig(r=4, init_lora_weights="eva"))
    data = [{"prompt": "one two", "completion": " three four"}] * 12
    lk.train(model, tok, data, lk.TrainConfig(output_dir=str(tmp_path), max_steps=2))
    assert "EVA: " in capsys.readouterr().out
    again = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(ids), model.eval()(ids))
