"""Rows that are left out: what stays and what goes are all there is, and the choice is a rule's."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from tests.data.files import pairs

few = st.lists(
    st.fixed_dictionaries({"prompt": st.sampled_from("ab "), "completion": st.sampled_from("xyz")}),
    min_size=1,
    max_size=30,
)


def kept_and_dropped(mended, rows):
    """Check that every row is either kept or named, and return the places that are kept."""
    kept = [row.place for row in mended.rows]
    gone = [" ".join(line.split()[:2]) for line in mended.dropped]
    assert sorted(kept + gone) == sorted(row.place for row in rows)
    numbers = [int(place.split()[1]) for place in kept]
    assert numbers == sorted(numbers)
    return numbers


@settings(max_examples=50)
@given(few)
def test_dedup_keeps_the_first_of_equal_rows(values):
    rows = lk.read_rows(values)
    kept = kept_and_dropped(lk.dedup_rows(rows), rows)
    # the truth: white space alone is no difference
    contents = [(v["prompt"].strip(), v["completion"]) for v in values]
    assert kept == sorted({c: i for i, c in reversed(list(enumerate(contents)))}.values())


def test_dedup_finds_near_duplicates_and_says_how_near():
    text = " ".join(f"word{i}" for i in range(40))
    values = [{"prompt": text, "completion": c} for c in ("one two", "other words")]
    values.append({"prompt": "something else entirely", "completion": "one two"})
    rows = lk.read_rows(values)
    mended = lk.dedup_rows(rows, near=0.7)
    assert kept_and_dropped(mended, rows) == [0, 2]
    # 40 + 2 words have 40 shingles of 3, of which 38 lie in the prompt: 38 of 42 are shared
    assert mended.dropped == ["row 1 is nearly row 0 (90% shared)"]
    assert not lk.dedup_rows(rows, near=0.95).dropped
    with pytest.raises(lk.LorakitError, match=r"from a similarity of 0.3 to 1, not 0.1"):
        lk.dedup_rows(rows, near=0.1)


@settings(max_examples=50)
@given(few, st.integers(0, 3))
def test_balanced_classes_have_equal_numbers(values, seed):
    rows = lk.read_rows(values)
    counts = Counter(v["completion"] for v in values)
    alone = sum(n == 1 for n in counts.values())
    if len(counts) == 1 or alone * 2 > len(values):
        with pytest.raises(lk.LorakitError, match="nothing to balance"):
            lk.balance_rows(rows, seed=seed)
        return
    mended = lk.balance_rows(rows, seed=seed)
    kept_and_dropped(mended, rows)
    found = Counter(row.completion for row in mended.rows)
    assert found == dict.fromkeys(counts, min(counts.values()))
    judged = lk.read_rows([{**v, "label": len(v["completion"]) == 1} for v in values])
    good = Counter(row.desirable for row in judged)
    if len(good) == 2 and len(values) > 2 * (1 in good.values()):
        even = Counter(row.desirable for row in lk.balance_rows(judged, seed=seed).rows)
        assert even == dict.fromkeys((True, False), min(good.values()))
    most = lk.balance_rows(rows, most=2, seed=seed)
    assert Counter(r.completion for r in most.rows) == {c: min(n, 2) for c, n in counts.items()}


def test_balance_by_a_field(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,kind\n" + "".join(f"{i},x,{i % 3 == 0}\n" for i in range(9)))
    mended = lk.balance_rows(lk.read_rows(path), by="kind")
    kinds = Counter(int(row.prompt) % 3 == 0 for row in mended.rows)
    assert kinds == {True: 3, False: 3}
    assert "is one of 6 of class 'False'" in mended.dropped[0]
    with pytest.raises(lk.LorakitError, match="line 2 has no field 'kinds' .did you mean 'kind'"):
        lk.balance_rows(lk.read_rows(path), by="kinds")
    data = lk.read_rows([{"text": "a", "tags": ["b"]}] * 3)
    with pytest.raises(lk.LorakitError, match="row 0 has no field 'tags'"):
        lk.balance_rows(data, by="tags")  # rows of a list are held without the fields unread


@settings(max_examples=30)
@given(pairs, st.data(), st.integers(0, 3))
def test_a_larger_sample_holds_the_smaller_one(values, data, seed):
    rows = lk.read_rows(values)
    n = data.draw(st.integers(1, len(rows)))
    sample = lk.sample_rows(rows, n, seed=seed)
    assert len(kept_and_dropped(sample, rows)) == n
    smaller = lk.sample_rows(rows, max(n - 1, 1), seed=seed)
    assert {r.place for r in smaller.rows} <= {r.place for r in sample.rows}


def test_a_sample_follows_from_the_content():
    values = [{"text": str(i)} for i in range(50)]
    sample = {r.text for r in lk.sample_rows(lk.read_rows(values), 10).rows}
    turned = {r.text for r in lk.sample_rows(lk.read_rows(values[::-1]), 10).rows}
    other = {r.text for r in lk.sample_rows(lk.read_rows(values), 10, seed=1).rows}
    assert sample == turned != other
    # equal rows are drawn one by one: all or none would be 0 or 50
    equal = lk.read_rows([{"text": "same"}] * 50 + values)
    assert 10 < sum(r.text == "same" for r in lk.sample_rows(equal, 50).rows) < 40
    for count in (0, 51):
        with pytest.raises(lk.LorakitError, match="a sample of 50 rows has 1 to 50, not"):
            lk.sample_rows(lk.read_rows(values), count)
