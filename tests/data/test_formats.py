"""What rows of every format mean, and which are refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.schemas import Chat, Choice, Instruction, Judged, Pair, Text
from lorakit.data.splitting import content_digest
from lorakit.models.tokenizer import Tokenizer
from tests.data.chats import GENERATION, TURNS, shown
from tests.data.files import CALL, HI, TOOL, YO, texts


def read(row):
    [made] = lk.read_rows([row])
    return made


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
        (
            {"prompt": "a", "completion": "b", "label": True},
            Judged(Pair("a", "b", "row 0"), True, "row 0"),
        ),
        (
            {"messages": [HI, YO], "kto_tag": False},
            Judged(Chat([HI, YO], None, 0, "row 0"), False, "row 0"),
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
        ({"messages": [HI], "tools": {"a": 1}}, "tools must be a list"),
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
        ({"messages": None, "x": 3}, "no field that tells its format.*; it has x"),
        ({"label": True}, "field that tells its format"),
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
    *["text", "tools", "system", "chosen", "rejected", "history", "chat_template_kwargs"],
    *["preferred_output", "non_preferred_output", "rejected_messages", "rejected_response"],
    *["label", "images"],
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


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "{} must be text or messages, not None"),
        (3, "{} must be text or messages, not 3"),
        (True, "{} must be text or messages, not True"),
        (YO, "prompt, chosen and rejected must all be text, or all be messages"),
        ([YO], "prompt, chosen and rejected must all be text, or all be messages"),
    ],
)
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_an_answer_that_is_none(name, answer, message):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | {name: answer}
    with pytest.raises(lk.LorakitError, match="row 0: " + message.format(name)):
        lk.read_rows([row], format="preference")


# ---- what rows said before -----------------------------------------------------------------------

FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
WEATHER = {"type": "function", "function": FUNCTION}
ASK = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OLDER = {
    "messages": {
        "messages": [{"role": "system", "content": "S"}, {**HI, "name": "n"}, YO],
        "id": 3,
    },
    "calls": {
        "messages": [HI, {"role": "assistant", "tool_calls": [WEATHER], "reasoning_content": "r"}],
        "tools": [ASK],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Hi", "id": 1},
            {"from": "function_call", "value": json.dumps(FUNCTION)},
            {"from": "observation", "value": "18"},
            {"from": "gpt", "value": "Yo"},
        ],
        "system": "S",
        "tools": json.dumps([ASK]),
    },
    "pair": {"prompt": "a", "completion": "b", "source": "x"},
    "chat pair": {"prompt": [HI], "completion": [YO], "tools": [ASK]},
    "choice": {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 0.5},
    "chats": {"chosen": [HI, YO], "rejected": [HI, {**YO, "content": "No"}]},
    "instruction": {"instruction": "a", "input": "i", "output": "b", "text": "t"},
    "text": {"text": "é 😀"},
}
# Digests that the version before these formats had more forms gave.
DIGESTS = {
    "messages": "c29fa6485a1573da",
    "calls": "93fdb29e946acb64",
    "sharegpt": "3f354d4576eb8105",
    "pair": "54f0d80b0a63cf2f",
    "chat pair": "d0d925edc310ad60",
    "choice": "e4f3aa671329ca29",
    "chats": "67f3becb3046ea2a",
    "instruction": "35d712bccee35ad7",
    "text": "8f5f32cb8f10fc17",
}


@pytest.mark.parametrize("name", OLDER)
def test_rows_keep_their_part_of_a_split(name):
    """And a run that began with them goes on."""
    assert content_digest(read(OLDER[name])).hex() == DIGESTS[name]


def test_a_variable_of_the_template_changes_the_digest():
    row, other = ({"messages": [HI, YO], "chat_template_kwargs": {"x": x}} for x in (1, 2))
    plain = {"messages": [HI, YO], "chat_template_kwargs": {}}
    assert len({content_digest(read(each)) for each in (row, other, plain)}) == 3
    assert content_digest(read(plain)) == content_digest(read({"messages": [HI, YO]}))


# ---- what stands beside a chat -------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "S"}
NO = {"role": "assistant", "content": "No"}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, YO]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"prompt": [HI], "completion": [YO]},
        {"prompt": [], "completion": [HI, YO]},
        {"instruction": "Hi", "output": "Yo"},
    ],
)
def test_a_system_prompt_is_the_first_message(row, name):
    made = read({**row, name: "S"})
    assert made.messages == [SYSTEM, HI, YO]
    assert made.messages[made.first :][-1] == YO
    assert made.first == (2 if row.get("prompt") else 0)


def test_a_system_prompt_that_is_there_already():
    assert read({"messages": [SYSTEM, HI, YO], "system": "S"}).messages == [SYSTEM, HI, YO]
    developer = {"role": "developer", "content": "S"}
    assert read({"messages": [developer, HI], "system": "S"}).messages == [developer, HI]
    with pytest.raises(lk.LorakitError, match=r"row 0 has a system prompt in a field of its own"):
        lk.read_rows([{"messages": [SYSTEM, HI, YO], "system": "T"}])


def test_an_instruction_with_history_is_a_chat():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "S", "tools": [TOOL]}
    last = [{"role": "user", "content": "Add.\n\n2, 2"}, {"role": "assistant", "content": "4"}]
    chat = Chat([SYSTEM, HI, YO, *last], [TOOL], 0, "row 0")
    assert read({**row, "history": [["Hi", "Yo"]]}) == chat
    assert read({**row, "history": json.dumps([["Hi", "Yo"]])}) == chat
    for wrong in ([["Hi"]], [["Hi", 3]], ["Hi"], 3, "x"):
        with pytest.raises(lk.LorakitError, match="row 0.*history"):
            lk.read_rows([{**row, "history": wrong}])


def test_which_answers_of_a_history_are_learned(tiny):
    """All of them, as LLaMA-Factory does; the last one alone, as its mask_history does."""
    tok = tiny(TURNS + GENERATION)
    row = {"instruction": "ok?", "output": "4", "history": [["Hi", "Yo"]]}
    for train_on, labels in (("completion", ["Yo</s>", "4</s>"]), ("last_turn", ["4</s>"])):
        [made] = lk.encode_rows(lk.read_rows([row]), tok, max_seq_length=99, train_on=train_on)
        assert shown(tok, made) == labels


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, {"enable_thinking": True}, {}])
def test_variables_reach_the_template_as_with_transformers(kwargs, smollm2, tmp_path):
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}"
        "<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}"
    )
    saved = lk.load_tokenizer(smollm2)
    Tokenizer(saved.backend, saved.special_tokens, template).save(tmp_path)
    theirs, tok = AutoTokenizer.from_pretrained(tmp_path), lk.load_tokenizer(tmp_path)
    row = {"messages": [HI, YO], "chat_template_kwargs": kwargs}
    for each in (row, {**row, "chat_template_kwargs": json.dumps(kwargs)}):
        [example] = lk.encode_rows(lk.read_rows([each]), tok, max_seq_length=99)
        assert example.input_ids == theirs.apply_chat_template(
            [HI, YO], return_dict=False, **kwargs
        )
        assert shown(tok, example) == ["Yo<|im_end|>"]  # the template wrote the rest
    pair = {"prompt": [HI], "chosen": [YO], "rejected": [NO], "chat_template_kwargs": kwargs}
    [both] = lk.encode_rows(lk.read_rows([pair]), tok, max_seq_length=99)
    assert both.chosen == example


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "self", "source"])
def test_variables_that_a_row_cannot_set(name):
    row = {"messages": [HI, YO], "chat_template_kwargs": {name: "x"}}
    with pytest.raises(lk.LorakitError, match=f"chat_template_kwargs cannot set '{name}'"):
        lk.read_rows([row])
    with pytest.raises(lk.LorakitError, match="chat_template_kwargs must be an object, not .3"):
        lk.read_rows([{**row, "chat_template_kwargs": [3]}])


# ---- pairs of answers ----------------------------------------------------------------------------


def pair_of(before, chosen, rejected, tools=None):
    whole = [
        Chat([*before, answer], tools, len(before), f"row 0, {name}")
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    ]
    return Choice(*whole, "row 0")


TURNS_OF_HI = [{"from": "human", "value": "Hi"}]
SHAREGPT = {"chosen": {"from": "gpt", "value": "Yo"}, "rejected": {"from": "gpt", "value": "No"}}
ANSWERS = {"chosen": [YO], "rejected": [NO]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HI], **ANSWERS},
        {"prompt": [HI], "chosen": YO, "rejected": NO},
        {"prompt": [HI], "chosen": "Yo", "rejected": "No"},
        {"prompt": "Hi", **ANSWERS},
        {"prompt": "Hi", "chosen": [HI, YO], "rejected": [HI, NO], "messages": [HI, YO]},
        {"prompt": [HI], "chosen": [HI, YO], "rejected": [HI, NO]},
        {"conversations": TURNS_OF_HI, **SHAREGPT},
        {"conversation": TURNS_OF_HI, **SHAREGPT},
        {"messages": [HI], "chosen": "Yo", "rejected": "No"},
        {"messages": [HI], **ANSWERS},
        {"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"},
        {"messages": [HI, YO], "rejected_messages": [HI, NO]},
        {"messages": [HI, YO], "rejected_response": "No"},
        {"messages": [HI, YO], "rejected_response": [NO]},
        {"conversations": [HI, YO], "rejected_response": "No"},
        {"conversation": [HI, YO], "rejected_messages": [HI, NO]},
        {"input": {"messages": [HI]}, "preferred_output": [YO], "non_preferred_output": [NO]},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(row):
    assert read(row) == pair_of([HI], YO, NO)
    assert read({**row, "score_chosen": 9.0}) == pair_of([HI], YO, NO)
    assert read({**row, "margin": 0.5}) == pair_of([HI], YO, NO)._replace(margin=0.5)


def test_pairs_after_several_turns():
    before = [SYSTEM, HI, YO, HI]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}, *TURNS_OF_HI]
    expected = pair_of(before, YO, NO)
    assert read({"conversations": sharegpt, **SHAREGPT, "system": "S"}) == expected
    assert read({"messages": [*before, YO], "rejected_response": "No"}) == expected
    instruction = {"instruction": "Hi", "history": [["Hi", "Yo"]], "system": "S"}
    assert read({**instruction, "chosen": "Yo", "rejected": "No"}) == expected
    openai = {"input": {"messages": before, "tools": [TOOL], "parallel_tool_calls": True}}
    assert read({**openai, "preferred_output": [YO], "non_preferred_output": [NO]}) == pair_of(
        before, YO, NO, [TOOL]
    )


messages = st.sampled_from([HI, YO, NO, SYSTEM, {"role": "user", "content": "a"}])


@settings(max_examples=100)
@given(st.lists(messages, max_size=3), messages, messages, st.booleans())
def test_the_prompt_of_two_chats_is_that_of_trl(before, one, other, named):
    trl = pytest.importorskip("trl.data_utils")
    row = {"chosen": [*before, one], "rejected": [*before, other]}
    if named and before and one != other:
        row["prompt"] = before[0]["content"]
    theirs = trl.maybe_extract_prompt(dict(row))
    if not theirs["prompt"]:  # TRL drops a prompt that neither chat holds, and trains without one
        if not named:
            with pytest.raises(lk.LorakitError, match="begin with no message in common"):
                read(row)
        return
    made = read(row)
    for answer, name in ((made.chosen, "chosen"), (made.rejected, "rejected")):
        assert answer.messages[: answer.first] == theirs["prompt"]
        assert answer.messages[answer.first :] == theirs[name]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x", "chosen": [HI, YO], "rejected": [HI, NO]},
            "row 0: chosen and rejected begin with messages that do not hold the prompt",
        ),
        ({"prompt": 3, "chosen": [HI, YO], "rejected": [HI, NO]}, "'prompt' must be text, not 3"),
        ({"chosen": "a", "rejected": "b"}, "need a prompt, unless both are chats"),
        (
            {"question": "a", "chosen": [YO], "rejected": [NO]},
            "begin with no message in common",
        ),
        ({"preferred_output": [YO], "input": {"messages": [HI]}}, "'non_preferred_output' is miss"),
        ({"preferred_output": [YO], "input": "x"}, "input must be an object with messages"),
        ({"messages": [HI, YO], "rejected_response": 3}, "rejected must be text or messages"),
        ({"messages": [HI, YO], **ANSWERS}, "row 0, messages: the last message is an answer"),
        ({"messages": [HI, YO], "rejected": "No"}, "has a field 'rejected', one of two answers"),
        (
            {"prompt": "a", "completion": "b", "chosen": "c"},
            "a field 'chosen', one of two",
        ),
        (
            {"instruction": "a", "output": "b", "rejected_response": "c"},
            "'rejected_response'",
        ),
    ],
)
def test_pairs_that_are_refused(row, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.read_rows([row])


def test_a_flag_that_has_the_name_of_an_answer_is_none():
    assert read({"text": "a", "rejected": False}).text == "a"


def test_a_format_may_be_chosen_where_a_row_has_two():
    row = {"chosen": [HI, YO], "rejected": [HI, NO], "messages": [HI, YO], "prompt": "Hi"}
    assert read(row) == pair_of([HI], YO, NO)
    assert lk.read_rows([row], format="messages") == [Chat([HI, YO], None, 0, "row 0")]


def test_a_column_of_nulls_tells_no_format():
    row = {"chosen": None, "rejected": None, "messages": [HI, YO], "conversations": None}
    assert read(row) == Chat([HI, YO], None, 0, "row 0")
