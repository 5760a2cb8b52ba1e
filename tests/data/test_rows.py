"""Rows of any source: read whole, fetched again by number, and not held if they may be many."""

import json
import os
import tracemalloc
from collections import deque

import pytest

import lorakit as lk
from lorakit.data.rows import IndexedRows
from lorakit.data.schemas import content_of
from tests.data.files import CALL, HI, ROWS, TOOL, YO, written


def test_a_table_whose_index_is_no_row():
    pandas = pytest.importorskip("pandas")  # comes with datasets
    table = pandas.DataFrame([{"text": "a"}, {"text": "b"}])
    with pytest.raises(lk.LorakitError, match="data of type DataFrame has no rows under 0, 1"):
        lk.read_rows(table)
    assert [row.text for row in lk.read_rows(table.to_dict("records"))] == ["a", "b"]


def test_generators_and_other_sequences():
    values = [{"text": "a"}, {"text": "b"}]
    held = lk.read_rows(iter(values))
    assert held == lk.read_rows(values) == lk.read_rows(tuple(values))
    assert list(lk.read_rows(deque(values))) == held
    assert lk.read_rows(lk.read_rows(deque(values))).values == deque(values)


# ---- files ----


def test_chats_from_parquet_and_datasets(tmp_path):
    """Arrow gives every message the fields of all: those that are not there are None."""
    datasets = pytest.importorskip("datasets")
    values = [
        {"messages": [HI, YO], "tools": None},
        {"messages": [HI, CALL], "tools": json.dumps([TOOL])},
    ]
    dataset = datasets.Dataset.from_list(values)
    for rows in (
        lk.read_rows(dataset),
        lk.read_rows(dataset.to_iterable_dataset()),
        lk.read_rows(written(tmp_path / "r.parquet", values)),
    ):
        assert [row.messages for row in rows] == [[HI, YO], [HI, CALL]]
        assert [row.tools for row in rows] == [None, [TOOL]]
    assert isinstance(lk.read_rows(dataset), IndexedRows)
    with pytest.raises(lk.LorakitError, match="mapping of train, not rows; take one of its values"):
        lk.read_rows(datasets.DatasetDict({"train": dataset}))


def test_what_cannot_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(lk.LorakitError, match="no regular file"):
        lk.read_rows(tmp_path / "pipe")
    path = written(tmp_path / "rows.jsonl", ROWS)
    rows = lk.read_rows(path)
    path.write_text('{"text": "a"}\n')
    for use in (list, lambda rows: rows[1]):
        with pytest.raises(lk.LorakitError, match="was changed after it was read"):
            use(rows)


def test_a_large_file_is_not_held(tmp_path):
    """The memory of reading a file: 16 bytes a row, and one row."""
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "p" * 2000, "completion": "c" * 2000}) + "\n"
    path.write_text(line * 5000)  # 20 MB
    tracemalloc.start()
    rows = lk.read_rows(path)
    assert sum(len(row.completion) for row in rows) == 5000 * 2000
    assert rows[4999].place.endswith("line 5000")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


# ---- rows without an answer ----

TOLD = [HI, YO]
EMPTY = {"role": "assistant", "content": " \n"}


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"prompt": "a", "completion": "b"}, [{"prompt": "a", "completion": ""}]),
        ({"text": "a"}, [{"text": ""}, {"text": "\n"}, {"text": None}]),
        (
            {"instruction": "a", "input": "", "output": "b"},
            [{"instruction": "a", "output": text} for text in ("", None, " ")],
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            [
                {"prompt": "a", "chosen": "b", "rejected": ""},
                {"prompt": "a", "chosen": "", "rejected": "b"},
            ],
        ),
        (
            {"messages": TOLD},
            [
                {"messages": [HI, EMPTY]},
                {"messages": [HI, EMPTY, *TOLD]},
                {"messages": [HI, {"role": "assistant", "content": None}]},
            ],
        ),
        ({"messages": [HI, CALL]}, [{"messages": [HI, {**EMPTY, "tool_calls": []}]}]),
        (
            {"messages": [HI, {**EMPTY, "reasoning": "r"}]},
            [{"messages": [HI, {**EMPTY, "reasoning": ""}]}],
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            [{"prompt": "a", "chosen": "b", "rejected": x} for x in (None, "", " ")],
        ),
        (
            {"prompt": [HI, EMPTY, HI], "completion": [YO]},
            [{"prompt": [HI], "completion": [EMPTY]}],
        ),
    ],
)
def test_rows_with_an_empty_answer_are_left_out(tmp_path, caplog, good, empty):
    values, errors = [*empty, good, {"bad": 1}], []
    for source in (values, written(tmp_path / "rows.jsonl", values), deque(values)):
        caplog.clear()
        rows = lk.read_rows(source, skip_empty=True, errors=errors)
        assert list(map(content_of, rows)) == list(map(content_of, lk.read_rows([good])))
        said = f"{len(empty)} of {len(values)} rows have an empty answer and were left out"
        assert [said in line for line in caplog.messages] == [True]
        assert len(errors) == 1  # of the bad row
        errors.clear()
        read = lk.read_rows(source, errors=[], skip_empty=False)
        assert list(map(content_of, lk.read_rows(read, skip_empty=True))) == list(
            map(content_of, rows)
        )


def test_an_empty_answer_is_an_error_that_names_the_way_out(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(lk.LorakitError, match="line 1: the completion is empty.*set skip_empty"):
        lk.read_rows(path)
    with pytest.raises(lk.LorakitError, match="holds no rows but empty ones"):
        lk.read_rows(path, skip_empty=True)


def test_rows_with_an_answer_stay():
    """A message of another role may be empty, and so may what stands before the completion."""
    values = [
        {"messages": [{"role": "system", "content": ""}, *TOLD]},
        {"messages": [HI, CALL, {"role": "tool", "content": ""}, YO]},
    ]
    assert len(lk.read_rows(values, skip_empty=True)) == 2


def test_nulls_within_the_objects_of_a_table(tmp_path):
    """Arrow gives every object the fields of all, and so does whatever is made of its tables."""
    datasets = pytest.importorskip("datasets")

    def row(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [HI, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    values = [row({"city": "Rome"}), row({"day": 3})]
    table = datasets.Dataset.from_list(values)
    table.to_json(tmp_path / "table.jsonl")
    assert "null" in (tmp_path / "table.jsonl").read_text() or table[0] != values[0]
    for source in (
        values,
        written(tmp_path / "r.parquet", values),
        table,
        list(table),
        table.to_list(),
        (each for each in table),
        tmp_path / "table.jsonl",
    ):
        calls = [r.messages[1]["tool_calls"][0] for r in lk.read_rows(source)]
        assert [c["function"]["arguments"] for c in calls] == [{"city": "Rome"}, {"day": 3}]
