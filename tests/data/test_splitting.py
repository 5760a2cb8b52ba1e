"""Parts of rows: the part of a row depends on its content alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.rows import FileRows
from lorakit.data.schemas import Text
from lorakit.data.splitting import content_digest, split_rows
from tests.data.files import pairs, written


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
