"""The bytes of single tokens: together they are the text."""

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, normalizers

import lorakit as lk
from lorakit.models.tokenizer import Tokenizer
from lorakit.serving.tokens import TokenTexts


@pytest.fixture(scope="module")
def smollm2_texts(smollm2):
    return TokenTexts(lk.load_tokenizer(smollm2))


@pytest.fixture(scope="module")
def piece_texts():
    """A vocabulary as SentencePiece's: letters, a word with its space, and the 256 bytes."""
    words = ["<unk>", "▁", "a", "b", "▁a", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return TokenTexts(Tokenizer(backend, {}))


@pytest.mark.parametrize("kind", ["smollm2_texts", "piece_texts"])
@given(text=st.text(max_size=20))
def test_the_bytes_of_tokens_are_those_of_the_text(request, kind, text):
    texts = request.getfixturevalue(kind)
    ids = texts.tok.encode(text, add_special_tokens=False)
    # "▁" itself becomes a space in SentencePiece, and SmolLM2 has no token for some bytes
    assume(texts.tok.decode(ids) == text)
    assert b"".join(map(texts.bytes_of, ids)) == text.encode()


def test_special_tokens_have_their_names(smollm2_texts):
    end = smollm2_texts.tok.eos_token_id
    assert smollm2_texts.text_of(end) == smollm2_texts.tok.special_tokens["eos_token"]
    assert smollm2_texts.bytes_of(10**6) == b""  # a row of the model without a token
