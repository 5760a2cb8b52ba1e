"""The border between a prompt and its completion, for every kind of tokenizer.

The ids are those of transformers on the whole text. The labels are compared with the bytes that the
tokens stand for, which know nothing of offsets.
"""

import json
import logging

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.encode import IGNORE, Encoder
from lorakit.data.schemas import Pair
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.models.gguf_files import write_vocabulary
from tests.models.sentencepiece import PRE_TEXTS, SPM_TEXTS, spm_metadata

KINDS = ["smollm2", "bytes", "split bytes", "gguf", "gguf prepend", "legacy", "first", "always"]


def llama2(form):
    """A tokenizer.json as Llama 2 and Mistral have it: BPE with bytes for what it does not know.

    The space in front of the text comes from the normalizer ("legacy") or from Metaspace.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, max_token_length=8, show_progress=False)
    backend.train_from_iterator([*PRE_TEXTS, *SPM_TEXTS] * 2, trainer)
    trained = json.loads(backend.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    first = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    pieces = dict.fromkeys([*first, *trained["vocab"]])
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if form == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def make(smollm2, tmp_path_factory):
    """A tokenizer by its kind, and transformers' of its tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    made = {}

    def build(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("tok")
            if kind == "smollm2":
                tok = lk.load_tokenizer(smollm2)
            elif "bytes" in kind:
                write_tokenizer(path)
                tok = lk.load_tokenizer(path)
                if kind == "split bytes":
                    split_bytes(tok.backend)
            elif "gguf" in kind:
                options = {"add_space_prefix": "prepend" in kind}
                tok = lk.load_tokenizer(write_vocabulary(path / "m.gguf", spm_metadata(**options)))
            else:
                tok = llama2(kind)
            tok.backend.save(str(path / "tokenizer.json"))
            theirs = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
            made[kind] = tok, theirs
        return made[kind]

    return build


def split_bytes(backend):
    """Let tokens hold two bytes that belong to two characters: the end of é, the start of 中."""
    from tokenizers import models

    state = json.loads(backend.to_str())["model"]
    vocab = {**state["vocab"], "©ä": len(state["vocab"])}
    backend.model = models.BPE(vocab=vocab, merges=[("©", "ä")])


def byte_value():
    """The byte of each character of a byte-level token (GPT-2, encoder.py, bytes_to_unicode)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_value()


def bytes_of(kind, token):
    """The bytes of the text that a token stands for."""
    if kind in ("smollm2", "bytes", "split bytes"):
        return bytes(BYTES[c] for c in token)
    if token.startswith("<0x") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


# Characters of every width in bytes, those that tokens join, and those that make marks of tokens.
BORDER = st.text("ab2+= \n.,'é中😀<s>▁", max_size=6) | st.sampled_from(
    ["The answer is", "It is ", "2+2=", "12 ", "", "  ", "<", "/s>", "héllo 😀", "한국어", "👩‍👩‍👧"]
)


@settings(max_examples=400)
@given(st.sampled_from(KINDS), BORDER, BORDER.filter(bool))
@example("legacy", "2+2=", "4")
@example("first", "2+2=", "4")
@example("legacy", "", "4")
@example("smollm2", "hot is ", "cold")
@example("split bytes", "é", "中")
@example("smollm2", "a 😀", "😀 b")
def test_ids_are_those_of_the_whole_text(make, kind, prompt, completion):
    """Ids of prompt and completion = transformers' ids of both as one text, then an end token.

    A token is learned if and only if one of its bytes belongs to the completion.
    """
    tok, theirs = make(kind)
    row = Pair(prompt, completion, "row 0")
    try:
        ids, labels = Encoder(tok)(row)
    except lk.LorakitError as error:
        assert "twice" in str(error)  # the prompt starts with <s>
        return
    whole = theirs.encode(prompt + completion)
    end = [tok.eos_token_id]
    assert ids == (whole if whole[-1:] == end else whole + end)
    assert Encoder(tok, train_on="all")(row).input_ids == ids

    # SmolLM2's vocabulary lacks some bytes, and an added token's text is no bytes of its own.
    added = tok.backend.get_added_tokens_decoder()
    body = [tok.backend.id_to_token(i) for i in whole if i not in added]
    held = b"".join(bytes_of(kind, token) for token in body)
    ahead = len(held) - len((prompt + completion).encode())
    if len(body) != len(whole) - (whole[:1] == [tok.bos_token_id]) or not 0 <= ahead <= 1:
        event("not compared by bytes")
        return
    position, border = -ahead, len(prompt.encode())
    for i, token in enumerate(body, len(whole) - len(body)):
        position += len(bytes_of(kind, token))
        learned = position > border or not prompt  # the space in front too
        assert labels[i] == (ids[i] if learned else IGNORE)
    assert labels[: len(whole) - len(body)] == [IGNORE] * (len(whole) - len(body))
    assert labels[len(whole) :] == end[: len(ids) - len(whole)]


@pytest.mark.parametrize("kind", ["gguf", "gguf prepend", "legacy", "first", "always"])
def test_no_space_comes_between(make, kind):
    tok = make(kind)[0]
    ids, labels = Encoder(tok)(Pair("2+2=", "4", "row 0"))
    assert tok.decode(ids) == "2+2=4"
    assert [tok.backend.id_to_token(i) for i in labels if i != IGNORE] == ["4", "</s>"]


@pytest.mark.parametrize("kind", ["smollm2", "legacy"])
def test_a_token_across_the_border_is_learned_whole_and_counted(make, kind, caplog):
    """The rows with the space in the completion have the same ids, and are not counted."""
    tok = make(kind)[0]
    joined = [Pair("of the ", "the a", "row 0"), Pair("of the ", "the", "row 1")]
    apart = [Pair("of the", " the a", "row 0"), Pair("of the", " the", "row 1")]
    with caplog.at_level(logging.WARNING, "lorakit"):
        expected = list(lk.encode_rows(apart, tok, max_seq_length=50))
        assert not caplog.text
        assert list(lk.encode_rows(joined, tok, max_seq_length=50)) == expected
    assert "2 completions begin within a token of their prompt" in caplog.text


@pytest.mark.parametrize("limit", [3, 4, 5, 6, 20])
def test_pairs_whose_prompts_end_in_other_tokens(make, limit):
    """The ids of each answer are a part of those of its whole text, and no label is cut off."""
    tok, theirs = make("legacy")
    [row] = lk.read_rows([{"prompt": "a of t", "chosen": "he", "rejected": "+1"}])
    [pair] = lk.encode_rows([row], tok, max_seq_length=limit)
    for answer, text in zip(pair.answers, ("he", "+1"), strict=True):
        whole = [*theirs.encode("a of t" + text), tok.eos_token_id]
        full = [label for label in Encoder(tok)(Pair("a of t", text, "")).labels if label != IGNORE]
        kept = answer.input_ids[1:]
        assert answer.input_ids[0] == whole[0]
        assert len(answer.input_ids) <= limit
        assert any(kept == whole[i : i + len(kept)] for i in range(1, len(whole)))
        assert [label for label in answer.labels if label != IGNORE] == full[: limit - 1]


@pytest.mark.parametrize("before", ["", "n\u00e9"])
def test_a_normalizer_that_joins_characters_across_the_border(make, before):
    """NFC makes é of e and an accent. Its tokens hold a part of the completion."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import NFC

    tok = make("bytes")[0]
    backend = Backend.from_str(tok.backend.to_str())
    backend.normalizer = NFC()
    nfc = Tokenizer(backend, tok.special_tokens)
    for after in ("", "!"):
        ids, labels = Encoder(nfc)(Pair(before + "e", "\u0301" + after, "row 0"))
        assert ids == [*nfc.encode(f"{before}\u00e9{after}"), 2]
        learned = [*nfc.encode(f"\u00e9{after}", add_special_tokens=False), 2]
        assert labels == [IGNORE] * (1 + len(before.encode())) + learned
