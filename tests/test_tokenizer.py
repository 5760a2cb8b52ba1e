"""Tokenizers and chat templates against transformers and llama.cpp."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.tokenizer import Tokenizer
from tests.conftest import write_tokenizer

TEXTS = [
    "Hello world, it's 2024!  don't\n\n  def f(x):\n\treturn 12345",
    "<|im_start|>user\nhé 😀 中文<|im_end|>",
    "  leading and trailing  ",
    "",
    "a\u00a0b\u200bc\r\n\r\n\t",
    "١٢٣ ½ Ⅷ x²",
]


@pytest.fixture(scope="module")
def pair(smollm2):
    from transformers import AutoTokenizer

    return lk.load_tokenizer(smollm2), AutoTokenizer.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name
    )


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


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


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


def test_template_priority(directory):
    chat = [{"role": "user", "content": "x"}]

    def rendered(**options):
        return lk.load_tokenizer(directory).apply_chat_template(chat, tokenize=False, **options)

    assert rendered(chat_template="argument") == "argument"
    assert rendered().startswith("<s>user")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    assert rendered().startswith("<s>user")
    assert rendered(tools=[{"a": 1}]) == "tools: [{'a': 1}]"
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert rendered() == "legacy"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "named"},
        {"name": "tool_use", "template": "with tools"},
    ]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "named"
    assert rendered(tools=[{}]) == "with tools"


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }} {% endif %}{% endfor %}",
    "{{ messages[0] | tojson }} {{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ bos_token }}{{ date_string }}{% if enable_thinking is defined %}!{% endif %}",
    "{{ strftime_now('%Y') }}{{ '<>&é' | tojson }}",
    "{{ messages[0].missing is defined }}{{ 'tool_calls' in messages[1] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_environment_equals_transformers(directory, template):
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": "a <b> & é"},
        {"role": "assistant", "content": "c", "tool_calls": None},
    ]
    options = {"chat_template": template, "date_string": "1 May 2024"}
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = lk.load_tokenizer(directory)
    assert ours.apply_chat_template(messages, False, **options) == theirs.apply_chat_template(
        messages, tokenize=False, **options
    )


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user"}], "must alternate"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user"}], "unsafe"),
        ("{% set _ = messages.append(1) %}", [{"role": "user"}], "immutable|not allowed|unsafe"),
        ("{% if %}", [{"role": "user"}], "refuses"),
        ("x", [], "at least one"),
        ("x", [{"content": "no role"}], "message 0 must be"),
        ("x", "text", "must be a list"),
    ],
)
def test_bad_templates_and_messages(directory, template, messages, error):
    tok = lk.load_tokenizer(directory)
    with pytest.raises(lk.LorakitError, match=error):
        tok.apply_chat_template(messages, chat_template=template)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 5 }}"])
def test_a_template_that_fails_says_so(directory, template):
    with pytest.raises(lk.LorakitError, match="refuses these messages"):
        lk.load_tokenizer(directory).apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=template
        )


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


def test_save(pair, directory, tmp_path):
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Hi"}]
    for tok in (pair[0], lk.load_tokenizer(directory)):
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


@pytest.mark.parametrize("template", [5, [{"x": 1}], [3], {"default": 4}])
def test_bad_chat_template_in_the_config(directory, template):
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(lk.LorakitError, match="chat_template must be text"):
        lk.load_tokenizer(directory)


def test_no_template(directory):
    tok = lk.load_tokenizer(directory)
    bare = Tokenizer(tok.backend, tok.special_tokens)
    with pytest.raises(lk.LorakitError, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "x"}])


def test_bad_directories(tmp_path, directory):
    with pytest.raises(lk.LorakitError, match="does not exist"):
        lk.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lk.LorakitError, match=r"tokenizer\.json is missing"):
        lk.load_tokenizer(tmp_path / "empty")
    (directory / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(lk.LorakitError, match="not a valid tokenizer"):
        lk.load_tokenizer(directory)
