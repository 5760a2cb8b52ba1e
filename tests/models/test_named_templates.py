"""The chat templates with a name: each the text of the models that it is named after."""

from pathlib import Path

import pytest

import lorakit as lk
from lorakit.models.named_templates import NAMED_TEMPLATES
from tests import chat_templates

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
]
# of the pages of the models that the module names, and of OpenAI's page on ChatML
PUBLISHED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Who?<|im_end|>\n"
    "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nWho?<end_of_turn>\n"
    "<start_of_turn>model\nMe.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "gemma4": "<s><|turn>system\nBe brief.<turn|>\n<|turn>user\nWho?<turn|>\n"
    "<|turn>model\nMe.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nMe.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\n Who?</s>\n<|assistant|>\nMe.</s>\n"
    "<|user|>\nWhy?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_text_is_that_of_the_models(directory, name):
    from transformers import AutoTokenizer

    ours = lk.load_tokenizer(directory, chat_template=name)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(CHAT, **options) == PUBLISHED[name]
    theirs = AutoTokenizer.from_pretrained(directory)
    assert PUBLISHED[name] == theirs.apply_chat_template(
        CHAT, chat_template=NAMED_TEMPLATES[name], **options
    )
    own = lk.load_tokenizer(directory)
    assert own.apply_chat_template(CHAT, chat_template=name, **options) == PUBLISHED[name]


def test_templates_of_real_models(smollm2, directory):
    """SmolLM2's own template is ChatML, and the one of the tests is Gemma 3's."""
    own, named = (lk.load_tokenizer(smollm2, chat_template=t) for t in (None, "chatml"))
    for chat in (CHAT, CHAT[:3]):
        for prompt in (False, True):
            assert own.apply_chat_template(chat, True, prompt) == named.apply_chat_template(
                chat, True, prompt
            )
    tok = lk.load_tokenizer(directory)
    assert tok.apply_chat_template(
        CHAT, False, chat_template=chat_templates.GEMMA3
    ) == tok.apply_chat_template(CHAT, False, chat_template="gemma")


def test_the_template_of_gemma_4(directory):
    trl = pytest.importorskip("trl")
    file = Path(trl.__file__).parent / "chat_templates" / "gemma4_v5.jinja"
    theirs = file.read_text(encoding="utf-8")
    tok = lk.load_tokenizer(directory)
    for chat in (CHAT, CHAT[1:], CHAT[:3]):
        for prompt in (False, True):
            named = tok.apply_chat_template(chat, False, prompt, chat_template="gemma4")
            assert named == tok.apply_chat_template(chat, False, prompt, chat_template=theirs)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("gemma4", "<turn|>"),
        ("llama3", "<|eot_id|>"),
    ],
)
def test_rows_are_learned_with_the_end_token(directory, name, end):
    """The token must be special: as plain text the model would not know it for an end."""
    tok = lk.load_tokenizer(directory, chat_template=name)
    rows = [{"messages": CHAT[1:3]}]
    message = "no end token after message 1, as '.*' is no special token: .* zephyr does"
    with pytest.raises(lk.LorakitError, match=message):
        lk.encode_rows(rows, tok, max_seq_length=200)
    tok.backend.add_special_tokens([end])
    [example] = lk.encode_rows(rows, tok, max_seq_length=200)
    learned = [label for label in example.labels if label >= 0]
    assert tok.decode(learned, skip_special_tokens=False) == "Me." + end
    assert tok.end_token_ids == [tok.eos_token_id, learned[-1]]


def test_a_template_for_every_tokenizer_with_an_end_token(directory):
    tok = lk.load_tokenizer(directory, chat_template="zephyr")
    [example] = lk.encode_rows([{"messages": CHAT[:3]}], tok, max_seq_length=200)
    learned = [label for label in example.labels if label >= 0]
    assert tok.decode(learned, skip_special_tokens=False) == "Me.</s>"


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_what_a_template_does_not_know_is_an_error(directory, name):
    tok = lk.load_tokenizer(directory, chat_template=name)
    tok.backend.add_special_tokens(["<|im_end|>", "<end_of_turn>", "<|eot_id|>"])
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for row in ({"messages": [CHAT[1], call]}, {"messages": CHAT[1:3], "tools": tools}):
        with pytest.raises(lk.LorakitError, match="the chat template leaves out the tool"):
            lk.encode_rows([row], tok, max_seq_length=200)


# ---- which template is taken ----


def test_a_template_that_is_given(directory, tmp_path):
    """A name, a file, a directory with one or with several, or the text."""
    chat = CHAT[1:2]

    def rendered(template, **options):
        tok = lk.load_tokenizer(directory, chat_template=template)
        return tok.apply_chat_template(chat, tokenize=False, **options)

    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    assert rendered(tmp_path / "own.jinja") == rendered(str(tmp_path / "own.jinja")) == " Who?!"
    assert rendered("{{ messages[0].role }}") == "user"
    adapter = tmp_path / "adapter"
    lk.load_tokenizer(directory, chat_template="zephyr").save_chat_template(adapter)
    assert [file.name for file in adapter.iterdir()] == ["chat_template.jinja"]
    assert rendered(adapter) == rendered("zephyr")
    tok = lk.load_tokenizer(directory)
    tok.chat_template = {"default": "one {{ tools }}", "tool_use": "two {{ tools }}"}
    tok.save_chat_template(adapter)
    assert rendered(adapter) == "one None"
    assert rendered(adapter, tools=[1]) == "two [1]"
    assert rendered(directory) == rendered(None)
    tok.chat_template = None
    tok.save_chat_template(adapter)
    with pytest.raises(lk.LorakitError, match="adapter holds no chat template"):
        rendered(adapter)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatm", "chatm is no file, and no name .* .did you mean 'chatml'..; give a jinja"),
        ("tokenizer_default", "no name of a template; give a jinja file or chatml, gemma, gemma4"),
        ("{% for %}", "chat_template is no chat template that jinja2 reads: line 1: Expected"),
        ("a\0b", "is no path"),
        ("", "chat_template is ''; give a jinja file or chatml, gemma"),
        (3, "chat_template is 3; give a jinja file or chatml, gemma"),
    ],
)
def test_a_template_that_is_none(directory, template, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_tokenizer(directory, chat_template=template)


def test_a_file_that_is_no_template(directory, tmp_path):
    path = tmp_path / "t.jinja"
    for content, message in [(b"a\n{{ b", "t.jinja is no chat .*: line 2"), (b"\xff", "not UTF-8")]:
        path.write_bytes(content)
        with pytest.raises(lk.LorakitError, match=message):
            lk.load_tokenizer(directory, chat_template=path)
