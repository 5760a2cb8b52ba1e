"""The tokenizers that the tests of data share."""

from types import SimpleNamespace

import pytest

import lorakit as lk
from lorakit.data.encode import TODAY
from lorakit.models.tokenizer import Tokenizer
from tests.chat_templates import BOS_EOS, SPECIAL, TEMPLATES
from tests.models.gguf_files import write_vocabulary
from tests.models.sentencepiece import spm_metadata


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def tiny(tok):
    """The tokenizer of the tiny model with a chat template of one's own."""

    def build(template):
        return Tokenizer(tok.backend, tok.special_tokens, template)

    return build


@pytest.fixture(scope="module")
def today():
    """transformers' templates on the day of ours."""
    from transformers.utils import chat_template_utils

    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(now=lambda: TODAY)
        patch.setattr(chat_template_utils, "datetime", clock)
        yield


@pytest.fixture(scope="session")
def make(smollm2, tmp_path_factory):
    """A tokenizer with a family's template and special tokens, and transformers' of its files."""
    from transformers import AutoTokenizer

    made = {}

    def build(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            if family in ("gemma3", "mistral"):  # SentencePiece
                options = {"add_space_prefix": family == "mistral"}
                tok = lk.load_tokenizer(write_vocabulary(path / "m.gguf", spm_metadata(**options)))
            else:
                tok = lk.load_tokenizer(smollm2)
            tok.backend.add_special_tokens(SPECIAL[family])
            bos, eos = BOS_EOS[family]
            special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
            Tokenizer(tok.backend, special, TEMPLATES[family]).save(path / "hf")
            made[family] = (
                lk.load_tokenizer(path / "hf"),
                AutoTokenizer.from_pretrained(path / "hf"),
            )
        return made[family]

    return build
