import pytest

import lorakit as lk
from lorakit.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    """The tokenizer of the tiny model with a chat template of one's own."""
    tok = lk.load_tokenizer(tiny_dir)

    def build(template):
        return Tokenizer(tok.backend, tok.special_tokens, template)

    return build
