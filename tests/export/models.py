"""Tiny models on disk for the tests of exporting, with a tokenizer that llama.cpp has."""

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from lorakit.models.tokenizer import Tokenizer
from tests.conftest import tiny
from tests.models.test_gguf import VARIANTS

SIZE = 300  # of the vocabulary, more than the tokenizer has
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("1", "2")]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


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
    tiny(model_type, **{**own, "vocab_size": SIZE, **settings}).save_pretrained(path)
    byte_level().save(path)
    return path
