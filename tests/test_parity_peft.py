"""Every variant of an adapter against peft: its files both ways, what it computes, how it trains."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lorakit as lk
from lorakit.attached import attached
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
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
}

# name -> (base, options of both LoraConfigs)
CASES = {
    "plain": ("llama", {}),
    "plain, qwen2": ("qwen2", {}),
    "plain, gemma3": ("gemma3", {}),
    "plain, gemma3 tied": ("gemma3 tied", {}),
    "plain, mixtral": ("mixtral", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora, biases": ("biases", {"use_dora": True}),
    "dora, gemma3 tied": ("gemma3 tied", {"use_dora": True, "use_rslora": True}),
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
    "head and embedding": ("gemma3", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"trainable_token_indices": [3, 90, 5]}),
    "tokens by name": ("gemma3", {"trainable_token_indices": {"embed_tokens": [3, 90, 5]}}),
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
        for ending, parameter in each.tensors(name).items()
    }


def logits_of(module, ids=IDS):
    with torch.no_grad():
        found = module(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same(found, expected):
    """1e-5 of the largest: the same formulas in fp32, sums in another order."""
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, f"{difference:.1e}"


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

    _, theirs, ours = bases(base)
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
