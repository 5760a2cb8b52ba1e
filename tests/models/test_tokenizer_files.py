"""Tokenizers of directories and GGUF files, against transformers and llama.cpp."""

import json
import shutil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.files.gguf import read_header
from lorakit.models.named_templates import NAMED_TEMPLATES
from lorakit.models.tokenizer_files import PRE_TOKENIZERS, adapted_tokenizer
from tests.conftest import llama_cpp_server, tiny_llama
from tests.models.gguf_files import write_gguf, write_vocabulary
from tests.models.sentencepiece import (
    PRE_TEXTS,
    SPM_ADDED,
    SPM_FIRST,
    SPM_SPECIAL,
    SPM_TEXTS,
    TEXTS,
    spm_metadata,
)


def test_what_lies_beside_an_adapter_comes_before_the_model(tiny_dir, tmp_path):
    def source_and_template(adapter, *given):
        tok = adapted_tokenizer(tiny_dir, adapter, *given)
        return tok.source, tok.chat_template

    own = lk.load_tokenizer(tiny_dir).chat_template
    assert source_and_template(None) == source_and_template(tmp_path) == (tiny_dir, own)
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert source_and_template(tmp_path) == (tiny_dir, "beside")
    given = NAMED_TEMPLATES["chatml"]
    assert source_and_template(tmp_path, "chatml") == (tiny_dir, given)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, tmp_path)
    assert source_and_template(tmp_path) == (tmp_path, "beside")
    assert source_and_template(tmp_path, "chatml") == (tmp_path, given)


@pytest.fixture(scope="module")
def pair(smollm2, smollm2_of_transformers):
    return lk.load_tokenizer(smollm2), smollm2_of_transformers


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_gguf_ids_equal_transformers(pair, text):
    # transformers ignores tokenizer.ggml.pre, and so does not split every kind of digit
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@settings(max_examples=100)
@given(st.text())
def test_gguf_round_trip(pair, text):
    """decode(encode(text)) = text, if the vocabulary has its bytes (SmolLM2's lacks some)."""
    tok = pair[0]
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assume(all(tok.backend.token_to_id(byte) is not None for piece, _ in pieces for byte in piece))
    assert tok.decode(tok.encode(text), skip_special_tokens=False) == text


def test_gguf_ids_equal_llama_cpp(pair, llama_cpp):
    for text in TEXTS:
        answer = llama_cpp("tokenize", {"content": text, "parse_special": True})
        assert answer["tokens"] == pair[0].encode(text), text


def test_special_tokens(pair):
    ours, theirs = pair
    assert ours.eos_token_id == theirs.eos_token_id == 2
    assert ours.bos_token_id == 1
    assert len(ours) == 49152
    assert ours.decode([1, 9690, 2]) == ours.decode([9690])


def test_gguf_chat_equals_transformers(pair):
    ours, theirs = pair
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]
    for chat in (messages, messages[1:2]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.apply_chat_template(chat, False, prompt) == expected
            assert ours.apply_chat_template(chat, True, prompt) == theirs.encode(
                expected, add_special_tokens=False
            )


@pytest.mark.parametrize("pre", [None, *PRE_TOKENIZERS])
def test_pre_tokenizers_equal_llama_cpp(smollm2, tmp_path, pre):
    """SmolLM2's vocabulary with every pre-tokenizer; a BOS is added where llama.cpp adds one."""
    metadata = read_header(smollm2).metadata
    metadata = {k: v for k, v in metadata.items() if k.startswith("tokenizer.ggml")}
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}
    path = write_vocabulary(tmp_path / "m.gguf", metadata)
    tok = lk.load_tokenizer(path)
    ask = llama_cpp_server(path)
    for text in PRE_TEXTS:
        request = {"content": text, "parse_special": True, "add_special": True}
        assert tok.encode(text) == ask("tokenize", request)["tokens"], text


def test_unknown_pre_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata={"tokenizer.ggml.pre": "viking"})
    with pytest.raises(lk.LorakitError, match="pre-tokenizer 'viking' is not supported"):
        lk.load_tokenizer(path)


SPM_OPTIONS = [
    {},
    {"add_space_prefix": False, "add_eos_token": True},
    {"add_space_prefix": True, "add_bos_token": False},
]


@pytest.fixture(scope="module", params=SPM_OPTIONS, ids=str)
def spm(request, tmp_path_factory):
    """A tokenizer made from scores, and llama.cpp's server on the same file."""
    metadata = spm_metadata(**request.param)
    path = write_vocabulary(tmp_path_factory.mktemp("spm") / "m.gguf", metadata)
    ask = llama_cpp_server(path)
    return lk.load_tokenizer(path), ask


def check_spm(spm, text):
    tok, ask = spm
    ids = tok.encode(text)
    request = {"content": text, "parse_special": True, "add_special": True}
    assert ids == ask("tokenize", request)["tokens"]
    # a space is put before what follows an added token too, where decoding lets it stand
    if not any(token in text for token in [*SPM_FIRST[:3], *SPM_SPECIAL, *SPM_ADDED, "▁"]):
        assert tok.decode(ids) == text


@pytest.mark.parametrize("text", [*PRE_TEXTS, *SPM_TEXTS])
def test_spm_ids_equal_llama_cpp(spm, text):
    check_spm(spm, text)


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([" ", "  ", "    ", "\n", "a", "aa", "h", "ha", "the", "-", "中", "é"]),
            st.sampled_from(SPM_FIRST[:3] + SPM_SPECIAL + SPM_ADDED),
            st.text(max_size=5),
        ),
        max_size=12,
    ).map("".join)
)
def test_spm_any_ids_equal_llama_cpp(spm, text):
    check_spm(spm, text)


def test_spm_save_and_chat(spm, tmp_path):
    from transformers import AutoTokenizer

    tok = spm[0]
    tok.save(tmp_path)
    again, theirs = lk.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*PRE_TEXTS, *SPM_TEXTS]:
        assert again.encode(text) == tok.encode(text) == theirs.encode(text)
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (1, 2, None)
    template = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    ids = tok.apply_chat_template(chat, chat_template=template)
    assert ids == tok.encode("<s><turn>hi<end>", add_special_tokens=False)
    assert [ids[0], ids[1], ids[-1]] == [1, SPM_FIRST.index("<turn>"), SPM_FIRST.index("<end>")]


def test_spm_chat_template(tmp_path):
    metadata = spm_metadata() | {"tokenizer.chat_template": "{{ messages[0].content }}!"}
    tok = lk.load_tokenizer(write_vocabulary(tmp_path / "m.gguf", metadata))
    assert tok.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"scores": None}, "scores has 0 entries for"),
        ({"scores": [1.0, 2.0]}, "scores has 2 entries for"),
        ({"scores": [1, 2]}, "scores holds 1, not float"),
        ({"token_type": [1]}, "token_type has 1 entries for"),
        ({"tokens": None}, "holds no vocabulary"),
        ({"tokens": ["a", "b", "a"]}, "holds a token twice"),
        ({"tokens": "abc"}, "tokens is 'abc', not list"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x', not int"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1, not bool"),
        ({"model": "gpt2"}, "holds no merges"),
        ({"model": "gpt2", "merges": ["t zzz"]}, "the vocabulary is damaged"),
        ({"model": "gpt2", "merges": ["tzzz"]}, "the vocabulary is damaged"),
    ],
)
def test_bad_vocabularies(tmp_path, changed, message):
    changed = {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    path = write_gguf(
        tmp_path / "bad.gguf", tiny_llama(), metadata=spm_metadata() | changed, tensors={}
    )
    with pytest.raises(lk.LorakitError, match=rf"bad\.gguf: .*{message}"):
        lk.load_tokenizer(path)


def test_directory_equals_transformers(directory):
    from transformers import AutoTokenizer

    ours, theirs = lk.load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, None)
    chat = [{"role": "user", "content": "Hi"}]
    ids = ours.apply_chat_template(chat, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(1) == 2  # one per turn header; no second BOS in front


def test_limits_of_a_training_run_are_not_applied(directory):
    backend = lk.load_tokenizer(directory).backend
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert len(lk.load_tokenizer(directory).encode("a text of some length")) == 22


def test_special_tokens_map(directory):
    (directory / "tokenizer_config.json").write_text("{}")
    assert lk.load_tokenizer(directory).eos_token_id is None
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert lk.load_tokenizer(directory).eos_token_id == 2
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(lk.LorakitError, match="eos_token, '<end>', is not in its vocabulary"):
        lk.load_tokenizer(directory).eos_token_id  # noqa: B018


@pytest.mark.parametrize("template", [5, [{"x": 1}], [3], {"default": 4}])
def test_bad_chat_template_in_the_config(directory, template):
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(lk.LorakitError, match="chat_template must be text"):
        lk.load_tokenizer(directory)


def test_bad_directories(tmp_path, directory):
    with pytest.raises(lk.LorakitError, match="does not exist"):
        lk.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lk.LorakitError, match=r"tokenizer\.json is missing"):
        lk.load_tokenizer(tmp_path / "empty")
    (directory / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(lk.LorakitError, match="not a valid tokenizer"):
        lk.load_tokenizer(directory)
