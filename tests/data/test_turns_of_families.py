"""What an answer's labels are, in the templates of many families: what their own tags mark.

The tags {% generation %} of TRL's templates for training, and of those in chat_templates.py, stand
around what an assistant wrote. transformers reads them, lorakit compares renderings. Some of TRL's
tags hold the header of an answer too, which generation starts from and the model never writes; it
is no label here. The tokenizer has a token for each byte, so the comparison is one of texts.
"""

import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import lorakit as lk
from lorakit.data.encode import TODAY, Encoder
from lorakit.data.schemas import Chat
from lorakit.models.chat_template import checked_messages
from lorakit.models.tokenizer import Tokenizer
from tests.chat_templates import NEWER
from tests.data.chats import SYSTEM, TOOLS, assistant, shown, user

pytestmark = pytest.mark.usefixtures("today")

CALLED = [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {}}}]
CALL = assistant(None, tool_calls=CALLED)
RESULT = {"role": "tool", "content": "it is 3", "name": "add", "tool_call_id": "abcdefghi"}
TURNS = [
    user("Hi"),
    assistant("Hello!"),
    user("1 + 1?"),
    assistant("2"),
    user("So?"),
    assistant("y"),
]
THOUGHT = [user("Hi"), assistant("Hello!", reasoning_content="why not")]
USE = [SYSTEM, user("1+2?"), CALL, RESULT, assistant("Three."), user("and"), assistant("so on")]
CHATS = {
    "turns": (TURNS, None, {}),
    "system": ([SYSTEM, *TURNS[:4]], None, {}),
    "on": (TURNS[:4], None, {"enable_thinking": True}),
    "off": (TURNS[:4], None, {"enable_thinking": False}),
    "thought": (THOUGHT, None, {"enable_thinking": True}),
    "tools": (USE, TOOLS, {}),
}
NO_TOOLS = ["turns", "system", "on", "off"]
ALL = list(CHATS)
OF_TRL = {
    "llama3": NO_TOOLS,
    "gemma": ["turns", "off"],
    "gemma3": NO_TOOLS,
    "phi3": NO_TOOLS,
    "phi3_5": NO_TOOLS,
    "qwen2_5": [*NO_TOOLS, "tools"],
    "qwen3": ALL,
    "qwen3_instruct_2507": [*NO_TOOLS, "tools"],
    "qwen3_5_think": ALL,
    "qwen3_5_nothink": ALL,
    "qwen3_6": ALL,
    "qwen3_8": ALL,
    "gptoss": ALL,
}
KNOWN = {name: [*NO_TOOLS, "tools"] for name in NEWER} | OF_TRL


def source(name):
    if name in NEWER:
        return NEWER[name]
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}_training.jinja").read_text(encoding="utf-8")


def tokenizer(template):
    """A token for each byte, and one for each mark of the template."""
    marks = set(re.findall(r"<\|[a-z_/]+\|>|<[a-z]+_of_turn>|\[/?[A-Z_]{3,}\]", template))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [
        AddedToken(m, special=True, normalized=False) for m in sorted({*marks, "<s>", "</s>"})
    ]
    backend.add_special_tokens(special)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, template)


def marked(template, messages, tools, variables):
    """The text, and what the tags stand around: runs with nothing but white space in between."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [checked_messages(messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
        **variables,
    )
    runs = []
    for start, end in spans:
        if runs and not text[runs[-1][1] : start].strip():
            start = runs.pop()[0]
        runs.append((start, end))
    return text, [text[start:end].strip() for start, end in runs]


@pytest.mark.parametrize(
    ("name", "chat"), [(name, chat) for name, chats in KNOWN.items() for chat in chats]
)
def test_labels_are_what_the_tags_mark(name, chat):
    messages, tools, variables = CHATS[chat]
    template = source(name)
    tok = tokenizer(template)
    text, expected = marked(template, messages, tools, variables)
    example = Encoder(tok)(Chat(messages, tools, 0, "row 0", variables))
    assert tok.decode(example.input_ids, skip_special_tokens=False) == text
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, got, tagged in zip(turns, shown(tok, example), expected, strict=True):
        header = tok.apply_chat_template(
            messages[:i], False, True, tools=tools, strftime_now=TODAY.strftime, **variables
        ).rstrip()
        got = got.strip()
        assert tagged.endswith(got)
        assert header.endswith(tagged.removesuffix(got).rstrip())
        assert messages[i]["content"] is None or messages[i]["content"] in got


def test_a_tools_answer_within_a_turn_is_refused():
    """Gemma 4 writes the content of a turn behind what the tools answered it."""
    template = (
        "{% for m in messages if m.role != 'tool' %}<|turn>{{ m.role }}\n"
        "{% set next = messages[messages.index(m) + 1 :][:1] %}"
        "{% if m.tool_calls %}<|call|>{% for t in next if t.role == 'tool' %}"
        "<|answer|>{{ t.content }}{% endfor %}{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
    )
    tok = tokenizer(template)
    chat = [user("a"), assistant("Look", tool_calls=CALLED), RESULT, assistant("Three")]
    with pytest.raises(
        lk.LorakitError, match="what a tool answered into message 1.*take the content"
    ):
        Encoder(tok)(Chat(chat, None, 0, "row 0"))
    without = [user("a"), {**CALL, "content": ""}, RESULT, assistant("Three")]
    with pytest.raises(lk.LorakitError, match="what a tool answered into message 1.*train_on all"):
        Encoder(tok)(Chat(without, None, 0, "row 0"))


def test_a_thought_behind_a_header_that_closes_one():
    """Qwen3.5's small models answer without a thought unless the row says otherwise."""
    tok = tokenizer(source("qwen3_5_nothink"))
    with pytest.raises(lk.LorakitError, match="enable_thinking in chat_template_kwargs"):
        Encoder(tok)(Chat(THOUGHT, None, 0, "row 0"))
