"""Long chats are looked at in parts: what is learned is the same, and the work grows as they do."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data import chat_spans
from lorakit.data.encode import IGNORE, TODAY, Encoder
from lorakit.data.schemas import Chat
from lorakit.models.tokenizer import Tokenizer
from tests.chat_templates import TEMPLATES
from tests.data.chats import SYSTEM, TOOLS, assistant, encode, user

pytestmark = pytest.mark.usefixtures("today")

CALL = assistant(
    None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
)
RESULT = {"role": "tool", "content": "3"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = st.text("ab \n<>é中|😀.{}%", max_size=8) | st.sampled_from(
    ["<|im_end|>", "<s>a", "0123456789", "[INST]", "<think>\nr\n</think>\n\nb"]
)
EXCHANGES = st.tuples(
    TEXTS.map(user),
    st.lists(st.sampled_from([CALL, {**CALL, "reasoning": "r"}, CALL]), max_size=2),
    st.builds(assistant, TEXTS, reasoning=st.sampled_from([None, None, None, "why"])),
)


def messages_of(exchanges):
    found = []
    for question, calls, answer in exchanges:
        found += [question, *(each for call in calls for each in (call, RESULT)), answer]
    return found


def outcome(tok, messages, tools, train_on, limit):
    try:
        return encode(tok, messages, tools, train_on, max_seq_length=limit)
    except lk.LorakitError as error:
        return str(error)


@settings(max_examples=60)
@given(
    st.sampled_from(list(TEMPLATES)),
    st.lists(EXCHANGES, min_size=1, max_size=3).map(messages_of),
    st.sampled_from([[], [], [SYSTEM]]),
    st.sampled_from([[], [user("bye")]]),
    st.sampled_from([None, TOOLS]),
    st.sampled_from(["completion", "last_turn"]),
    st.sampled_from([None, 60]),
)
def test_parts_learn_what_the_whole_learns(
    make, family, messages, before, after, tools, train_on, limit
):
    """A chat gives the same tokens and labels, or the same error, in parts or whole."""
    tok, chat = make(family)[0], [*before, *messages, *after]
    outcomes = []
    for long in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_spans, "LONG", long)
            outcomes.append(outcome(tok, chat, tools, train_on, limit))
    event("an error" if isinstance(outcomes[0], str) else "an example")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("family", ["llama3", "qwen25", "gemma3", "mistral"])
def test_long_chats_equal_transformers(make, family, tools):
    ours, theirs = make(family)
    chat = [SYSTEM]
    for i in range(20):
        loop = [CALL, RESULT] * (i % 3) if family != "gemma3" else []
        chat += [user(f"question {i}"), *loop, assistant(f"answer {i}")]
    tools = tools if family != "gemma3" else None
    example = encode(ours, chat, tools)
    expected = theirs.apply_chat_template(
        chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.input_ids == expected["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == expected["assistant_masks"]


# ---- how the work grows ----


class Counting(Tokenizer):
    """A tokenizer that counts the characters that it renders and tokenizes."""

    characters = 0

    def apply_chat_template(self, *args, **options):
        text = super().apply_chat_template(*args, **options)
        self.characters += len(text)
        return text

    def encode(self, text, add_special_tokens=True):
        self.characters += len(text)
        return super().encode(text, add_special_tokens)


def work(tok, template, turns, limit, last, calls, tools):
    """The characters that one chat of `turns` turns costs."""
    counting = Counting(tok.backend, tok.special_tokens, template)
    chat = []
    for i in range(turns // 4):
        middle = [CALL, RESULT] if calls else [assistant("first"), user("go on")]
        chat += [user(f"question {i:3}"), *middle, assistant(f"answer {i:3}")]
    chat[-1] = {**chat[-1], **last}
    Encoder(counting, max_seq_length=limit)(Chat(chat, tools, 0, "row 0"))
    return counting.characters


@pytest.mark.parametrize("limit", [None, 200])
@pytest.mark.parametrize(
    ("family", "last", "calls", "tools"),
    [
        ("llama3", {}, False, None),
        ("llama3", {}, True, TOOLS),
        ("mistral", {}, False, None),
        ("mistral", {}, True, TOOLS),
        ("gemma3", {}, False, None),
        ("qwen25", {}, True, TOOLS),
        ("qwen3", {"reasoning_content": "why"}, False, None),
        ("qwen3", {"content": "<think>\nwhy\n</think>\n\nso"}, True, None),
        ("chatml", {}, False, None),
    ],
)
def test_twice_the_turns_cost_little_more_than_twice_the_work(
    make, family, last, calls, tools, limit
):
    """The search for where to cut renders and tokenizes log2(turns) times: 8 / 7 of it is more."""
    tok = make("qwen25" if family == "chatml" else family)[0]
    template = CHATML if family == "chatml" else tok.chat_template
    few, many = (work(tok, template, turns, limit, last, calls, tools) for turns in (200, 400))
    assert many <= 2.3 * few
    assert many > 1.7 * few


def test_one_question_and_many_calls(make):
    """Turns between tools are parts too."""
    tok = make("qwen3")[0]
    counts = []
    for calls in (50, 100):
        counting = Counting(tok.backend, tok.special_tokens, tok.chat_template)
        chat = [user("q"), *[{**CALL, "reasoning": "r"}, RESULT] * calls, assistant("so")]
        Encoder(counting)(Chat(chat, None, 0, "row 0"))
        counts.append(counting.characters)
    assert counts[1] <= 2.3 * counts[0]


# ---- the cut ----


@settings(max_examples=60)
@given(
    st.sampled_from(["llama3", "qwen3", "mistral"]),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(20, 200),
    st.booleans(),
)
def test_as_few_exchanges_go_as_will_do(make, family, lengths, limit, pair):
    """The ids are those of the first shorter chat, one exchange less at a time, that fits."""
    tok = make(family)[0]
    before = [SYSTEM]
    for asked, answered in lengths:
        before += [user("a" * asked), assistant("b " * answered + "b")]
    ends = [[*before[:-1], assistant(text)] for text in ("c", "d d d d d d")[: 1 + pair]]

    def ids(exchanges):
        return [
            tok.apply_chat_template([SYSTEM, *m[1 + 2 * exchanges :]], strftime_now=TODAY.strftime)
            for m in ends
        ]

    fitting = (n for n in range(len(lengths)) if max(map(len, ids(n))) <= limit)
    first = next(fitting, None)
    if pair:
        row = {"prompt": before[:-1], "chosen": ends[0][-1:], "rejected": ends[1][-1:]}
    else:
        row = {"prompt": before[:-1], "completion": ends[0][-1:]}
    [row] = lk.read_rows([row])
    example = Encoder(tok, max_seq_length=limit)(row)
    if first is None:
        assert max(len(answer.input_ids) for answer in example.answers) <= limit
    else:
        assert [answer.input_ids for answer in example.answers] == ids(first)
