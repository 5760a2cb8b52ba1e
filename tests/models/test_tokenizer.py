"""Tokenizers and chat templates against transformers and llama.cpp."""

import json

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.files.gguf import read_header
from lorakit.models.tokenizer import Tokenizer
from tests.conftest import llama_cpp_server, tiny_llama, write_tokenizer
from tests.models.test_gguf import write_gguf

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


def write_vocabulary(path, metadata):
    """A model just large enough for llama.cpp to load the vocabulary in `metadata`."""
    size = len(metadata["tokenizer.ggml.tokens"])
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_llama(vocab_size=size, hidden_size=8, tie_word_embeddings=True, **one)
    return write_gguf(path, model, metadata=metadata)


PRE_TEXTS = [
    *TEXTS,
    "IT'S DON'T 'tis we'll we'LL I'm",
    "1 12 123 1234 12345678 1,000.50 007 12:34",
    "a  b   c    d\n\n\n e \t\t f\r\n \n  g  ",
    "$$$ <=> ^~| a+b=c (x) {y} [z] “q” — … ¿qué? #! // /n",
    "e\u0301 ñandú\u3000Größe Привет мир 한국어 日本語",
    "http://a.b/c?d=e&f=1 def f(x):return x**2!?!",
]


@pytest.mark.parametrize("pre", ["default", None, "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_pre_tokenizers_equal_llama_cpp(smollm2, tmp_path, pre):
    """SmolLM2's vocabulary behind every pre-tokenizer; a BOS is added where llama.cpp adds one."""
    metadata = read_header(smollm2).metadata
    metadata = {k: v for k, v in metadata.items() if k.startswith("tokenizer.ggml")}
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}
    path = write_vocabulary(tmp_path / "m.gguf", metadata)
    tok = lk.load_tokenizer(path)
    ask = llama_cpp_server(path)
    for text in PRE_TEXTS:
        request = {"content": text, "parse_special": True, "add_special": True}
        assert tok.encode(text) == ask("tokenize", request)["tokens"], text


# ---- SentencePiece's BPE in GGUF ----

SPM_SPECIAL = ["<turn>", "<end>"]
SPM_ADDED = ["   ", "\n\n", "<b>"]
SPM_FIRST = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    *SPM_SPECIAL,
    *SPM_ADDED,
]


def spm_metadata(**options):
    """A SentencePiece vocabulary as llama.cpp's converter stores it, trained on TEXTS."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, max_token_length=8, show_progress=False
    )
    runs = ["    " * 3, "--------", "aaaaaaa", "hahahaha hahaha"]
    backend.train_from_iterator([*PRE_TEXTS, *runs, *SPM_TEXTS] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    characters = sorted(piece for piece in model["vocab"] if len(piece) == 1)
    pieces = dict.fromkeys(["".join(merge) for merge in model["merges"]] + characters)
    pieces = [p for p in pieces if p not in SPM_FIRST and not set(p) & {"中", "x", "é"}]
    plain = len(SPM_FIRST)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM_FIRST + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 3, 3, 4, 4, 4, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [*[0.0] * plain, *(-float(i) for i in range(len(pieces)))],
        "tokenizer.ggml.merges": None,
        **{f"tokenizer.ggml.{name}": value for name, value in options.items()},
    }


SPM_TEXTS = [
    "The people of the town went there to see the other things that they had there.",
    " one leading space",
    "  two, and two at the end  ",
    "line\nline\n\nline\t\tend\n",
    "😀 héllo 👩‍👩‍👧 中文 \u00a0\u200b Ⅷ",
    "aaaa aaaaa       -----  ==== hahahahaha",
    "<turn>user\nHi <b>there</b><end>\n<s> a</s>  <unk> <0x0A>",
    "<b>",
    " ",
]
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
