"""Every variant of an adapter against peft: files both ways, what it computes, how it trains."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.adapters.parity import (
    IDS,
    assert_same,
    disturb,
    logits_of,
    ours_config,
    peft_attach,
    peft_load,
    peft_save,
    trained,
)

STARTS = ("olora", "pissa", "pissa_niter_4")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


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
