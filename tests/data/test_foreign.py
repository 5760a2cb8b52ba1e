"""Fields of other tools: docs/data.md says of each what lorakit does, and lorakit does so."""

import json
import re
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.data.foreign import LABELS, REFUSED, REFUSED_IN_MESSAGES
from lorakit.data.formats import FORMATS
from lorakit.data.messages import FLAGS
from lorakit.data.schemas import Judged
from lorakit.models.chat_template import REASONING
from tests.data.files import HI, TOOL, YO

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
NO = {"role": "assistant", "content": "No"}
CALL = {"name": "f", "arguments": {}}
CHAT = {"messages": [HI, YO]}
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
ADD = {"instruction": "Add.", "output": "4"}
PREFERRED = {"preferred_output": [YO], "non_preferred_output": [NO], "input": CHAT}


def table(head):
    """What becomes of each field, of the table of docs/data.md with this head."""
    lines = PAGE.partition(f"| {head} | whose | here |\n")[2].partition("\n\n")[0].splitlines()[1:]
    fates = {}
    for line in lines:
        names, _, fate = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            fates[name] = re.match(r"\w+", fate)[0]
    return fates


ROW, MESSAGE = table("field of a row"), table("field of a message")
# A row for each field that is read: with another value there it means something else.
READ = {
    "messages": (CHAT, [HI, NO]),
    "conversations": ({"conversations": TURNS}, [HI, NO]),
    "conversation": ({"conversation": TURNS}, [HI, NO]),
    "prompt": ({"prompt": "a", "completion": "b"}, "c"),
    "completion": ({"prompt": "a", "completion": "b"}, "c"),
    "text": ({"text": "a"}, "b"),
    "instruction": (ADD, "Sum."),
    "output": (ADD, "5"),
    "input": (ADD, "2 and 2"),
    "history": (ADD, [["Hi", "Yo"]]),
    "system": (CHAT, "Be brief."),
    "system_prompt": (CHAT, "Be brief."),
    "chosen": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "d"),
    "rejected": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "d"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c"}, 0.5),
    "preferred_output": (PREFERRED, [HI]),
    "non_preferred_output": (PREFERRED, [HI]),
    "rejected_messages": (CHAT, [HI, NO]),
    "rejected_response": (CHAT, "No"),
    "tools": (CHAT, [TOOL]),
    "functions": (CHAT, [TOOL["function"]]),
    "chat_template_kwargs": (CHAT, {"enable_thinking": False}),
}
READ_IN_MESSAGES = {
    "role": (YO, "user"),
    "content": (YO, "x"),
    "from": (TURNS[1], "human"),
    "value": (TURNS[1], "x"),
    "tool_calls": (YO, [CALL]),
    "function_call": (YO, CALL),
    **dict.fromkeys(FLAGS, (YO, 0)),
    **dict.fromkeys(("tool_call_id", "name", *REASONING), (YO, "x")),
}


def read(row, format=None):
    [made] = lk.read_rows([row], format=format)
    return made


def test_the_tables_have_every_field_that_the_code_knows():
    read_here = {name for forms in FORMATS.values() for fields in forms for name in fields}
    assert read_here | set(READ) | set(LABELS) == {n for n in ROW if ROW[n] == "read"}
    assert set(READ_IN_MESSAGES) == {n for n in MESSAGE if MESSAGE[n] == "read"}
    assert set(REFUSED) <= {name for name in ROW if ROW[name] == "refused"}
    assert set(REFUSED_IN_MESSAGES) == {name for name in MESSAGE if MESSAGE[name] == "refused"}
    assert set(ROW.values()) | set(MESSAGE.values()) == {"read", "refused", "ignored"}


@pytest.mark.parametrize("name", READ)
def test_a_field_that_is_read_says_something(name):
    row, value = READ[name]
    assert read({**row, name: value}) != read(row)


@pytest.mark.parametrize("name", READ_IN_MESSAGES)
def test_a_field_of_a_message_that_is_read_says_something(name):
    message, value = READ_IN_MESSAGES[name]
    assert read({"messages": [HI, {**message, name: value}]}) != read({"messages": [HI, message]})


@pytest.mark.parametrize("name", [name for name in ROW if ROW[name] == "ignored"])
def test_a_field_that_is_ignored_changes_nothing(name):
    for value in (True, [1], "x"):
        assert read({**CHAT, name: value}) == read(CHAT)


@pytest.mark.parametrize("name", [name for name in ROW if ROW[name] == "refused"])
def test_a_field_that_is_refused_is_named(name):
    with pytest.raises(lk.LorakitError, match=rf"row 0.*\b{name}\b"):
        read({name: ["x"]})
    if name in REFUSED:
        for row in (CHAT, {"text": "a"}, {"prompt": "a", "completion": "b"}, ADD):
            with pytest.raises(lk.LorakitError, match=f"row 0 has a field '{name}'"):
                read({**row, name: ["x"]})
            for nothing in (None, [], "", {}):
                assert read({**row, name: nothing}) == read(row)


@pytest.mark.parametrize("name", REFUSED_IN_MESSAGES)
def test_a_field_of_a_message_that_is_refused_is_named(name):
    for noun, row in (("message", [YO]), ("turn", TURNS[1:])):
        field = "messages" if noun == "message" else "conversations"
        with pytest.raises(lk.LorakitError, match=f"row 0, {noun} 0 has a field '{name}'"):
            read({field: [{**row[0], name: "x"}]})
        assert read({field: [{**row[0], name: None}]}) == read({field: row})


LABELED = [CHAT, {"conversations": TURNS}, {"prompt": "a", "completion": "b"}, ADD]


@pytest.mark.parametrize("name", LABELS)
def test_a_label_says_whether_an_answer_is_good(name):
    for row in LABELED:
        for verdict in (False, True, "false", "True"):
            judged = Judged(read(row), str(verdict).lower() == "true", "row 0")
            assert read({**row, name: verdict}) == judged
        for verdict in (0, 1, 0.0, "0", "1", False, True, "TRUE"):
            judged = Judged(read(row), str(verdict).lower() in ("1", "true"), "row 0")
            assert read({**row, name: verdict}, "unpaired_preference") == judged
        for other in ("spam", 3, []):
            with pytest.raises(lk.LorakitError, match=f"row 0: {name} must be true or false"):
                read({**row, name: other}, "unpaired_preference")
        with pytest.raises(lk.LorakitError, match="row 0: field 'label' is missing"):
            read(row, "unpaired_preference")


@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_calls_an_answer_bad_is_refused_where_it_is_not_asked_for(name):
    for row in LABELED:
        format = next(f for f in FORMATS if any(all(n in row for n in form) for form in FORMATS[f]))
        for bad in (False, "false", "False"):
            with pytest.raises(lk.LorakitError, match="read such rows with format: unpaired_pref"):
                read({**row, name: bad}, format)
        for bad in (0, 0.0, "0"):
            with pytest.raises(lk.LorakitError, match="read such rows with format: unpaired_pref"):
                read({**row, name: bad})
        for good in (1, "spam", "", None, 3):
            assert read({**row, name: good}) == read(row)
        for good in (True, "true"):
            assert read({**row, name: good}, format) == read(row)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for row in ({"text": "a"}, pair):  # the class of a text; a pair has a bad answer of its own
        assert read({**row, name: False}) == read(row)


CONTEXT = {
    "system": "S",
    "system_prompt": "S",
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "chat_template_kwargs": {"x": 1},
    "history": [["a", "b"]],
}


@pytest.mark.parametrize("name", CONTEXT)
def test_what_only_a_chat_has_a_place_for_is_refused_beside_text(name):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, pair):
        with pytest.raises(lk.LorakitError, match=f"row 0 has a field '{name}', for which"):
            read({**row, name: CONTEXT[name]})
        if name not in ("system", "system_prompt"):
            with pytest.raises(lk.LorakitError, match=f"row 0 has a field '{name}', for which"):
                read({**row, name: json.dumps(CONTEXT[name])})
        for nothing in (None, "", *([] if "system" in name else ([], "[]"))):
            assert read({**row, name: nothing}) == read(row)


def test_a_row_that_is_read_as_another_format_may_hold_what_belongs_to_the_first():
    row = {**CHAT, "tools": [TOOL], "system": "S", "text": "a"}
    assert read(row, "text") == read({"text": "a"})


def test_history_beside_messages_is_refused():
    with pytest.raises(lk.LorakitError, match="row 0 has a field 'history'"):
        read({**CHAT, "history": [["a", "b"]]})
    assert read({**CHAT, "history": "of a patient"}) == read(CHAT)
