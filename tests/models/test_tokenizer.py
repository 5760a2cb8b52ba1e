"""Saving a tokenizer, a chat without a template, and text that is not Unicode."""

import pytest

import lorakit as lk
from lorakit.models.tokenizer import Tokenizer
from tests.models.sentencepiece import TEXTS


def test_save(smollm2, directory, tmp_path):
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Hi"}]
    for tok in map(lk.load_tokenizer, (smollm2, directory)):
        tok.save(tmp_path / "saved")
        again = lk.load_tokenizer(tmp_path / "saved")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
        for text in TEXTS:
            assert again.encode(text) == tok.encode(text) == theirs.encode(text)
        assert again.special_tokens == tok.special_tokens
        rendered = tok.apply_chat_template(chat, tokenize=False)
        assert again.apply_chat_template(chat, tokenize=False) == rendered
        assert theirs.apply_chat_template(chat, tokenize=False) == rendered


def test_text_that_is_not_unicode(directory):
    with pytest.raises(lk.LorakitError, match="not valid Unicode text"):
        lk.load_tokenizer(directory).encode("\ud83d cut")


def test_no_template(directory):
    tok = lk.load_tokenizer(directory)
    bare = Tokenizer(tok.backend, tok.special_tokens)
    with pytest.raises(lk.LorakitError, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "x"}])
