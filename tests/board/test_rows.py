"""Rows of a run as tokens, which are those that its training learns."""

import json

import pytest

import lorakit as lk
from tests.conftest import ROWS


@pytest.fixture
def recorded(folder, tiny_dir, tmp_path):
    """recorded(**changes) gives run a the run file of a run that was started in another folder."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def recorded(**changes):
        values = {"model": str(tiny_dir), "data": "rows.jsonl", "max_seq_length": 64, **changes}
        record = {"state": "finished", "run_file": values, "cwd": str(tmp_path)}
        (folder / "a" / "run.json").write_text(json.dumps(record))

    recorded()
    return recorded


def test_the_tokens_are_those_of_the_training(recorded, get, tiny_dir, tmp_path):
    tok = lk.load_tokenizer(tiny_dir)
    rows = get("runs/a/rows?offset=2&limit=3")
    assert [row["place"] for row in rows] == [f"{tmp_path}/rows.jsonl line {i}" for i in (3, 4, 5)]
    for row, example in zip(rows, lk.encode_rows(ROWS[2:5], tok, max_seq_length=64), strict=True):
        ids = [token for piece in row["tokens"] for token in piece["ids"]]
        learned = [piece["learned"] for piece in row["tokens"] for _ in piece["ids"]]
        assert ids == example.input_ids
        assert learned == [label != -100 for label in example.labels]
        assert row["answer"] is None
    text = "".join(piece["text"] for piece in rows[0]["tokens"])
    assert ROWS[2]["prompt"] in text
    assert get(f"runs/a/rows?offset={len(ROWS)}") == []


def test_both_answers_of_a_pair(recorded, get, tmp_path):
    pairs = [{"prompt": "ab", "chosen": "c", "rejected": "d"}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    recorded(data="pairs.json", objective="dpo")
    better, worse = get("runs/a/rows")
    assert (better["answer"], worse["answer"]) == ("chosen", "rejected")
    assert better["tokens"] != worse["tokens"]


def test_a_row_that_cannot_be_encoded_says_why(recorded, get, tmp_path):
    recorded(max_seq_length=4, over_length="raise")
    [row] = get("runs/a/rows?limit=1")
    assert row["tokens"] == []
    assert "more than max_seq_length=4" in row["error"]


def test_what_cannot_be_read_is_one_sentence(recorded, refused, folder, tmp_path):
    assert refused("runs/deep%2Fb%20c/rows")[0] == 404
    recorded(model=str(tmp_path))
    code, said = refused("runs/a/rows")
    assert code == 409
    assert str(tmp_path) in said
    recorded(data="nothing.jsonl")
    assert refused("runs/a/rows") == (409, "nothing.jsonl does not exist.")
    recorded(data="../../../etc/hostname", lora={"r": "x"})
    assert refused("runs/a/rows")[0] == 409
