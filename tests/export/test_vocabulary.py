"""Tokenizers in GGUF files: llama.cpp gives the ids that lorakit does."""

import json
import random
import re
import unicodedata
from functools import cache

import gguf
import pytest
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.export.vocabulary import tokenizer_metadata
from lorakit.files.gguf import Typed, read_header
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import PRE_TOKENIZERS, TAKE_WORDS_WHOLE, load_tokenizer
from tests.conftest import tiny_llama
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import SIZE, byte_level, write_again, write_model
from tests.models.gguf_files import write_vocabulary
from tests.models.sentencepiece import PRE_TEXTS, SPM_TEXTS, TEXTS, spm_metadata


def thousand(special):
    """Texts of pieces that hurt: marks, digits, many spaces, other scripts, control characters."""
    pieces = [*" \n\t'.,!?-_/()[]{}", *special, "  ", "\n\n", "12", "345", "6789", "don't", "WE'LL"]
    pieces += ["hello", "the", "Größe", "ñandú", "中文", "日本語", "Привет", "😀", "½"]
    pieces += ["\u00a0", "e\u0301"]
    generator = random.Random(0)
    made = ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(970)]
    return [*TEXTS, *PRE_TEXTS, *SPM_TEXTS, *made]


def exported(tmp_path, tok, rows):
    """A model just large enough for llama.cpp, with this tokenizer."""
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny_llama(vocab_size=rows, hidden_size=8, tie_word_embeddings=True, **one).save_pretrained(
        tmp_path / "model"
    )
    file = tmp_path / "m.gguf"
    lk.export_gguf(tmp_path / "model", file, quantization="f32", tokenizer=tok)
    return file


def compare(file, tok, texts):
    with LlamaCpp(file) as theirs:
        for text in texts:
            if text:  # llama.cpp puts no BOS before nothing
                assert theirs.tokenize(text) == tok.encode(text), text
        assert set(tok.end_token_ids) <= theirs.ends()


def test_smollm2(tmp_path, smollm2):
    """Its own vocabulary, taken apart and put together as that of a directory is."""
    load_tokenizer(smollm2).save(tmp_path)
    tok = load_tokenizer(tmp_path)
    file = exported(tmp_path, tok, len(tok))
    compare(file, tok, thousand(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]))
    own, theirs = read_header(file).metadata, read_header(smollm2).metadata
    keys = ["tokens", "merges", "pre", "model", "bos_token_id", "eos_token_id"]
    for key in [*(f"tokenizer.ggml.{key}" for key in keys), "tokenizer.chat_template"]:
        assert own[key] == theirs[key], key


@cache
def learned():
    """Vocabulary and merges learned from whole texts, so that tokens reach over every cut."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*thousand([])[:300], *PRE_TEXTS * 20], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def cut_as(pre):
    """A tokenizer that cuts a text as the models do whose pre-tokenizer llama.cpp calls `pre`."""
    vocab, merges = learned()
    whole = pre in TAKE_WORDS_WHOLE
    model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole)
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    if pre == "smollm":  # as published
        steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True)]
        steps.append(ByteLevel(add_prefix_space=False))
    else:
        steps = [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
            for regex in PRE_TOKENIZERS[pre]
        ]
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, None)


def llama_cpp_cuts_otherwise(pre, text):
    """Whether the text holds what docs/export.md says llama.cpp cuts otherwise.

    It leaves Qwen's NFC out. Of Mistral's words it knows the large letters of ASCII alone, and it
    takes no combining mark into a word.
    """
    if pre == "qwen2":
        return text != unicodedata.normalize("NFC", text)
    marks = any(unicodedata.category(letter).startswith("M") for letter in text)
    words = re.findall(r"[^\W\d_]+", text)
    large = any(not word.isascii() and not word[1:].islower() for word in words if word[1:])
    return pre == "tekken" and (marks or large)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_cut(tmp_path, pre):
    tok = cut_as(pre)
    file = exported(tmp_path, tok, len(tok))
    assert read_header(file).metadata["tokenizer.ggml.pre"] == pre
    texts = [t for t in thousand(["<s>", "</s>"]) if not llama_cpp_cuts_otherwise(pre, t)]
    assert len(texts) > 400
    compare(file, tok, texts)
    again = load_tokenizer(file)
    assert all(again.encode(text) == tok.encode(text) for text in texts)


def test_sentencepiece(tmp_path):
    """The scores follow from the merges alone, as in a directory without tokenizer.model."""
    metadata = spm_metadata(add_space_prefix=False)
    source = write_vocabulary(tmp_path / "source.gguf", metadata)
    load_tokenizer(source).save(tmp_path)
    tok = load_tokenizer(tmp_path)
    file = exported(tmp_path, tok, len(tok) + 7)
    found = read_header(file).metadata
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tok) + 6}]"
    assert found["tokenizer.ggml.token_type"][-1] == 5
    assert found["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
    compare(file, tok, thousand(["<turn>", "<b>", "   "]))


SPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
BEFORE = {
    "the older way, at the start of every piece": None,
    "always, unless one is there": SPACE | {"prepend_scheme": "always"},
    "at the start of a text, unless one is there": SPACE | {"prepend_scheme": "first"},
}


@pytest.mark.parametrize("how", BEFORE)
def test_sentencepiece_with_a_space_before(tmp_path, how):
    """llama.cpp knows the older way alone. The others differ at a space and after added tokens."""
    source = write_vocabulary(tmp_path / "source.gguf", spm_metadata(add_space_prefix=True))
    tok = load_tokenizer(source)
    special = ["<turn>", "<b>", "   "]
    texts = thousand(special)
    if BEFORE[how] is not None:
        tok = with_parts(tok, normalizer=None, pre_tokenizer=BEFORE[how])
        added = [*special, "<", "\n\n"]
        texts = [t for t in texts if t[:1] != " " and not any(each in t for each in added)]
    assert len(texts) > 400
    compare(exported(tmp_path, tok, len(tok)), tok, texts)


def test_a_file_of_a_file_has_its_tokenizer(tmp_path):
    """Also scores and types that no merges give; only the keys of the template may be new."""
    source = write_vocabulary(tmp_path / "source.gguf", spm_metadata(add_bos_token=True))
    lk.export_gguf(source, tmp_path / "again.gguf", quantization="f32")
    before, after = read_header(source).metadata, read_header(tmp_path / "again.gguf").metadata
    own = {key: value for key, value in before.items() if key.startswith("tokenizer.")}
    assert own == {key: value for key, value in after.items() if key.startswith("tokenizer.")}


def test_what_a_file_says_of_its_tokenizer_keeps_its_types(tmp_path):
    """Numbers below zero or of 8 and 64 bits stay so, and other templates are there."""
    kinds = gguf.GGUFValueType
    odd = {
        "tokenizer.ggml.mask_token_id": Typed(-1, kinds.INT32, None),
        "tokenizer.ggml.precompiled_charsmap": Typed([1, 200], kinds.ARRAY, kinds.UINT8),
        "tokenizer.ggml.large": Typed([1 << 40], kinds.ARRAY, kinds.UINT64),
        "tokenizer.huggingface.json": Typed("{}", kinds.STRING, None),
        "tokenizer.chat_template": Typed("a{{ 1 }}", kinds.STRING, None),
        "tokenizer.chat_template.tool_use": Typed("b{{ 1 }}", kinds.STRING, None),
    }
    plain, source, again = (tmp_path / f"{name}.gguf" for name in ("plain", "source", "again"))
    lk.export_gguf(write_model(tmp_path / "model", "llama"), plain, quantization="f32")
    write_again(plain, source, odd)
    lk.export_gguf(source, again, quantization="f32")
    assert said_of_tokenizer(again) == said_of_tokenizer(source)
    assert odd.keys() <= said_of_tokenizer(again).keys()


def said_of_tokenizer(file):
    """The keys of the tokenizer in a file: values and types."""
    header = read_header(file)
    keys = [key for key in header.metadata if key.startswith("tokenizer.")]
    return {key: (header.metadata[key], header.types[key]) for key in keys}


def test_the_adapters_tokens_and_template_are_written(tmp_path):
    directory = write_model(tmp_path / "model", "llama")
    tok, model = load_tokenizer(directory), lk.load_model(directory, dtype="float32")
    lk.attach(model, lk.add_tokens(model, tok, ["<|new|>"], lk.LoraConfig(r=2)))
    tok.chat_template = "{{ messages }}"
    lk.save_adapter(model, tmp_path / "adapter")
    tok.save(tmp_path / "adapter")
    file = tmp_path / "m.gguf"
    lk.export_gguf(directory, file, quantization="f32", adapter=tmp_path / "adapter")
    found = read_header(file).metadata
    [new] = tok.encode("<|new|>", add_special_tokens=False)
    assert found["tokenizer.ggml.tokens"][new] == "<|new|>"
    assert found["tokenizer.ggml.token_type"][new] == 3
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    compare(file, tok, ["hello <|new|> the"])


def config():
    return lk.ModelConfig.from_hf(tiny_llama(vocab_size=SIZE).config.to_dict())


def changed(**parts):
    """The tiny tokenizer with other parts of its tokenizer.json."""
    return with_parts(byte_level(), **parts)


def with_parts(tok, **parts):
    data = json.loads(tok.backend.to_str())
    model = parts.pop("model", {})
    data = {**data, **parts, "model": {**data["model"], **model}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    return Tokenizer(backend, tok.special_tokens, tok.chat_template)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer 'Lowercase'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "x"}}}, "cuts by x"),
        ({"model": {"ignore_merges": True}}, "ignore_merges=true"),
        ({"model": {"merges": []}}, "no merges"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(parts, said):
    with pytest.raises(lk.LorakitError, match=said):
        tokenizer_metadata(changed(**parts), config())


def test_a_tokenizer_of_another_model_is_refused():
    tok = byte_level()
    tok.add_special_tokens([f"<|{i}|>" for i in range(SIZE)])
    with pytest.raises(lk.LorakitError, match="do not belong together"):
        tokenizer_metadata(tok, config())


def test_rows_without_a_token_get_names_that_no_token_has():
    """A token may be called as such a row is."""
    tok = byte_level()
    tok.add_special_tokens(["[PAD280]", "[PAD281]", "[[PAD281]]"])
    found = tokenizer_metadata(tok, config())
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(set(tokens)) == SIZE
    assert tokens[279:283] == ["[PAD279]", "[[PAD280]]", "[[[PAD281]]]", "[PAD282]"]
    assert set(types[len(tok) :]) == {5}


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_a_token_beyond_the_vocabulary_is_named(name):
    tok = byte_level()
    tok.special_tokens.pop("bos_token")
    tok.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    tokenizer_metadata(tok, config())
    given = {"eos_token_id": [2, SIZE]} if name == "eos_token_id" else {name: SIZE}
    values = tiny_llama(vocab_size=SIZE).config.to_dict() | given
    with pytest.raises(lk.LorakitError, match=f"_id is {SIZE}, and the model has the tokens 0 to"):
        tokenizer_metadata(tok, lk.ModelConfig.from_hf(values))


def test_several_templates_stand_under_their_names():
    tok = byte_level()
    tok.chat_template = {"default": "a{{ 1 }}", "tool_use": "b{{ 1 }}"}
    found = tokenizer_metadata(tok, config())
    assert found["tokenizer.chat_template"] == "a{{ 1 }}"
    assert found["tokenizer.chat_template.tool_use"] == "b{{ 1 }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]
