"""Rows that are prompts alone: what they mean, their tokens, and where they are refused."""

import pytest

import lorakit as lk
from lorakit.data.schemas import Prompt, fields_of
from lorakit.data.texts import answer_of, asked_of, spoken_texts
from tests.data.files import CALL, HI, TOOL, YO


def read(row):
    [made] = lk.read_rows([row])
    return made


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, Prompt("a", None, None, {}, "row 0")),
        ({"prompt": "a", "b": None}, Prompt("a", None, None, {"b": None}, "row 0")),
        ({"prompt": [HI], "tools": [TOOL]}, Prompt([HI], [TOOL], None, {}, "row 0")),
        ({"prompt": [HI], "system": "S"}, Prompt(
            [{"role": "system", "content": "S"}, HI], None, None, {}, "row 0"
        )),
        ({"prompt": [HI, YO, HI], "chat_template_kwargs": {"a": 1}}, Prompt(
            [HI, YO, HI], None, {"a": 1}, {}, "row 0"
        )),
    ],
)  # fmt: skip
def test_prompts(row, expected):
    made = read(row)
    assert made == expected
    assert read(fields_of(made)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "row 0: the prompt is empty"),
        ({"prompt": 3}, "'prompt' must be text, not 3"),
        ({"prompt": []}, "messages must be a list of one or more"),
        ({"prompt": [HI, YO]}, "row 0: the prompt ends with an answer of the assistant"),
        ({"prompt": [HI, CALL]}, "row 0: the prompt ends with an answer of the assistant"),
        ({"prompt": "a", "system": "S"}, "a field 'system', for which"),
        ({"prompt": "a", "rejected": "b"}, "a field 'rejected', one of two answers"),
    ],
)
def test_prompts_that_are_refused(row, message):
    with pytest.raises(lk.LorakitError, match=message):
        read(row)


def test_texts_of_a_prompt():
    chat = read({"prompt": [HI], "answer": "x"})
    assert (answer_of(chat), asked_of(chat)) == ("", [HI["content"]])
    assert spoken_texts(read({"prompt": "a"})) == ["a"]


def test_tokens_are_those_that_the_model_continues(tok):
    """A prompt has no label, and ends with the header of the assistant's turn if it is a chat."""
    rows = [{"prompt": "one two"}], [{"prompt": [HI]}]
    text, chat = (lk.encode_rows(each, tok, max_seq_length=64)[0] for each in rows)
    assert text.input_ids == tok.encode("one two")
    assert chat.input_ids == tok.apply_chat_template([HI], add_generation_prompt=True)
    assert set(text.labels) == set(chat.labels) == {-100}


def test_a_long_prompt_is_not_cut(tok):
    rows = [{"prompt": "one two three four five"}, {"prompt": "one"}]
    n = len(tok.encode("one"))
    with pytest.raises(
        lk.LorakitError, match=f"row 0: a prompt of .* more than max_seq_length={n}"
    ):
        lk.encode_rows(rows, tok, max_seq_length=n)
    assert len(lk.encode_rows(rows, tok, max_seq_length=n, over_length="drop")) == 1


def test_prompts_have_nothing_to_learn_from(tiny_dir, tok):
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="'sft' does not fit the rows.*grpo prompts alone"):
        lk.evaluate(model, tok, [{"prompt": "one"}])
    with pytest.raises(lk.LorakitError, match="row 0: a prompt alone has no completion to score"):
        lk.complete_rows(model, tok, [{"prompt": "one"}])


def test_prompts_are_not_mixed_with_rows_that_have_an_answer(tmp_path):
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    pairs.write_text('{"prompt": "a", "completion": "b"}\n')
    data = lk.DataConfig([lk.SourceConfig(str(path)) for path in (prompts, pairs)])
    with pytest.raises(
        lk.LorakitError, match="prompts.jsonl line 1 is a prompt alone, and .*pairs"
    ):
        lk.open_data(data)


def test_data_check_reads_prompts(tok):
    report = lk.lint_rows(lk.read_rows([{"prompt": "one"}, {"prompt": [HI]}, {"prompt": " "}]), tok)
    assert report.labels == 0
