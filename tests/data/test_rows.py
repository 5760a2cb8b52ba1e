"""Rows of every format and file: read whole, read again by place, and refused in one sentence."""

import csv
import json
import os
import tracemalloc
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.rows import FileRows, IndexedRows, content_digest, split_rows
from lorakit.data.schemas import Chat, Instruction, Pair, Text

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"role": "assistant", "tool_calls": [TOOL], "reasoning_content": "r", "name": "n"}


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

ROWS = [
    {"prompt": 'a "quoted", comma', "completion": "two\nlines"},
    {"prompt": "", "completion": "é 😀 \u2028 "},
    {"prompt": "x\r\ny", "completion": '"'},
]


def written(path, rows):
    """`rows` in the kind of file that the suffix names; CSV by Python, Parquet by pyarrow."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


KINDS = ["jsonl", "ndjson", "json", "csv", "parquet", "JSONL"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, kind):
    rows = lk.read_rows(written(tmp_path / f"rows.{kind}", ROWS))
    expected = [tuple(row.values()) for row in ROWS]
    assert len(rows) == 3
    assert [row[:2] for row in rows] == expected
    assert [rows[i][:2] for i in (2, 0, -2)] == [expected[2], expected[0], expected[1]]
    assert [row[:2] for row in rows[1:]] == expected[1:]
    assert rows[2].place.endswith(
        {"json": "item 2", "csv": "line 5", "parquet": "row 2"}.get(kind, "line 3")
    )
    with pytest.raises(IndexError):
        rows[3]


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


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(lk.LorakitError, match=r"needs pyarrow; install lorakit\[parquet\]"):
        lk.read_rows(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.json", b"{}", "must hold one JSON array of rows, not dict"),
        ("r.json", b"[1]", "r.json item 0 must be an object"),
        ("r.json", b"[]", "holds no rows"),
        ("r.json", b"[", "r.json is not valid JSON"),
        ("r.csv", b"", "holds no rows"),
        ("r.csv", b"text\n", "holds no rows"),
        ("r.csv", b"text,text\na,b\n", "line 1: two columns are called 'text'"),
        ("r.csv", b"text\na\n\nb,c\n", "line 4: 2 fields, where the header has 1"),
        ("r.csv", b'text\na\n"b\nc\n', "line 3 is not valid CSV: unexpected end of data"),
        ("r.csv", b"text\n\xff\n", "line 2 is not UTF-8 text"),
        ("r.csv", b"messages\nx\n", "line 2: messages must be a list"),
        ("r.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("r.parquet", b"PAR1", "r.parquet is no Parquet file that can be read"),
        ("r.xlsx", b"", r"files of kind '\.xlsx' are not read; \.jsonl, \.json, \.csv"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(lk.LorakitError, match=message):
        lk.read_rows(tmp_path / name)


def test_a_mark_at_the_start_of_a_file(tmp_path):
    for name, text in [
        ("r.csv", "text\na\n"),
        ("r.jsonl", '{"text": "a"}'),
        ("r.json", '[{"text":"a"}]'),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [row.text for row in lk.read_rows(tmp_path / name)] == ["a"]


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


def test_examples_of_a_file_are_made_again(tmp_path, tiny_dir):
    tok = lk.load_tokenizer(tiny_dir)
    path = written(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a" * 99, "completion": "b"}])
    held = lk.encode_rows(list(lk.read_rows(path)), tok, max_seq_length=60, over_length="drop")
    lazy = lk.encode_rows(lk.read_rows(path), tok, max_seq_length=60, over_length="drop")
    assert len(lazy) == len(held) == 3
    assert list(lazy) == list(held)
    assert lazy[1:] == held[1:]
    assert list(lazy.lengths) == list(held.lengths) == [len(e.input_ids) for e in held]
    assert lazy.place(2) == held.place(2) == f"{path} line 3"


# ---- any bytes ----

FRAGMENTS = st.sampled_from(
    [
        b'{"prompt": "a", "completion": "b"}',
        b'{"messages": [{"role": "user", "content": "x"}]}',
        b'{"conversations": [{"from": "gpt", "value": "x"}]}',
        b"prompt,completion",
        b"text",
        b"a,b",
        b'"a\nb","c"',
        b'"',
        b"\n",
        b"\r\n",
        b"\r",
        b"[",
        b"]",
        b",",
        b" ",
        b"null",
        b"1e999",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\xff",
        b"PAR1",
    ]
)
BYTES = st.lists(st.one_of(FRAGMENTS, st.binary(max_size=4)), max_size=12).map(b"".join)


@settings(max_examples=300)
@given(BYTES, st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_bytes_give_rows_or_one_error(tmp_path_factory, data, kind):
    """Reading gives rows, each the same by its number as in turn, or a sentence."""
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes(data)
    try:
        rows = lk.read_rows(path)
    except lk.LorakitError as error:
        assert str(error)
        return
    assert len(rows) > 0
    assert list(rows) == [rows[i] for i in range(len(rows))]


texts = st.text(max_size=15)
pairs = st.lists(
    st.fixed_dictionaries({"prompt": texts, "completion": texts.filter(bool)}),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150)
@given(pairs, st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_no_row_is_lost(tmp_path_factory, values, kind):
    """For all rows: written by another program and read, they are what they were."""
    path = written(tmp_path_factory.getbasetemp() / f"rows.{kind}", values)
    rows = lk.read_rows(path)
    assert [{"prompt": row.prompt, "completion": row.completion} for row in rows] == values
    assert list(rows) == [rows[i] for i in range(len(rows))]


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


# ---- splitting ----


def test_split_depends_on_content_only(tmp_path):
    values = [{"text": f"row {i}"} for i in range(2000)]
    parts = split_rows(values)
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
    """Arrow gives every object the fields of all; JSON says null where it means it."""
    datasets = pytest.importorskip("datasets")

    def row(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [HI, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    values = [row({"city": "Rome"}), row({"day": 3})]
    for source in (
        values,
        written(tmp_path / "r.parquet", values),
        datasets.Dataset.from_list(values),
    ):
        calls = [r.messages[1]["tool_calls"][0] for r in lk.read_rows(source)]
        assert [c["function"]["arguments"] for c in calls] == [{"city": "Rome"}, {"day": 3}]
    [kept] = lk.read_rows(written(tmp_path / "r.jsonl", [row({"day": None})]))
    assert kept.messages[1]["tool_calls"][0]["function"]["arguments"] == {"day": None}


def test_a_date_that_python_does_not_have(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    when = pyarrow.array([2**62], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["a"], "at": when}), tmp_path / "r.parquet")
    with pytest.raises(lk.LorakitError, match=r"r\.parquet row 0: date value out of range"):
        lk.read_rows(tmp_path / "r.parquet")


@pytest.mark.parametrize("bad", [b"\xff", b'"a"b', b'"a\xff\nb"'])
def test_what_follows_a_bad_line_of_csv(tmp_path, bad):
    path, errors = tmp_path / "r.csv", []
    path.write_bytes(b"text\ngood\n" + bad + b"\nalso good\n")
    rows = lk.read_rows(path, errors=errors)
    assert [rows[0].text, rows[-1].text] == ["good", "also good"]
    assert list(rows) == [rows[i] for i in range(len(rows))]
    assert f"{path} line 3 is not" in errors[0]
    with pytest.raises(lk.LorakitError, match="line 3 is not"):
        lk.read_rows(path)
