"""tekken.json gives the ids of Mistral's rule: a word's neighbours of the lowest rank are joined.

With the published vocabulary (tekken_240911.json of the package mistral-common) tiktoken, on which
Mistral's own code stands, gave the same ids for 1,017 texts.
"""

import base64
import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.models.tokenizer_files import PRE_TOKENIZERS
from tests.models.sentencepiece import PRE_TEXTS

[PATTERN] = PRE_TOKENIZERS["tekken"]
SPECIAL = 30  # ids before the first byte


def bytes_of(token):
    """What a token of byte-level BPE stands for."""
    return tokenizers.decoders.ByteLevel().decode([token]).encode()


def ranked():
    """A vocabulary in the order of ranks, which a tokenizer learned from a few texts."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters])
    # no token of half a character, whose bytes could not be read off its text
    texts = [text.encode("ascii", "ignore").decode() for text in PRE_TEXTS]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False)
    backend.train_from_iterator([*texts, "aaaa aaaaaa banana"] * 3, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    learned = dict.fromkeys(bytes_of(left + right) for left, right in merges)
    return [bytes([value]) for value in range(256)] + [*learned]


RANKED = ranked()


def write_tekken(folder, **changed):
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(RANKED)
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(RANKED),
        "default_vocab_size": SPECIAL + len(RANKED) - 3,  # the last three are left out
        "default_num_special_tokens": SPECIAL,
        "version": "v3",
    }
    values = {"config": config | changed.pop("config", {}), "vocab": entries, **changed}
    (folder / "tekken.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return lk.load_tokenizer(write_tekken(tmp_path_factory.mktemp("tekken")))


def joined(word):
    """The ids of a word: join the leftmost neighbours of the lowest rank until none are left."""
    ranks = {token: rank for rank, token in enumerate(RANKED[:-3])}
    parts = [word] if word in ranks else [bytes([value]) for value in word]
    while True:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        found = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not found:
            return [SPECIAL + ranks[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [unions[i]]


def expected(text):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    words = [word.encode() for word, _ in split.pre_tokenize_str(text)]
    return [1] + [number for word in words for number in joined(word)]


@pytest.mark.parametrize("text", [text for text in PRE_TEXTS if "<|" not in text])
def test_ids_follow_the_ranks(tok, text):
    assert tok.encode(text) == expected(text)
    assert tok.decode(tok.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab nhte'd 1É\u0301\n/A中"), max_size=30))
def test_any_ids_follow_the_ranks(tok, text):
    assert tok.encode(text) == expected(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("HelloWorld IT's", ["Hello", "World", " IT", "'s"]),
        ("2024/\n\nEx", ["2", "0", "2", "4", "/\n\n", "Ex"]),
        ("École éÉté e\u0301a", ["École", " é", "Été", " e\u0301a"]),
    ],
)
def test_words_are_cut_where_mistral_cuts(text, words):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    assert [word for word, _ in split.pre_tokenize_str(text)] == words


def test_special_tokens(tok, tmp_path):
    assert len(tok) == SPECIAL + len(RANKED) - 3
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (1, 2, 11)
    assert tok.encode("[INST]ab[/INST]")[:2] == [1, 3]
    assert tok.backend.id_to_token(SPECIAL - 1) == f"<SPECIAL_{SPECIAL - 1}>"
    named = [{"rank": 1, "token_str": "<s>", "is_control": True}]
    named.append({"rank": 5, "token_str": "[THINK]", "is_control": True})
    own = lk.load_tokenizer(write_tekken(tmp_path, special_tokens=named))
    assert own.encode("[THINK]") == [1, 5]
    assert own.eos_token_id is None


def test_the_file_goes_along_until_the_tokenizer_changes(tok, tmp_path, caplog):
    tok.save(tmp_path / "same")
    assert (tmp_path / "same" / "tekken.json").read_bytes() == (
        tok.source / "tekken.json"
    ).read_bytes()
    assert not (tmp_path / "same" / "tokenizer.json").exists()
    changed = lk.load_tokenizer(tmp_path / "same")
    changed.add_special_tokens(["<|new|>"])
    changed.save(tmp_path / "changed")
    assert not (tmp_path / "changed" / "tekken.json").exists()
    assert "tekken.json" in caplog.text
    again = lk.load_tokenizer(tmp_path / "changed")
    assert again.encode("banana <|new|>") == changed.encode("banana <|new|>")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": {"default_vocab_size": 10_000}}, "has not 9970 different tokens"),
        ({"config": {"default_num_special_tokens": 3}}, "not a valid tokenizer"),
        ({"config": {"pattern": "("}}, "not a valid tokenizer"),
        ({"config": {"pattern": None}}, "not a valid tokenizer"),
        ({"vocab": None}, "not a valid tokenizer"),
        ({"vocab": [{"token_bytes": "?"}] * 700}, "has not"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}]}, "not a valid tokenizer"),
    ],
)
def test_a_damaged_file(tmp_path, changed, said):
    with pytest.raises(lk.LorakitError, match=said):
        lk.load_tokenizer(write_tekken(tmp_path, **changed))
