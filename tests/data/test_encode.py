"""Rows, their token ids and labels, and the batches they end up in."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.batching import batches, collate
from lorakit.data.encode import IGNORE, Example, encode_rows
from lorakit.data.rows import read_rows
from lorakit.data.schemas import Pair


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


def test_labels_are_the_completion_and_the_end(tok):
    [example] = encode_rows([Pair("ab", "cd", "row 0")], tok, max_seq_length=99)
    a, b, c, d = (tok.encode(ch, add_special_tokens=False)[0] for ch in "abcd")
    assert example.input_ids == [1, a, b, c, d, 2]
    assert example.labels == [IGNORE] * 3 + [c, d, 2]


@settings(max_examples=80)
@given(st.text("abc ", max_size=30), st.text("xyz", min_size=1, max_size=30), st.integers(2, 70))
def test_truncation_keeps_the_completion(tok, prompt, completion, limit):
    """At most `limit` tokens: BOS, the end of the prompt, and all of the completion that fits."""
    row = Pair(prompt, completion, "row 0")
    [example] = encode_rows([row], tok, max_seq_length=limit)
    labels = [label for label in example.labels if label != IGNORE]
    full = [*tok.encode(completion, add_special_tokens=False), 2]
    whole = tok.encode(prompt) + full
    assert len(example.input_ids) == min(limit, len(whole))
    assert len(example.labels) == len(example.input_ids)
    assert example.input_ids[0] == 1
    assert labels == full[: max(1, limit - 1)]
    kept = example.input_ids[1 : len(example.input_ids) - len(labels)]
    prompt_ids = tok.encode(prompt, add_special_tokens=False)
    assert kept == prompt_ids[len(prompt_ids) - len(kept) :]  # its end


def test_policies_for_long_rows(tok, caplog):
    rows = [Pair("a" * 20, "b", "f line 7"), Pair("a", "b", "f line 8")]
    assert len(encode_rows(rows, tok, max_seq_length=10)) == 2
    assert "1 of 2 rows are longer than max_seq_length=10 and were truncated" in caplog.text
    assert len(encode_rows(rows, tok, max_seq_length=10, over_length="drop")) == 1
    assert "were dropped" in caplog.text
    with pytest.raises(lk.LorakitError, match="f line 7: 23 tokens, more than max_seq_length=10"):
        encode_rows(rows, tok, max_seq_length=10, over_length="raise")
    with pytest.raises(lk.LorakitError, match="all 1 rows are longer"):
        encode_rows(rows[:1], tok, max_seq_length=10, over_length="drop")


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
        ('{"prompt": "a"}', "line 1: field 'completion' is missing"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' must be text, not 3"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(lk.LorakitError, match=message):
        read_rows(path)


def test_bad_files(tmp_path):
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


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=200),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_batches_hold_every_row_once(lengths, size, seed, epoch):
    cut = batches(lengths, size, seed, epoch)
    assert sorted(i for batch in cut for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in cut)
    assert cut == batches(lengths, size, seed, epoch)


def test_batches_differ_by_epoch_and_waste_little():
    lengths = [(7 * i) % 101 + 1 for i in range(1000)]
    cut = batches(lengths, 8, 0, 0)
    assert cut != batches(lengths, 8, 0, 1)
    assert cut != batches(lengths, 8, 1, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in cut)
    assert padded < 1.1 * sum(lengths)


def test_collate():
    rows = [Example([5, 6], [IGNORE, 6]), Example([7, 8, 9], [7, 8, 9])]
    ids, labels = collate(rows)
    assert torch.equal(ids, torch.tensor([[5, 6, 0], [7, 8, 9]]))
    assert torch.equal(labels, torch.tensor([[IGNORE, 6, IGNORE], [7, 8, 9]]))


def test_the_place_of_text_that_is_not_unicode(tok):
    with pytest.raises(lk.LorakitError, match="f line 3: not valid Unicode"):
        encode_rows([Pair("\ud83d", "x", "f line 3")], tok, max_seq_length=9)


def test_json_round_trip_of_any_text(tok):
    text = json.loads(json.dumps("naïve \u2028 😀"))
    [example] = encode_rows([Pair("", text, "r")], tok, max_seq_length=200)
    assert tok.decode([i for i in example.labels if i != IGNORE]) == text
