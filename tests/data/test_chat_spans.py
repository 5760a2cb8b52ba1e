"""Chats: ids as transformers has them, labels as its assistant mask has them, and what is refused.

transformers finds the assistant's tokens by tags in the template; lorakit ignores these and
compares renderings.
"""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.encode import IGNORE, TODAY, Encoder
from lorakit.data.schemas import Chat
from lorakit.models.tokenizer import Tokenizer
from tests.chat_templates import SPECIAL, TEMPLATES
from tests.data.chats import CHAT, GENERATION, SYSTEM, TOOLS, TURNS, assistant, encode, shown, user

pytestmark = pytest.mark.usefixtures("today")

TAGGED = ["llama3", "qwen25", "gemma3", "mistral"]

CALL = assistant(
    None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
)
RESULT = {"role": "tool", "content": "3"}
PLAIN = {
    "one": [user("Hi"), assistant("Hello there!")],
    "many": [user("Hi"), assistant("Hello!"), user("1 + 1?"), assistant("2"), user("Bye")],
    "space": [user("  a \n"), assistant("b\n\n  c"), user("\td"), assistant("é 😀 中文")],
    "same": [user("a"), assistant("a"), user("a"), assistant("a")],
    "system": [SYSTEM, user("Hi"), assistant("Yo."), user("ok"), assistant("ok")],
}
WITH_TOOLS = {
    "call": [user("1+2?"), CALL, RESULT, assistant("It is 3.")],
    "calls": [user("a"), CALL, RESULT, assistant("b"), user("c"), CALL, RESULT, assistant("d")],
}


def check_as_transformers(pair, messages, tools):
    ours, theirs = pair
    expected = theirs.apply_chat_template(
        messages,
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encode(ours, messages, tools)
    assert example.input_ids == expected["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == expected["assistant_masks"]
    assert encode(ours, messages, tools, "all").labels == expected["input_ids"]
    last = encode(ours, messages, tools, "last_turn")
    assert shown(ours, last) == shown(ours, example)[-1:]


@pytest.mark.parametrize("chat", PLAIN)
@pytest.mark.parametrize("family", TAGGED)
def test_chats_equal_transformers(make, family, chat):
    check_as_transformers(make(family), PLAIN[chat], None)


@pytest.mark.parametrize("chat", WITH_TOOLS)
@pytest.mark.parametrize("family", ["llama3", "qwen25", "mistral"])
def test_tools_equal_transformers(make, family, chat):
    check_as_transformers(make(family), WITH_TOOLS[chat], TOOLS)


@settings(max_examples=60)
@given(
    family=st.sampled_from(TAGGED),
    texts=st.lists(
        st.text("ab \n<>é中|😀.{}%", max_size=12).filter(lambda t: t.strip()),
        min_size=2,
        max_size=5,
    ),
    system=st.booleans(),
)
def test_any_chat_equals_transformers(make, family, texts, system):
    """All texts: ids = transformers' ids, labels = its assistant mask."""
    messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]
    check_as_transformers(make(family), [SYSTEM, *messages] if system else messages, None)


ANY_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]),
        "content": st.text("ab \n<>/think|_ims", max_size=10)
        | st.sampled_from(["</think>", "<think>a</think>b", "<|im_end|>", "<s>", "</s>"]),
    },
    optional={
        "reasoning": st.sampled_from(["", "why", 3, None]),
        "tool_calls": st.sampled_from([None, [], CALL["tool_calls"], [3]]),
    },
)


@settings(max_examples=300)
@given(
    st.sampled_from(list(TEMPLATES)),
    st.lists(ANY_MESSAGE, min_size=1, max_size=5),
    st.sampled_from([None, TOOLS]),
    st.sampled_from([None, 9, 30]),
)
def test_any_messages_give_an_example_or_one_error(make, family, messages, tools, limit):
    """Labels are tokens at their places, and every run of them ends with an end token."""
    tok = make(family)[0]
    try:
        example = encode(tok, messages, tools, max_seq_length=limit)
    except lk.LorakitError as error:
        event("an error")
        assert str(error).startswith("row 0")
        return
    event("an example")
    runs = shown(tok, example)
    assert runs
    if limit is None:
        ids = tok.apply_chat_template(messages, tools=tools, strftime_now=TODAY.strftime)
        assert example.input_ids == ids
        assert all(run.endswith(tuple(SPECIAL[family])) for run in runs)
    else:
        assert len(example.input_ids) <= limit


# ---- templates that rewrite earlier turns ----


def test_reasoning_that_the_template_does_not_know_is_refused(make):
    chat = [user("a"), assistant("b", reasoning="why")]
    with pytest.raises(lk.LorakitError, match="leaves out the reasoning of message 1"):
        encode(make("qwen25")[0], chat)


def test_qwen3_labels_what_a_finished_turn_shows(make):
    tok = make("qwen3")[0]
    chat = [user("a"), assistant("b"), user("c"), assistant("d", reasoning_content="why")]
    example = encode(tok, chat)
    assert example.input_ids == tok.apply_chat_template(chat)
    assert shown(tok, example) == ["b<|im_end|>", "<think>\nwhy\n</think>\n\nd<|im_end|>"]
    loop = [user("a"), {**CALL, "reasoning_content": "r"}, RESULT, assistant("b", thinking="s")]
    first, second = shown(tok, encode(tok, loop))
    assert first.startswith("<think>\nr\n</think>\n\n\n<tool_call>")
    assert second == "<think>\ns\n</think>\n\nb<|im_end|>"


@pytest.mark.parametrize("content", ["b", "<think>\nr\n</think>\n\nb"])
def test_reasoning_that_is_left_out_is_refused(make, content):
    tok = make("qwen3")[0]
    fields = {} if "think" in content else {"reasoning": "r"}
    chat = [user("a"), assistant(content, **fields), user("c"), assistant("d")]
    with pytest.raises(
        lk.LorakitError, match=r"row 0: .*leaves out the \w+ of message 1.*last_turn"
    ):
        encode(tok, chat)
    assert shown(tok, encode(tok, chat, train_on="last_turn")) == [
        "<think>\n\n</think>\n\nd<|im_end|>"
    ]
    assert shown(tok, encode(tok, chat[:2])) == ["<think>\nr\n</think>\n\nb<|im_end|>"]


def test_a_header_that_finished_turns_do_not_show(make):
    tok = make("r1")[0]
    chat = [user("a"), assistant("<b"), user("c"), assistant("d")]
    assert shown(tok, encode(tok, chat)) == ["<b<|end|>", "d<|end|>"]


THOUGHT = "<think>\neasy\n</think>\n\n4."
QWEN3_THINKING = TEMPLATES["qwen3"].replace(
    "add_generation_prompt %}{{- '<|im_start|>assistant\\n'",
    "add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n'",
)


def test_a_thought_that_the_header_opens(make):
    """It is learned behind the header, whether it stands in the content or beside it."""
    tok = make("qwen3")[0]
    thinking = Tokenizer(tok.backend, tok.special_tokens, QWEN3_THINKING)
    within = [user("2+2?"), assistant(THOUGHT)]
    beside = [user("2+2?"), assistant("4.", reasoning_content="easy")]
    expected = ["easy\n</think>\n\n4.<|im_end|>"]
    header = thinking.apply_chat_template(within[:1], add_generation_prompt=True)
    for chat in (within, beside):
        example = encode(thinking, chat)
        assert shown(thinking, example) == expected
        assert example.labels[: len(header)] == [IGNORE] * len(header)
        assert example.input_ids[: len(header)] == header
        assert encode(thinking, chat, train_on="all").labels == example.input_ids
    assert shown(tok, encode(tok, within)) == [f"{THOUGHT}<|im_end|>"]
    with pytest.raises(lk.LorakitError, match="leaves out the content of message 1, or a part"):
        encode(thinking, [*within, user("a"), assistant("b")])


@pytest.mark.parametrize("header", ["<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("turns", [1, 2])
def test_a_thought_after_one_that_the_template_opens(make, header, turns):
    """The model would learn to think twice."""
    tok = make("qwen3")[0]
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n' + (m.reasoning_content "
        "or '') + '\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ HEADER }}{% endif %}"
    )
    doubling = Tokenizer(tok.backend, tok.special_tokens, template.replace("HEADER", repr(header)))
    with pytest.raises(lk.LorakitError, match="opens a thought of its own .* message 1; put the"):
        encode(doubling, [user("2+2?"), assistant(THOUGHT)] * turns)
    if header == "<think>\n":
        chat = [user("2+2?"), assistant("4.", reasoning_content="easy")] * turns
        assert shown(doubling, encode(doubling, chat)) == ["easy\n</think>\n\n4.<|im_end|>"] * turns


R1_WHOLE = TEMPLATES["r1"].replace(".split('</think>')[-1]", "")


@pytest.mark.parametrize(
    ("template", "content", "learned"),
    [
        (R1_WHOLE, f"<think>\n{THOUGHT[8:]}", THOUGHT[8:]),
        (R1_WHOLE, "4.", "4."),
        (R1_WHOLE, THOUGHT[8:], THOUGHT[8:]),
        (TEMPLATES["r1"], THOUGHT, None),
        # one that drops another start of the content than the header shows
        (R1_WHOLE.replace("message.content +", "message.content[1:] +"), "#4.", None),
        (R1_WHOLE.replace("message.content +", "message.content[1:] +"), "n4.", None),
    ],
)
def test_a_header_that_opens_a_thought_is_no_excuse(make, template, content, learned):
    """Only what ends the header may be missing at the start of a content."""
    tok = Tokenizer(make("r1")[0].backend, make("r1")[0].special_tokens, template)
    chat = [user("2+2?"), assistant(content)]
    if learned is None:
        with pytest.raises(lk.LorakitError, match="leaves out the content of message 1"):
            encode(tok, chat)
    else:
        assert shown(tok, encode(tok, chat)) == [f"{learned}<|end|>"]


def test_transformers_names_of_reasoning(make):
    ours, theirs = make("qwen3")
    for name in ("reasoning", "thinking", "reasoning_content"):
        chat = [user("a"), assistant("b", **{name: "why"})]
        text = ours.apply_chat_template(chat, tokenize=False)
        assert text == theirs.apply_chat_template(chat, tokenize=False)
        assert "<think>\nwhy\n</think>" in text
    template = "{{ messages[0].thinking }} {{ messages[0].reasoning_content }}"
    both = [{"role": "assistant", "thinking": "a", "reasoning": "b", "content": ""}]
    for chat in (both, [{**both[0], "reasoning_content": None}]):
        text = ours.apply_chat_template(chat, tokenize=False, chat_template=template)
        assert text == theirs.apply_chat_template(chat, tokenize=False, chat_template=template)


# ---- SmolLM2's own template ----


@pytest.mark.parametrize("chat", PLAIN)
def test_smollm2(smollm2, smollm2_of_transformers, chat):
    ours, theirs, messages = lk.load_tokenizer(smollm2), smollm2_of_transformers, PLAIN[chat]
    example = encode(ours, messages)
    assert example.input_ids == theirs.apply_chat_template(messages, return_dict=False)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert shown(ours, example) == [f"{answer}<|im_end|>" for answer in answers]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            TURNS.replace("%}<s>", "if m.role != 'system' %}<s>", 1) + GENERATION,
            "leaves out message 0, of role 'system'",
        ),
        ("{{ bos_token }}" + TURNS + GENERATION, "starts with <s> twice"),
        (TURNS.replace("</s>", "\n") + GENERATION, "puts no end token after message 2"),
        (TURNS.replace("m.content", "m.content | upper") + GENERATION, None),
        ("{{ messages | map(attribute='content') | map('length') | sum }}</s>", "leaves unclear"),
    ],
)
def test_templates_that_would_teach_something_else(tiny, template, message):
    tok = tiny(template)
    if message is None:
        assert shown(tok, encode(tok, CHAT)) == ["CD</s>"]
        return
    with pytest.raises(lk.LorakitError, match=f"row 0: .*({message})"):
        encode(tok, CHAT)


ONE_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize("content", ["", "Let me look.", None])
def test_tool_calls_that_the_template_leaves_out(tiny, content):
    """Otherwise an empty answer would be learned in their place."""
    tok = tiny(TURNS.replace("m.content", "m.content or ''") + GENERATION)
    chat = [user("q"), {"role": "assistant", "content": content, "tool_calls": [ONE_CALL]}]
    for train_on in ("completion", "last_turn", "all"):
        with pytest.raises(lk.LorakitError, match="leaves out the tool_calls of message 1"):
            encode(tok, chat, train_on=train_on)
    shows = tiny(TURNS.replace("m.content", "m.content or '' }}{{ m.tool_calls") + GENERATION)
    assert "arguments" in shown(shows, encode(shows, chat))[0]


@pytest.mark.parametrize("index", [0, -1])
def test_a_template_that_shows_one_call_of_several(tiny, index):
    """That of gpt-oss shows the first alone. What it shows of one call says nothing of two."""
    call = f"m.content or '' }}}}{{{{ m.tool_calls[{index}] if m.tool_calls"
    tok = tiny(TURNS.replace("m.content", call) + GENERATION)
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": 2}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": calls}
        for calls in ([ONE_CALL], [ONE_CALL, other])
    ]
    encoder = Encoder(tok)
    encoder(Chat([user("q"), turns[0]], None, 0, "row 0"))
    with pytest.raises(lk.LorakitError, match=f"leaves out tool call {1 + index} of message 1"):
        encoder(Chat([user("q"), turns[1]], None, 0, "row 1"))


@pytest.mark.parametrize("train_on", ["completion", "last_turn", "all"])
def test_what_a_template_cuts_from_an_answer(tiny, train_on):
    """Reasoning beside the content, or within it, as the templates of DeepSeek-R1 cut it off."""
    beside = [user("q"), {"role": "assistant", "content": "ans", "reasoning_content": "because"}]
    with pytest.raises(lk.LorakitError, match="leaves out the reasoning_content of message 1"):
        encode(tiny(TURNS + GENERATION), beside, train_on=train_on)
    cut = TURNS.replace("m.content", "m.content.split('</think>')[-1]")
    within = [user("q"), assistant("<think>because</think>ans")]
    with pytest.raises(lk.LorakitError, match="leaves out the content of message 1, or a part"):
        encode(tiny(cut + GENERATION), within, train_on=train_on)
