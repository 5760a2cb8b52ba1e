"""Every variant of an adapter against peft: files both ways, what it computes, how it trains."""

import copy
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.conftest import tiny

IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
STARTS = ("olora", "pissa", "pissa_niter_4")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

BASES = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "gemma3": ("gemma3_text", {"head_dim": 12, "sliding_window": 6}),
    "gemma3 tied": (
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
}

# name -> (base, options of both LoraConfigs)
CASES = {
    "plain": ("llama", {}),
    "plain, qwen2": ("qwen2", {}),
    "plain, gemma3": ("gemma3", {}),
    "plain, gemma3 tied": ("gemma3 tied", {}),
    "plain, mistral": ("mistral", {}),
    "plain, mixtral": ("mixtral", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora, biases": ("biases", {"use_dora": True}),
    "dora, gemma3 tied": ("gemma3 tied", {"use_dora": True, "use_rslora": True}),
    "dora, mistral": ("mistral", {"use_dora": True, "use_rslora": True}),
    "dora, mixtral": ("mixtral", {"target_modules": ATTENTION, "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "lora_bias, rslora": ("biases", {"lora_bias": True, "use_rslora": True}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "bias lora_only, dora": ("biases", {"bias": "lora_only", "use_dora": True}),
    "bias all": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "bias all, lora_bias": ("biases", {"bias": "all", "lora_bias": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*(up|down)_proj": 6},
            "alpha_pattern": {"q_proj": 5, "0.mlp.gate_proj": 3.5},
            "use_rslora": True,
        },
    ),
    "exclude_modules": ("llama", {"exclude_modules": ["up_proj", "0.self_attn.q_proj"]}),
    "exclude_modules by regex": ("qwen2", {"exclude_modules": r".*\.1\.mlp\..*"}),
    "layers_to_transform": (
        "gemma3",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    ),
    "layers_pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
    ),
    "regex": ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "dropout, dora": ("llama", {"lora_dropout": 0.5, "use_dora": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa, qwen2": ("qwen2", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa, mistral": ("mistral", {"init_lora_weights": "pissa"}),
    "pissa, mixtral": ("mixtral", {"target_modules": ATTENTION, "init_lora_weights": "pissa"}),
    "pissa, patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "pissa_niter_4": ("llama", {"init_lora_weights": "pissa_niter_4"}),
    "saved lm_head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved embed_tokens": ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    "saved norm": ("qwen2", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved, mistral": ("mistral", {"modules_to_save": ["lm_head", "norm"]}),
    "saved mlp": ("llama", {"modules_to_save": ["1.mlp", "lm_head"]}),
    "saved tied": (
        "llama tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved tied, gemma3": (
        "gemma3 tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, rslora": ("gemma3", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding, dora, gemma3": ("gemma3", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding tied": (
        "llama tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "embedding tied, gemma3": (
        "gemma3 tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head, dora": ("qwen2", {"target_modules": ["lm_head", "q_proj"], "use_dora": True}),
    "head and embedding, mistral": ("mistral", {"target_modules": ["lm_head", "embed_tokens"]}),
    "head and embedding": ("gemma3", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"trainable_token_indices": [3, 90, 5]}),
    "tokens by name": ("gemma3", {"trainable_token_indices": {"embed_tokens": [3, 90, 5]}}),
    "tokens, mistral": ("mistral", {"trainable_token_indices": [3, 90, 5]}),
    "tokens tied": ("llama tied", {"trainable_token_indices": [3, 90, 5]}),
    "tokens tied, gemma3": (
        "gemma3 tied",
        {"trainable_token_indices": {"embed_tokens": [3, 90]}, "ensure_weight_tying": True},
    ),
}
cases = pytest.mark.parametrize(("base", "options"), CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(name): a directory, transformers' model and ours of the same weights, both fresh."""
    from transformers import AutoModelForCausalLM

    known = {}

    def fresh(name):
        if name not in known:
            path = tmp_path_factory.mktemp("base")
            family, overrides = BASES[name]
            tiny(family, **overrides).save_pretrained(path)
            theirs = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            known[name] = path, theirs.eval(), lk.load_model(path, dtype="float32")
        path, *models = known[name]
        return path, *map(copy.deepcopy, models)

    return fresh


def ours_config(options):
    return lk.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


def peft_attach(theirs, options):
    import peft

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(theirs, config).eval()


def peft_load(theirs, path, **options):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(theirs, path, **options).eval()


def peft_save(theirs, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(path, **options)


def disturb(parameters):
    """So that every one of them, by name, matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter += 0.1 * torch.randn(parameter.shape)


def trained(module, name="default"):
    """The parameters of adapter `name`, by their names in peft's file."""
    return {
        f"base_model.model.{place}.{ending}": parameter
        for place, each in attached(module).items()
        if name in each.adapters
        for ending, parameter in each.trained_tensors(name).items()
    }


def logits_of(module, ids=IDS):
    with torch.no_grad():
        found = module(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same(found, expected):
    """1e-5 of the largest: the same formulas in fp32, sums in another order. Kernels that were told
    to do without vectors sum one by one, in the least exact order.
    """
    difference = (found - expected).abs().max() / expected.abs().max()
    limit = 2e-5 if os.environ.get("LORAKIT_ISA") == "scalar" else 1e-5
    assert difference <= limit, f"{difference:.1e}"


@cases
def test_we_load_pefts(bases, tmp_path, base, options):
    """What starts from the weight also as PEFT converts it to plain LoRA."""
    _, theirs, ours = bases(base)
    before, init = logits_of(ours), options.get("init_lora_weights")
    adapted = peft_attach(theirs, options)
    start, raw, converted = (tmp_path / name for name in ("start", "raw", "converted"))
    if init in STARTS:
        adapted.peft_config["default"].init_lora_weights = True  # as peft's guide has it
        peft_save(adapted, start)
        adapted.peft_config["default"].init_lora_weights = init
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, raw)
    expected = logits_of(adapted)
    # PEFT refuses to convert rsLoRA with patterns; nothing else keeps what is random
    if init in STARTS:
        peft_save(adapted, converted, path_initial_model_for_weight_conversion=str(start))
        other = copy.deepcopy(ours)
        lk.load_adapter(other, converted)
        assert_same(logits_of(other), expected)
    if init == "pissa_niter_4":
        with pytest.raises(lk.LorakitError, match="convert the adapter to plain LoRA first"):
            lk.load_adapter(ours, raw)
        return
    lk.load_adapter(ours, raw)
    assert_same(logits_of(ours), expected)
    assert (logits_of(ours) - before).abs().max() > 0.1


@cases
def test_peft_loads_ours(bases, tmp_path, base, options):
    _, theirs, ours = bases(base)
    torch.manual_seed(0)
    lk.attach(ours, ours_config(options))
    disturb(trained(ours))
    lk.save_adapter(ours, tmp_path)
    assert_same(logits_of(peft_load(theirs, tmp_path)), logits_of(ours))


@cases
def test_the_same_on_the_model_of_transformers(bases, tmp_path, base, options):
    """attach, load_adapter and save_adapter there and on the Decoder."""
    _, theirs, ours = bases(base)
    for model in (ours, theirs):
        torch.manual_seed(0)
        lk.attach(model, ours_config(options))
        disturb(trained(model))
    assert trained(ours).keys() == trained(theirs).keys()
    for name, parameter in trained(ours).items():
        assert torch.equal(parameter, trained(theirs)[name]), name
    assert_same(logits_of(theirs), logits_of(ours))
    lk.save_adapter(theirs, tmp_path)
    _, again, _ = bases(base)
    lk.load_adapter(again, tmp_path)
    assert_same(logits_of(again), logits_of(ours))


@cases
def test_merge_and_back(bases, tmp_path, base, options):
    from transformers import AutoModelForCausalLM

    _, _, ours = bases(base)
    weights = {name: p.clone() for name, p in ours.state_dict().items()}
    plain = logits_of(ours)
    torch.manual_seed(0)
    lk.attach(ours, ours_config(options))
    disturb(trained(ours))
    adapted = logits_of(ours)
    with lk.disable_adapters(ours):
        assert torch.equal(logits_of(ours), plain)
    lk.merge(ours)
    assert_same(logits_of(ours), adapted)
    with lk.disable_adapters(ours):
        assert torch.equal(logits_of(ours), plain)
    lk.save_model(ours, tmp_path)
    lk.unmerge(ours)
    assert torch.equal(logits_of(ours), adapted)
    lk.detach(ours)
    assert torch.equal(logits_of(ours), plain)
    assert {n: torch.equal(p, weights[n]) for n, p in ours.state_dict().items()} == dict.fromkeys(
        weights, True
    )
    assert_same(logits_of(lk.load_model(tmp_path, dtype="float32")), adapted)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert_same(logits_of(again), adapted)


def test_a_merge_that_is_not_finite_is_refused(bases):
    """Wherever the NaN stands."""
    for base, options in CASES.values():
        _, _, ours = bases(base)
        for kind in set(range(len(trained(lk.attach(ours, ours_config(options)))))) & {0, 5}:
            parameter = list(trained(ours).values())[kind]
            value = parameter.detach().clone()
            with torch.no_grad():
                parameter[-1] = float("nan")
            with pytest.raises(lk.LorakitError, match="holds NaN or infinite values"):
                lk.merge(ours)
            assert all(each.merged is None for each in attached(ours).values())
            with torch.no_grad():
                parameter.copy_(value)


# ---- training ----

TRAINED = [
    "plain",
    "plain, mistral",
    "plain, mixtral",
    "rslora",
    "dora",
    "dora, biases",
    "lora_bias",
    "bias lora_only",
    "bias lora_only, dora",
    "bias all",
    "pissa",
    "saved lm_head",
    "saved norm",
    "saved tied",
    "embedding",
    "embedding, dora",
    "embedding tied",
    "embedding tied, gemma3",
    "head",
    "head, dora",
    "tokens",
    "tokens tied",
    "tokens tied, gemma3",
]


@pytest.mark.parametrize("by", ["logits", "loss"])
@pytest.mark.parametrize("case", TRAINED)
def test_ten_steps_as_peft_makes_them(bases, tmp_path, case, by):
    base, options = CASES[case]
    _, theirs, ours = bases(base)
    adapted = peft_attach(theirs, options)
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, tmp_path / "before")
    lk.load_adapter(ours, tmp_path / "before")
    before = {name: p.detach().clone() for name, p in trained(ours).items()}

    def by_logits(model):
        found = model(IDS)
        logits = found if isinstance(found, torch.Tensor) else found.logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    def by_loss(model):
        total, count = model.loss(IDS, IDS)
        return total / count

    for model, loss in ((adapted, by_logits), (ours, by_loss if by == "loss" else by_logits)):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    peft_save(adapted, tmp_path / "after")
    expected = load_file(tmp_path / "after" / "adapter_model.safetensors")
    for name, parameter in trained(ours).items():
        largest = expected[name].abs().max()
        assert (parameter - before[name]).abs().max() > 2e-4 * largest, name  # each one moves
        # gradients are 1e-4 of their largest apart, see test_parity_hf, and small beside weights
        assert (parameter - expected[name]).abs().max() <= 1e-5 * largest, name


# ---- several adapters ----

SECOND = {
    "plain": {"target_modules": ["q_proj", "up_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "pissa": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 90]},
}
NAMES = ["a", "b", None, "a"]
# in a mixed batch; and it fails on a saved module that not every adapter has
PEFT_REFUSES = ("tokens", "dora", "saved")


@pytest.mark.parametrize("second", SECOND)
def test_two_adapters(bases, tmp_path, second):
    _, theirs, ours = bases("qwen2")
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(2))
    weights = {name: p.clone() for name, p in ours.state_dict().items()}
    plain = logits_of(ours, ids)
    options = {"a": {"target_modules": ["q_proj", "v_proj"]}, "b": {"r": 2, **SECOND[second]}}
    alone = {None: plain}
    for name in options:
        torch.manual_seed(0)
        lk.attach(ours, ours_config(options[name]), name=name)
        disturb(trained(ours, name))
        alone[name] = logits_of(ours, ids)
        lk.save_adapter(ours, tmp_path / name)
        assert {id(p) for p in trained(ours, name).values()} == {
            id(p) for p in ours.parameters() if p.requires_grad
        }
    assert lk.adapter_names(ours) == ["a", "b"]
    for name in ("a", "b", "a"):
        lk.set_adapter(ours, name)
        assert torch.equal(logits_of(ours, ids), alone[name])
        lk.merge(ours)
        assert_same(logits_of(ours, ids), alone[name])
        lk.unmerge(ours)
    with lk.adapter_rows(ours, NAMES):
        rows = logits_of(ours, ids)
        loss, _ = ours.loss(ids, ids)
    for i, name in enumerate(NAMES):
        assert_same(rows[i], alone[name][i])
    expected = F.cross_entropy(rows[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert abs(loss - expected) <= 1e-5 * expected
    with lk.disable_adapters(ours):
        assert torch.equal(logits_of(ours, ids), plain)

    adapted = peft_load(theirs, tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", adapter_name="b")
    adapted.eval()
    for name in ("a", "b"):
        adapted.set_adapter(name)
        assert_same(logits_of(adapted, ids), alone[name])
    if second not in PEFT_REFUSES:
        with torch.no_grad():
            mixed = adapted(ids, adapter_names=[name or "__base__" for name in NAMES]).logits
        assert_same(rows, mixed)

    lk.delete_adapter(ours, "a")
    assert torch.equal(logits_of(ours, ids), alone["b"])
    lk.detach(ours)
    assert torch.equal(logits_of(ours, ids), plain)
    after = ours.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["detach", "delete", "merge_and_unload", "unmerge"])
def test_a_module_in_two_places_gets_one_wrapper(how):
    torch.manual_seed(0)
    module, x = Twice(), torch.randn(3, 6)
    layer, plain = module.first, module(x)
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["first", "second"]))
    assert module.first is module.second
    assert len(trained(module)) == 2
    disturb(trained(module))
    adapted = module(x)
    if how == "unmerge":
        lk.merge(module)
        assert_same(module(x), adapted)
        lk.unmerge(module)
        assert torch.equal(module(x), adapted)
        return
    if how == "merge_and_unload":
        lk.merge_and_unload(module)
        assert_same(module(x), adapted)
        assert type(module.first) is nn.Linear
        assert module.first is module.second
        return
    lk.detach(module) if how == "detach" else lk.delete_adapter(module, "default")
    assert module.first is layer
    assert module.second is layer
    assert torch.equal(module(x), plain)


# ---- gradients ----

LINEAR = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "dora and bias": {"use_dora": True, "bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
}


def check_gradients(function, *tensors):
    """In fp64; the inputs are changed in place, so `function` may find them where they lie."""
    assert torch.autograd.gradcheck(lambda *_: function(), tensors)


@pytest.mark.parametrize("path", ["light", "fused", "by autograd"])
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_gradients_of_a_linear_layer(options, path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4))
    lk.attach(module, lk.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options))
    module.double()
    disturb(trained(module))
    layer, x = module[0], torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ways = {
        "light": lambda: layer(x),
        "fused": lambda: layer.compute(layer.part, x),
        "by autograd": lambda: layer.compute_by_autograd(layer.part, x),
    }
    parameters = list(trained(module).values())
    if options.get("use_dora"):  # the length is taken as a constant, as in the paper
        own = [layer.lora_A, layer.lora_B]
        parameters = [p for p in parameters if all(p is not other for other in own)]
        W, A, B = layer.base.dequantize(), *own
        length = (W + 1.5 * B @ A).norm(dim=1).detach()
        bias = layer.base.bias if layer.part.bias is None else layer.part.bias
        truth = x @ (W + 1.5 * B @ A).t() * (layer.part.magnitude / length) + bias
        weights = torch.randn(3, 4, dtype=torch.float64)
        expected = torch.autograd.grad((truth * weights).sum(), own)
        for grad, other in zip(
            torch.autograd.grad((ways[path]() * weights).sum(), own), expected, strict=True
        ):
            assert torch.allclose(grad, other)
    check_gradients(ways[path], x, *parameters)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed"]},
        {"target_modules": ["embed"], "use_dora": True},
        {"target_modules": ["other"], "trainable_token_indices": [3, 1]},
        {"target_modules": ["other"], "modules_to_save": ["embed"]},
    ],
    ids=["embedding", "dora", "rows", "saved"],
)
def test_gradients_of_embeddings_and_tied_heads(options, tied):
    torch.manual_seed(0)
    module = Tied().double()
    module.other = nn.Linear(2, 2)
    if not tied:
        module.head = nn.Linear(5, 7).double()
    config = lk.LoraConfig(r=2, lora_alpha=3, ensure_weight_tying=tied, **options)
    if tied and config.use_dora:
        with pytest.raises(lk.LorakitError, match="use_dora has no meaning"):
            lk.attach(module, config)
        return
    lk.attach(module, config)
    module.double()
    disturb(trained(module))
    ids = torch.tensor([[3, 1, 4], [1, 6, 3]])
    parameters = {n: p for n, p in trained(module).items() if ".other." not in n}
    check_gradients(
        lambda: module(ids),
        *(p for n, p in parameters.items() if not config.use_dora or "mag" in n),
    )
    found = module(ids)
    lk.merge(module)
    assert (module(ids) - found).abs().max() <= 1e-13  # all in fp64
    if tied:
        assert module.head.current_module().weight is module.embed.current_module().weight


# ---- tied models ----

TIED = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
@pytest.mark.parametrize("options", [*TIED, {"target_modules": ["lm_head", "q_proj"]}])
def test_tied_models_are_refused_as_they_are(bases, base, options):
    _, theirs, ours = bases(base)
    for model in (ours, theirs):
        before = {name: (type(m), id(m)) for name, m in model.named_modules()}
        with pytest.raises(lk.LorakitError):
            lk.attach(model, ours_config(options))
        assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
@pytest.mark.parametrize(
    "options", [*TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}]
)
def test_tied_models_stay_tied(bases, tmp_path, base, options):
    _, theirs, ours = bases(base)
    options = {**options, "ensure_weight_tying": True}
    for model in (ours, theirs):
        torch.manual_seed(0)
        lk.attach(model, ours_config(options))
        disturb(trained(model))
    expected = logits_of(ours)
    lk.merge(ours)
    lk.save_model(ours, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in written
    assert torch.equal(
        written["model.embed_tokens.weight"], ours.model.embed_tokens.current_module().weight
    )
    lk.merge_and_unload(theirs)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, written["model.embed_tokens.weight"])
    assert_same(logits_of(theirs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": r".*(lm_head|embed_tokens|q_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "init_lora_weights": False, "use_rslora": True},
    ],
)
def test_peft_puts_an_adapter_of_a_tied_head_on_the_embedding(bases, tmp_path, options):
    """And so its files are read."""
    _, theirs, ours = bases("llama tied")
    adapted = peft_attach(theirs, {**options, "ensure_weight_tying": True})
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, tmp_path)
    lk.load_adapter(ours, tmp_path)
    assert_same(logits_of(ours), logits_of(adapted))


@pytest.mark.parametrize(
    "options",
    [{"alpha_pattern": {"embed_tokens": 12}, "rank_pattern": {"embed_tokens": 2}}]
    + [{"init_lora_weights": "pissa", "use_rslora": rslora} for rslora in (False, True)],
)
def test_a_tied_embedding_with_a_rank_of_its_own(bases, tmp_path, options):
    _, theirs, ours = bases("llama tied")
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, **options}
    _, _, other = bases("llama tied")
    disturb(trained(lk.attach(ours, ours_config(options))))
    lk.save_adapter(ours, tmp_path)
    lk.load_adapter(other, tmp_path)
    assert_same(logits_of(other), logits_of(ours))
    assert_same(logits_of(peft_load(theirs, tmp_path)), logits_of(ours))


# ---- weights stored [in, out] ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},  # PEFT's OLoRA takes these weights for transposed ones
    ],
)
def test_gpt2(tmp_path, options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    base = GPT2LMHeadModel(config).eval()
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    options = {"target_modules": targets, "fan_in_fan_out": True, **options}
    ours, theirs, other = (copy.deepcopy(base) for _ in range(3))
    adapted = peft_attach(theirs, options)
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, tmp_path / "theirs")
    lk.load_adapter(ours, tmp_path / "theirs")
    expected, plain = logits_of(adapted), logits_of(base)
    assert_same(logits_of(ours), expected)
    assert (expected - plain).abs().max() > 0.1
    lk.save_adapter(ours, tmp_path / "ours")
    assert_same(logits_of(peft_load(other, tmp_path / "ours")), expected)
    lk.merge(ours)
    assert_same(logits_of(ours), expected)
    lk.detach(ours)
    assert torch.equal(logits_of(ours), plain)
