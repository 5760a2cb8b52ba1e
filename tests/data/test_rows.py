"""Rows of any source: read whole, fetched again by number, and not held if they may be many."""

import json
import os
import tracemalloc
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.rows import FileRows, IndexedRows, content_digest, split_rows
from lorakit.data.schemas import Text
from tests.data.files import CALL, HI, ROWS, TOOL, YO, pairs, written


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


# ---- splitting ----


def test_split_depends_on_content_only(tmp_path):
    values = [{"text": f"row {i}"} for i in range(2000)]
    parts = split_rows(values)
    # the sizes are those of a draw by chance: a standard deviation of 18 rows, or 13
    assert [len(part) for part in parts] == pytest.approx([1600, 200, 200], abs=60)
    assert sorted(row for part in parts for row in part) == sorted(lk.read_rows(values))
    of_file = split_rows(written(tmp_path / "r.jsonl", values))
    assert isinstance(of_file[0].rows, FileRows)
    for part, other in zip(parts, of_file, strict=True):
        assert [row.text for row in part] == [row.text for row in other]
    more = split_rows([{"text": "new"}, *values[::-1], values[0]])
    for part, other in zip(parts, more, strict=True):
        assert {row.text for row in part} <= {row.text for row in other}
        assert {row.text for row in other} - {row.text for row in part} <= {"new"}
    # the same for good: a digest that changed would mix training and test rows of old runs
    assert content_digest(Text("row 0", "x")).hex() == "2dcb9962c182e7a0"


def test_split_of_pairs_depends_on_content_only():
    values = [{"prompt": "a", "chosen": f"b {i}", "rejected": "c"} for i in range(200)]
    forward, backward = split_rows(values), split_rows(values[::-1])
    for part, other in zip(forward, backward, strict=True):
        answers = [sorted(row.chosen.completion for row in rows) for rows in (part, other)]
        assert answers[0] == answers[1]


@given(pairs, st.integers(1, 5))
def test_every_row_is_in_one_part(values, n):
    parts = split_rows(values, [1 / n] * n)
    assert sorted(row.place for part in parts for row in part) == sorted(
        row.place for row in lk.read_rows(values)
    )


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.5, -0.5), (), ("a",)])
def test_shares_that_are_none(shares):
    with pytest.raises(lk.LorakitError, match="must be from 0 to 1 and sum to 1"):
        split_rows([{"text": "a"}], shares)


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
