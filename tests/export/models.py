"""Tiny models on disk for the tests of exporting, with a tokenizer that llama.cpp has."""

import json
import math
from functools import partial

import numpy as np
import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.files.gguf import NewTensor, Typed, read_header, write_gguf
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import tiny
from tests.models.test_gguf import VARIANTS

SIZE = 300  # of the vocabulary, more than the tokenizer has
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("1", "2")]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
ASKS = TEMPLATE + "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"


def byte_level():
    """A byte-level tokenizer of 266 tokens, which cuts as GPT-2's does."""
    first = [*SPECIAL[:3], *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocab = {token: i for i, token in enumerate(first)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special, TEMPLATE)


def write_model(path, variant, **settings):
    """A tiny model of tests/models/test_gguf.py, with the tokenizer beside it."""
    model_type, own = VARIANTS[variant]
    if "vocab_size_per_layer_input" in own:
        settings = {"vocab_size_per_layer_input": SIZE, **settings}
    tiny(model_type, **{**own, "vocab_size": SIZE, **settings}).save_pretrained(path)
    byte_level().save(path)
    return path


def write_again(plain, path, more):
    """Write a GGUF file of fp32 tensors again, with more metadata."""
    header = read_header(plain)
    metadata = {key: Typed(value, *header.types[key]) for key, value in header.metadata.items()}
    metadata |= more | {"general.architecture": header.metadata["general.architecture"]}
    tensors = [
        NewTensor(name, info.shape, "F32", partial(np.fromfile, plain, np.uint8, 4 * n, "", at))
        for name, info in header.tensors.items()
        for n, at in [(math.prod(info.shape), info.offset)]
    ]
    write_gguf(path, metadata, tensors)


def train_adapter(directory, path, std=0.1, **config):
    """An adapter that changes what a model of `directory` computes, saved; and that model."""
    torch.manual_seed(0)
    model = lk.load_model(directory, dtype="float32")
    lk.attach(
        model, lk.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": "all-linear", **config})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, std)
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    lk.save_adapter(model, path)
    return model


def name_base(adapter, directory):
    """Let an adapter's config name the model that it was trained on."""
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": str(directory)}
    file.write_text(json.dumps(values))
