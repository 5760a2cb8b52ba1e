import pytest

import lorakit as lk
from lorakit.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def tiny(tok):
    """The tokenizer of the tiny model with a chat template of one's own."""

    def build(template):
        return Tokenizer(tok.backend, tok.special_tokens, template)

    return build
