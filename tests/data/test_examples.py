"""Examples of rows: read and encoded once, and kept outside of memory if they are many."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data import check as source
from lorakit.data import examples as kept
from lorakit.data.encode import Encoder, JudgedExample
from lorakit.data.examples import Examples
from lorakit.data.rows import unread_rows
from tests.data.files import ROWS, pairs, written

LONG = {"prompt": "a" * 99, "completion": "b"}
PREFERENCE = [
    {"prompt": "p", "chosen": "yes", "rejected": "no"},
    {"prompt": "q", "chosen": "no", "rejected": "yes, yes"},
]


@pytest.fixture
def counted(monkeypatch):
    """Two counts of what was done since: rows that were made, and rows that were encoded."""
    counts = {"made": 0, "encoded": 0}

    def counting(name, function):
        def count(*arguments):
            counts[name] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(source, "make_row", counting("made", source.make_row))
    monkeypatch.setattr(Encoder, "__call__", counting("encoded", Encoder.__call__))
    return counts


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet", "jsonl.gz"])
def test_rows_are_read_and_encoded_once(tmp_path, tok, counted, kind):
    path = written(tmp_path / f"rows.{kind}", [*ROWS, LONG])
    examples = lk.encode_rows(path, tok, max_seq_length=60, over_length="drop")
    assert counted == {"made": 4, "encoded": 4}
    assert [len(example.input_ids) for example in examples] == list(examples.lengths)
    assert examples[-1] == examples[2]
    assert examples[1:] == [examples[1], examples[2]]
    assert counted == {"made": 4, "encoded": 4}
    assert len(examples.rows) == 4
    assert examples.place(2) == examples.rows[2].place
    with pytest.raises(IndexError):
        examples[3]


def test_examples_of_a_file_are_those_of_its_rows(tmp_path, tok):
    path = written(tmp_path / "rows.jsonl", [*ROWS, LONG])
    held = lk.encode_rows(list(lk.read_rows(path)), tok, max_seq_length=60, over_length="drop")
    read = lk.encode_rows(lk.read_rows(path), tok, max_seq_length=60, over_length="drop")
    at_once = lk.encode_rows(path, tok, max_seq_length=60, over_length="drop")
    for examples in (held, read, at_once):
        assert list(examples) == [Encoder(tok)(row) for row in lk.read_rows(path)[:3]]
        assert examples.largest_id == held.largest_id
        assert examples.place(2) == f"{path} line 3"


@settings(max_examples=50)
@given(pairs, st.sampled_from([1, 40, 1 << 20]))
def test_every_example_is_kept_as_it_is(tok, values, in_memory):
    """What is fetched is what was encoded, for all rows, in memory and in a temporary file."""
    judged = [{**v, "label": len(v["completion"]) % 2 == 0} for v in values]
    values = [{"prompt": v["prompt"], "chosen": v["completion"], "rejected": "x"} for v in values]
    rows, encoder = lk.read_rows(values), Encoder(tok)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "IN_MEMORY", in_memory)
        examples = Examples(rows, encoder)
        answers = Examples([row.chosen for row in rows], encoder)
        good_or_bad = Examples(lk.read_rows(judged), encoder)
    assert list(examples) == [encoder(row) for row in rows]
    assert list(answers) == [encoder(row.chosen) for row in rows]
    labels = [row["label"] for row in judged]
    assert list(good_or_bad) == list(map(JudgedExample, answers, labels))


def test_tokens_of_a_large_file_are_not_held(tmp_path, tok, monkeypatch):
    """The memory of encoding a file: IN_MEMORY, 40 bytes a row, and a few rows at work."""
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"text": "a" * 500}) + "\n") * 2000)  # of 4 MB of tokens
    monkeypatch.setattr(kept, "IN_MEMORY", 100_000)
    lk.encode_rows(path, tok, max_seq_length=600)  # what is made once and stays
    tracemalloc.start()
    examples = lk.encode_rows(path, tok, max_seq_length=600)
    assert sum(len(example.input_ids) for example in examples) == sum(examples.lengths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(examples.lengths) * 4 > 4e6
    assert peak < 1e6


def test_a_full_disk(tok, monkeypatch):
    class Full(kept.tempfile.SpooledTemporaryFile):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(lk.LorakitError, match=r"cannot be written to .*: No space left .*; TMPDIR"):
        lk.encode_rows(ROWS, tok, max_seq_length=60)


def test_a_file_that_changes(tmp_path, tok):
    """While it is read, nothing can be said of it; afterwards its tokens are there already."""
    path = written(tmp_path / "rows.jsonl", ROWS)
    examples = lk.encode_rows(path, tok, max_seq_length=60)
    first = examples[0]
    path.write_text("other rows")
    assert examples[0] == first
    assert examples.place(0) == f"{path} line 1"
    with pytest.raises(lk.LorakitError, match="was changed after it was read"):
        examples.rows[0]

    class Changing(Encoder):
        def __call__(self, row):
            with open(path, "a") as file:
                file.write("\n")
            return super().__call__(row)

    written(path, ROWS)
    with pytest.raises(lk.LorakitError, match="was changed after it was read"):
        Examples(unread_rows(path), Changing(tok))


def test_a_bad_row_is_named_and_nothing_is_kept(tmp_path, tok):
    path = written(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a"}])
    with pytest.raises(lk.LorakitError, match="line 4: field 'completion' is missing"):
        lk.encode_rows(path, tok, max_seq_length=60)
    for rows, message in (([], "data holds no rows"), (lk.split_rows(ROWS, [1, 0])[1], "no rows")):
        with pytest.raises(lk.LorakitError, match=message):
            lk.encode_rows(rows, tok, max_seq_length=60)


def test_rows_without_an_answer_are_left_out(tmp_path, tok, caplog):
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}, *ROWS])
    examples = lk.encode_rows(path, tok, max_seq_length=60, skip_empty=True)
    assert [examples.place(i) for i in range(3)] == [f"{path} line {i}" for i in (2, 3, 4)]
    assert f"{path}: 1 of 4 rows have an empty answer and were left out" in caplog.text
    with pytest.raises(lk.LorakitError, match="format is 'txt'.*'text'"):
        lk.encode_rows(path, tok, max_seq_length=60, format="txt")


def test_the_digest_of_a_run_is_that_of_lists_of_numbers(tok):
    """Checkpoints of older versions hold digests of the JSON of examples, so that must stay."""
    [pair, _] = lk.encode_rows(PREFERENCE, tok, max_seq_length=60)
    [one, *_] = lk.encode_rows(ROWS, tok, max_seq_length=60)
    both = [[list(e.input_ids), list(e.labels)] for e in pair.answers]
    assert json.loads(json.dumps(pair[:2])) == both  # what is told of pairs without a margin
    assert json.loads(json.dumps(one)) == [list(one.input_ids), list(one.labels)]
    assert {type(token) for token in one.input_ids + one.labels} == {int}
