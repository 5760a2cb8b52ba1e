"""Calls of tools: what is exactly a call becomes one, all else stays text."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.serving.tool_calls import ToolText

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def read(pieces, tools=TOOLS):
    """The text and the calls, as (name, arguments), of an answer that comes in pieces."""
    answer = ToolText(tools)
    text = "".join(answer.push(piece) for piece in pieces)
    rest, calls = answer.finish()
    assert len({call["id"] for call in calls}) == len(calls)
    made = [call["function"] for call in calls]
    return text + rest, [(each["name"], json.loads(each["arguments"])) for each in made]


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (ROME, "", [("weather", {"city": "Rome"})]),
        (f"So.\n{ROME}\n{NOW}\n", "So.", [("weather", {"city": "Rome"}), ("time", {})]),
        ("no call <tool", "no call <tool", []),
    ],
)
def test_calls_stand_at_the_end(answer, text, calls):
    assert read([answer]) == (text, calls)


@pytest.mark.parametrize(
    "answer",
    [
        f"{ROME} and so on",
        ROME.removesuffix("</tool_call>"),
        ROME.replace("weather", "wether"),
        ROME.replace('"city"', "city"),
        '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": ["time"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"at": NaN}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {}, "more": 1}</tool_call>',
        f"{ROME}\n<tool_call>{{}}</tool_call>",
        f"<tool_call>{'[' * 10_000}</tool_call>",
        " \n",
    ],
)
def test_what_is_not_exactly_a_call_stays_text(answer):
    assert read([answer]) == (answer, [])


def test_without_tools_a_call_is_text():
    assert read([ROME], None) == (ROME, [])


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "_call>", " ", "\n", "a", ROME, NOW]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.lists(st.integers(0, 200), max_size=8))
@example(f"so: {ROME}", list(range(100)))
def test_pieces_add_up_to_the_same_answer(answer, cuts):
    """However an answer is cut, its text and its calls are the same."""
    at = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[a:b] for a, b in itertools.pairwise(at)]
    text, calls = read(pieces)
    assert (text, calls) == read([answer])
    if not calls:
        assert text == answer
