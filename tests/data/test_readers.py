"""Files of every kind and of any bytes: their rows, or one sentence that says what is wrong."""

import gzip
import json
import shutil
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.rows import read_rows
from tests.data.files import ROWS, pairs, written

ZIPPED = ["jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]
KINDS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "JSONL", *ZIPPED]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, kind):
    rows = lk.read_rows(written(tmp_path / f"rows.{kind}", ROWS))
    expected = [tuple(row.values()) for row in ROWS]
    assert len(rows) == 3
    assert [row[:2] for row in rows] == expected
    assert [rows[i][:2] for i in (2, 0, -2)] == [expected[2], expected[0], expected[1]]
    assert [row[:2] for row in rows[1:]] == expected[1:]
    assert rows[2].place.endswith(
        {"json": "item 2", "csv": "line 5", "tsv": "line 5", "parquet": "row 2"}.get(
            kind.removesuffix(".gz"), "line 3"
        )
    )
    with pytest.raises(IndexError):
        rows[3]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(lk.LorakitError, match=r"needs pyarrow; install lorakit\[parquet\]"):
        lk.read_rows(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.json", b"{}", "must hold rows in one JSON array, .* not an object with nothing"),
        ("r.json", b'{"train": [{"text": "a"}]}', "under 'data', or .*, not an object with train"),
        ("r.json", b'{"data": "a"}', "an object with data"),
        ("r.json", b"3", "must hold rows in one JSON array, .*, not int"),
        ("r.json", b'{"text": "a"}\n{"text": ', "r.json line 2 is not valid JSON"),
        ("r.json", b'{"data": [{"text": 3}]}', "r.json item 0: field 'text' must be text"),
        ("r.json", b'\n{"txt": "a"}\n{"text": "b"}', "line 2 has no field .*did you mean 'txt'"),
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
        ("r.tsv", b"text\tlabel\na,b\n", "line 2: 1 fields, where the header has 2"),
        ("r.jsonl.gz", b'{"text": "a"}', r"r\.jsonl\.gz is no gzip file that can be read: Not a"),
        (
            "r.json.gz",
            gzip.compress(b'[{"text": "a"}]', mtime=0)[:-9],
            "is no gzip file .*: Compressed file",
        ),
        ("r.csv.gz", b"\x1f\x8b\x08" + bytes(20), "is no gzip file that can be read"),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n{', mtime=0),
            r"r\.jsonl\.gz line 2 is not valid JSON",
        ),
        ("r.parquet.gz", b"", r"files of kind '\.gz' are not read"),
        ("r.json.zst", b"", r"files of kind '\.zst' are not read"),
        ("r.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("r.parquet", b"PAR1", "r.parquet is no Parquet file that can be read"),
        ("r.xlsx", b"", r"files of kind '\.xlsx' are not read; \.jsonl, \.json, \.csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, message):
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


FRAGMENTS = st.sampled_from(
    [
        b'{"data": [{"text": "x"}]}',
        b'{"text": "x"}',
        b"\t",
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
@given(BYTES, st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]), st.booleans())
def test_any_bytes_give_rows_or_one_error(tmp_path_factory, data, kind, zipped):
    """Reading gives rows, each the same by its number as in turn, or a sentence."""
    path = tmp_path_factory.getbasetemp() / f"any.{kind}{'.gz' * zipped}"
    path.write_bytes(gzip.compress(data) if zipped else data)
    try:
        rows = lk.read_rows(path)
    except lk.LorakitError as error:
        assert str(error)
        return
    assert len(rows) > 0
    assert list(rows) == [rows[i] for i in range(len(rows))]


@settings(max_examples=150)
@given(pairs, st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", *ZIPPED]))
def test_no_row_is_lost(tmp_path_factory, values, kind):
    """Rows that another program has written are what they were."""
    path = written(tmp_path_factory.getbasetemp() / f"rows.{kind}", values)
    rows = lk.read_rows(path)
    assert [{"prompt": row.prompt, "completion": row.completion} for row in rows] == values
    assert list(rows) == [rows[i] for i in range(len(rows))]


@settings(max_examples=100)
@given(pairs, st.binary(max_size=8), st.data())
def test_a_damaged_gzip_file_gives_its_rows_or_one_error(tmp_path_factory, values, junk, data):
    """gzip's sum of the content lets nothing else through, for all files and all damage."""
    path = written(tmp_path_factory.getbasetemp() / "rows.jsonl.gz", values)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:start] + junk + whole[start + len(junk) :])
    try:
        rows = lk.read_rows(path)
    except lk.LorakitError as error:
        assert str(error)
        return
    assert [{"prompt": row.prompt, "completion": row.completion} for row in rows] == values


def test_the_temporary_file_goes_with_the_rows(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl.gz", ROWS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = lk.read_rows(path)
    assert len(list(tmp_path.iterdir())) == 2
    assert [a[:2] for a, b in zip(rows, rows, strict=True) if a == b] == [
        tuple(row.values()) for row in ROWS
    ]
    del rows
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(lk.LorakitError, match="no gzip file"):
        lk.read_rows(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_unpacking(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl.gz", ROWS)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(lk.LorakitError, match=r"unpacked into .*: No space left .*; TMPDIR"):
        lk.read_rows(path)


JSON_ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("".join(json.dumps(row) + "\n" for row in JSON_ROWS), "line 2"),
        ("\ufeff\n" + "\n\n".join(map(json.dumps, JSON_ROWS)), "line 4"),
        (json.dumps({"version": "1", "data": JSON_ROWS}), "item 1"),
        (json.dumps({"data": JSON_ROWS}, indent=1), "item 1"),
        (json.dumps(JSON_ROWS, indent=1), "item 1"),
    ],
)
def test_the_forms_of_a_json_file(tmp_path, text, place):
    """Those that datasets' to_json and load_dataset(field="data") have, and those of json.dump."""
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    rows = lk.read_rows(path)
    assert [row.text for row in rows] == ["a", "b"]
    assert rows[1].place == f"{path} {place}"


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_in_a_json_file_is_a_row(tmp_path, indent):
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"text": "a", "data": ["what a row holds beside"]}, indent=indent))
    assert [row.text for row in lk.read_rows(path)] == ["a"]


def test_json_lines_as_datasets_writes_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(JSON_ROWS).to_json(tmp_path / "rows.json")
    assert [row.text for row in lk.read_rows(tmp_path / "rows.json")] == ["a", "b"]


def test_tsv_as_pandas_writes_it(tmp_path):
    pandas = pytest.importorskip("pandas")  # comes with datasets
    table = pandas.DataFrame([{"prompt": 'a\t"b"', "completion": "c\nd"}] * 2)
    for name in ("rows.tsv", "rows.tsv.gz"):
        table.to_csv(tmp_path / name, sep="\t", index=False)
        assert [row[:2] for row in lk.read_rows(tmp_path / name)] == [('a\t"b"', "c\nd")] * 2


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


def test_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "é", "id": 3}\n\n{"prompt": "", "completion": "c"}\n'
    )
    assert [r[:2] for r in read_rows(path)] == [("a", "é"), ("", "c")]
    assert read_rows(path)[1].place.endswith("rows.jsonl line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ("\n\n", "holds no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "line 2 is not valid JSON"),
        ("[1]", r"line 1 must be an object.*not \[1\]"),
        ('{"promt": "a", "completion": "b"}', "'prompt' is missing .did you mean 'promt'"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "'completion' is missing"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' must be text, not 3"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(lk.LorakitError, match=message):
        read_rows(path)


def test_paths_that_are_no_files_of_rows(tmp_path):
    with pytest.raises(lk.LorakitError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(lk.LorakitError, match="is a directory"):
        read_rows(tmp_path)
    (tmp_path / "bin").write_bytes(b"\xff\xfe")
    with pytest.raises(lk.LorakitError, match="not UTF-8"):
        read_rows(tmp_path / "bin")
    with pytest.raises(lk.LorakitError, match="is no path"):
        read_rows("a\0b")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(lk.LorakitError, match="deep line 1 is not valid JSON"):
        read_rows(tmp_path / "deep")
    with pytest.raises(lk.LorakitError, match="row 1: field 'prompt' is missing"):
        read_rows([{"prompt": "a", "completion": "b"}, {"text": "c"}])
