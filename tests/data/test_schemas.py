"""What rows of every format mean, and which are refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.schemas import Chat, Instruction, Pair, Text
from lorakit.data.splitting import content_digest
from tests.data.files import CALL, HI, TOOL, YO, texts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "id": 3}, Pair("a", "b", "row 0")),
        ({"prompt": [HI], "completion": [YO]}, Chat([HI, YO], None, 1, "row 0")),
        ({"prompt": [], "completion": [HI, YO]}, Chat([HI, YO], None, 0, "row 0")),
        ({"text": "a"}, Text("a", "row 0")),
        ({"messages": [HI, YO], "text": "x"}, Chat([HI, YO], None, 0, "row 0")),
        ({"messages": [HI, CALL], "tools": [TOOL]}, Chat([HI, CALL], [TOOL], 0, "row 0")),
        ({"messages": [HI], "tools": json.dumps([TOOL])}, Chat([HI], [TOOL], 0, "row 0")),
        ({"messages": [{**HI, "name": None}], "tools": []}, Chat([HI], None, 0, "row 0")),
        ({"instruction": "a", "output": "b"}, Instruction("a", "", "b", "row 0")),
        ({"instruction": "a", "input": None, "output": "b"}, Instruction("a", "", "b", "row 0")),
        (
            {"instruction": "a", "input": "i", "output": "b", "text": "t"},
            Instruction("a", "i", "b", "row 0"),
        ),
        (
            {
                "system": "S",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yo"},
                ],
            },
            Chat([{"role": "system", "content": "S"}, HI, YO], None, 0, "row 0"),
        ),
    ],
)
def test_formats(row, expected):
    assert lk.read_rows([row]) == [expected]


def test_format_may_be_named():
    row = {"prompt": "a", "completion": "b", "text": "c"}
    assert lk.read_rows([row], format="text") == [Text("c", "row 0")]
    with pytest.raises(lk.LorakitError, match="row 0: field 'instruction' is missing"):
        lk.read_rows([row], format="alpaca")
    with pytest.raises(lk.LorakitError, match=r"format is 'alpacca' .did you mean 'alpaca'"):
        lk.read_rows([row], format="alpacca")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "no field that tells its format .did you mean 'txt'..: messages.* has txt"),
        ({}, "it has none"),
        ({3: 4}, "it has 3"),
        ({"messages": []}, "messages must be a list of one or more"),
        ({"messages": "x"}, "messages must be a list of one or more, not 'x'"),
        ({"messages": [HI, "x"]}, "row 0, message 1 must be an object"),
        ({"messages": [{"content": "x"}]}, "message 0: field 'role' is missing"),
        ({"messages": [{"role": "", "content": "x"}]}, "message 0 has an empty role"),
        ({"messages": [{"role": "user"}]}, "message 0 has neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": [1]}]}, "'content' must be text, not .1."),
        ({"messages": [HI], "tools": {"a": 1}}, "tools must be a list of objects"),
        ({"messages": [HI], "tools": "["}, "row 0, tools is not valid JSON"),
        ({"conversations": 3}, "conversations must be a list of turns"),
        ({"conversations": []}, "messages must be a list of one or more"),
        ({"conversations": [3]}, "turn 0 must be an object with from and value"),
        (
            {"conversations": [{"from": "humans", "value": "x"}]},
            "turn 0 is from 'humans' .did you mean 'human'..; it must be one of system, human",
        ),
        ({"conversations": [{"from": "gpt"}]}, "turn 0: field 'value' is missing"),
        ({"prompt": [HI], "completion": "x"}, "must both be text, or both messages"),
        ({"instruction": "a", "output": ""}, "the output is empty"),
        ({"text": ""}, "the text is empty"),
        ({"text": "x" * 999, "messages": None}, "messages must be a list"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(lk.LorakitError, match=message) as raised:
        lk.read_rows([row])
    assert len(str(raised.value)) < 300


def test_one_format_per_source():
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(lk.LorakitError, match="row 1: field 'text' is missing"):
        lk.read_rows(rows)
    with pytest.raises(lk.LorakitError, match="row 1: rows that were read and others are mixed"):
        lk.read_rows([*lk.read_rows(rows[:1]), rows[0]])
    for wrong in ({"train": rows}, 3):
        with pytest.raises(lk.LorakitError, match="data (is a mapping of train|must be a file)"):
            lk.read_rows(wrong)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


FIELDS = [
    *["messages", "conversations", "prompt", "completion", "instruction", "input", "output"],
    *["text", "tools", "system"],
]


@settings(max_examples=300)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4), max_size=3))
def test_any_values_give_rows_or_one_error(values):
    try:
        rows = lk.read_rows(values)
    except lk.LorakitError as error:
        assert len(str(error)) < 600
        return
    assert len(rows) == len(values)
    assert all(len(content_digest(row)) == 8 for row in rows)


@pytest.mark.parametrize("answer", [None, 3, True, {"role": "assistant", "content": "x"}])
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_an_answer_that_is_none(name, answer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | {name: answer}
    with pytest.raises(lk.LorakitError, match=f"row 0: {name} must be text or messages, not"):
        lk.read_rows([row])


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
        ({**called(), "functions": [FUNCTION], "tools": [FUNCTION]}, "both functions and tools"),
        ({**called(), "functions": 3}, "functions must be a list of objects"),
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
