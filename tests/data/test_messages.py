"""The messages of every tool become those of chat templates, and tell which of them are learned."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.messages import FLAGS, ROLES
from lorakit.models.tokenizer import Tokenizer
from tests.data.chats import GENERATION, TURNS, shown
from tests.data.files import HI, YO


def read(row):
    [made] = lk.read_rows([row])
    return made


ARGUMENTS = {"city": "Paris", "days": [1, 2]}
TEXT = json.dumps(ARGUMENTS)
CALLED = [{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}]
ASKED = {"role": "user", "content": "Weather?"}
FUNCTION = {"name": "weather", "parameters": {"type": "object"}}


def called(**message):
    return {"messages": [ASKED, {"role": "assistant", "content": "", **message}]}


@pytest.mark.parametrize(
    "row",
    [
        called(tool_calls=CALLED),
        called(
            tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": TEXT}}]
        ),
        called(tool_calls=[{"name": "weather", "arguments": TEXT}]),
        called(function_call={"name": "weather", "arguments": TEXT}),
        called(function_call={"name": "weather", "arguments": ARGUMENTS}),
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": json.dumps(CALLED[0]["function"])},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": json.dumps([CALLED[0]["function"]])},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "gpt", "value": "", "tool_calls": CALLED},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "gpt", "value": None, "function_call": CALLED[0]["function"]},
            ]
        },
    ],
)
def test_every_form_of_a_tool_call_becomes_the_one_of_templates(row):
    [chat] = lk.read_rows([row])
    assert chat.messages == [ASKED, {"role": "assistant", "content": "", "tool_calls": CALLED}]


def test_what_an_older_file_calls_functions_are_tools():
    answer = {"role": "function", "name": "weather", "content": "18"}
    [chat] = lk.read_rows(
        [{**called(function_call=CALLED[0]["function"]), "functions": [FUNCTION]}]
    )
    assert chat.tools == [{"type": "function", "function": FUNCTION}]
    assert read({**called(), "tools": json.dumps([FUNCTION])}).tools == chat.tools
    assert read({**called(), "tools": chat.tools}).tools == chat.tools
    other = {"type": "web_search", "name": "search"}
    assert read({**called(), "tools": [other]}).tools == [other]
    [chat] = lk.read_rows([{"messages": [ASKED, answer]}])
    assert chat.messages[1] == {"role": "tool", "name": "weather", "content": "18"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (called(tool_calls=[3]), "tool call 0 must be an object with name and arguments, not 3"),
        (called(tool_calls=[{"arguments": {}}]), "must have a function with a name"),
        (called(tool_calls={"name": "f"}), "tool_calls must be a list"),
        (called(tool_calls=[{"name": "f", "arguments": "{"}]), "arguments is not valid JSON"),
        (called(tool_calls=[{"name": "f", "arguments": "3"}]), "arguments must be an object"),
        (called(tool_calls=CALLED, function_call={"name": "f"}), "keep one of them"),
        (called(reasoning_content=["because"]), "message 1: field 'reasoning_content' must be"),
        ({**called(), "functions": [FUNCTION], "tools": [FUNCTION]}, "both functions and tools"),
        ({**called(), "functions": 3}, "functions must be a list"),
        (
            {"conversations": [{"from": "function_call", "value": "weather()"}]},
            "turn 0, value is not valid JSON",
        ),
    ],
)
def test_tool_calls_that_are_refused(row, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.read_rows([row])


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_arguments_as_json_text_are_the_arguments(arguments):
    forms = [arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)]
    rows = lk.read_rows([called(tool_calls=[{"name": "f", "arguments": f}]) for f in forms])
    assert [r.messages[1]["tool_calls"][0]["function"]["arguments"] for r in rows] == [
        arguments
    ] * 3


# ---- turns of other tools ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_role_means_the_same_in_capitals_and_in_both_forms(role):
    text = json.dumps(CALLED[0]) if ROLES[role] == "call" else "x"
    for name in (role, role.upper(), role.title(), role.replace("_", "-")):
        turns = [HI, {"from": name, "value": text}], [HI, {"role": name, "content": text}]
        one, other = (read({"conversations": each}).messages for each in turns)
        assert one == other
        assert one[1]["role"] == {"call": "assistant"}.get(ROLES[role], ROLES[role])


def test_turns_are_those_that_trl_makes():
    """TRL's own helper renames from and value, and leaves the roles to the caller."""
    data_utils = pytest.importorskip("trl.data_utils")
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]
    theirs = data_utils.maybe_convert_to_chatml({"conversations": [dict(t) for t in turns]})
    expected = read({"messages": theirs["messages"]})
    assert expected.messages == [HI, YO]
    for name in ("conversations", "conversation", "messages"):
        assert read({name: turns}) == expected
        assert read({name: theirs["messages"]}) == expected
    assert read(theirs["messages"]) == expected


def test_a_role_that_only_its_template_knows_is_kept():
    assert (
        read({"messages": [HI, {"role": "Critic", "content": "x"}]}).messages[1]["role"] == "Critic"
    )


def test_a_turn_of_sharegpt_keeps_what_templates_show():
    turn = {"from": "gpt", "value": "Yo", "reasoning": "r", "name": "n", "id": 3}
    [_, message] = read({"conversations": [HI, turn]}).messages
    assert message == {"role": "assistant", "content": "Yo", "reasoning": "r", "name": "n"}


def test_calls_that_follow_each_other_are_one_turn():
    call = {"name": "weather", "arguments": {}}
    row = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "Let me see."},
            {"role": "tool_call", "content": json.dumps(call)},
            {"role": "tool_call", "content": call},
            {"role": "tool_response", "content": "18"},
            {"role": "tool_call", "content": call, "loss": False},
        ]
    }
    made = {"type": "function", "function": call}
    assert read(row).messages == [
        ASKED,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [made, made]},
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "", "tool_calls": [made], "weight": 0},
    ]


# ---- parts of a content --------------------------------------------------------------------------


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# A template that reads parts as Gemma 3's does.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_parts_of_text_are_what_a_template_that_reads_them_writes(smollm2, tmp_path):
    from transformers import AutoTokenizer

    saved = lk.load_tokenizer(smollm2)
    Tokenizer(saved.backend, saved.special_tokens, PARTS).save(tmp_path)
    theirs, tok = AutoTokenizer.from_pretrained(tmp_path), lk.load_tokenizer(tmp_path)
    messages = [{**HI, "content": parts("Hi ")}, {**YO, "content": parts("Yo")}]
    [example] = lk.encode_rows(lk.read_rows([{"messages": messages}]), tok, max_seq_length=512)
    assert example.input_ids == theirs.apply_chat_template(messages, return_dict=False)
    assert read({"messages": [{**YO, "content": parts("Y", "", "o")}]}).messages == [YO]


def test_the_nulls_of_a_table_in_parts():
    part = {"type": "text", "text": "Hi", "image": None, "image_url": None}
    assert read({"messages": [{**HI, "content": [part]}]}).messages == [HI]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "image", "url": "x"}],
            "part 0 of the content is of type 'image'; lorakit reads",
        ),
        (
            [*parts("a"), {"type": "tool_use", "id": 3}],
            "part 1 of the content is of type 'tool_use'",
        ),
        ([{"type": "text"}], "part 0 of the content: field 'text' is missing"),
        ([{"type": "text", "text": 3}], "field 'text' must be text, not 3"),
        ([{"type": "text", "text": "a", "weight": 0}], "part 0 of the content has weight 0"),
        ([{"type": "text", "text": "a", "train": False}], "say it of the whole message"),
        (["a"], "field 'content' must be text, not .'a'."),
        ({"type": "text", "text": "a"}, "field 'content' must be text"),
    ],
)
def test_parts_that_are_refused(content, message):
    with pytest.raises(lk.LorakitError, match=f"row 0, message 0.*{message}"):
        lk.read_rows([{"messages": [{"role": "user", "content": content}]}])


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_parts_of_text_are_the_text(texts):
    row = {"messages": [{**HI, "content": parts(*texts)}]}
    assert read(row) == read({"messages": [{**HI, "content": "".join(texts)}]})


# ---- which turns are learned ---------------------------------------------------------------------


def two_turns(first, second):
    return {"messages": [HI, {**YO, **first}, HI, {**YO, "content": "Ok", **second}]}


ON = [1, 1.0, True]
OFF = [0, 0.0, False]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_is_on_changes_nothing(name):
    for on in ON:
        assert read(two_turns({name: on}, {name: on})) == read(two_turns({}, {}))


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("off", OFF)
def test_a_turn_that_is_off_is_no_label(name, off, tiny):
    tok = tiny(TURNS + GENERATION)
    row, plain = two_turns({name: off}, {}), two_turns({}, {})
    for train_on, labels in (
        ("completion", ["Ok</s>"]),
        ("last_turn", ["Ok</s>"]),
        ("all", ["<s>user: Hi</s><s>assistant: ", "<s>user: Hi</s><s>assistant: Ok</s>"]),
    ):
        [made] = lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=512, train_on=train_on)
        [whole] = lk.encode_rows(lk.read_rows([plain]), tok, max_seq_length=512, train_on=train_on)
        assert made.input_ids == whole.input_ids
        assert shown(tok, made) == labels
    sharegpt = {
        "conversations": [
            {"from": m["role"], "value": m["content"], **{n: m[n] for n in m if n == name}}
            for m in row["messages"]
        ]
    }
    assert read(sharegpt) == read(row)


def test_a_row_without_a_turn_that_is_on(tiny):
    tok = tiny(TURNS + GENERATION)
    for row, train_on in (
        (two_turns({"weight": 0}, {"weight": 0}), "completion"),
        (two_turns({}, {"weight": 0}), "last_turn"),
    ):
        with pytest.raises(lk.LorakitError, match="row 0: no turn of the assistant .* learn"):
            lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=512, train_on=train_on)


def test_the_answer_that_is_on_is_not_cut_for_one_that_is_off(tiny):
    tok = tiny(TURNS + GENERATION)
    row = two_turns({"content": "learned"}, {"content": "masked", "weight": 0})
    [made] = lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=44)
    assert shown(tok, made) == ["learned</s>"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weight": 0.5}, "has weight 0.5; a turn is learned or not: write 1 or 0"),
        ({"weight": 2}, "has weight 2"),
        ({"loss": [True, False]}, "has loss .True, False."),
        ({"train": "no"}, "has train 'no'"),
        ({"weight": float("nan")}, "has weight nan"),
        ({"weight": 0, "train": True}, "has weight 0 and train True, which contradict each other"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(lk.LorakitError, match=f"row 0, message 1 {message}"):
        lk.read_rows([{"messages": [HI, {**YO, **flags}]}])


def test_flags_of_those_who_are_no_assistant():
    """Axolotl would learn what a user says if it is told to. The others never do."""
    for flag in ({"train": False}, {"training": 0}, {"weight": 1}, {"weight": 0}, {"loss": True}):
        assert read({"messages": [{**HI, **flag}, YO]}) == read({"messages": [HI, YO]})
    with pytest.raises(lk.LorakitError, match="message 0 is of role 'user' and has train True"):
        lk.read_rows([{"messages": [{**HI, "train": True}, YO]}])


message_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "name", "arguments", "function", "weight"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
NAMES = [
    *["role", "content", "from", "value", "tool_calls", "function_call", "weight", "train", "loss"],
    *["loss_scale", "train_detail", "refusal", "images", "name", "thinking"],
]


@settings(max_examples=300)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from([*ROLES, "critic"]), "content": message_values},
            optional=dict.fromkeys(NAMES[2:], message_values),
        )
        | st.dictionaries(st.sampled_from(NAMES), message_values, max_size=4),
        min_size=1,
        max_size=3,
    )
)
def test_any_messages_give_a_chat_of_text_or_one_error(messages):
    try:
        row = read({"messages": messages})
    except lk.LorakitError as error:
        assert len(str(error)) < 600
        return
    for message in row.messages:
        assert isinstance(message["role"], str)
        assert isinstance(message.get("content", ""), str)
        assert message.get("weight", 0) == 0
    assert read({"messages": row.messages}).messages == row.messages  # what is read stays so
