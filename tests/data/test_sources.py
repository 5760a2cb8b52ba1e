"""Rows of several sources: their shares to the row, data sets of the Hub, columns."""

import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.data import data_config
from lorakit.data.sources import shares_of
from tests import programs
from tests.data.files import written

SourceConfig = lk.SourceConfig


def opened(sources, **options):
    return lk.open_data(data_config({"train": sources, **options}, "run.yaml, data"))["train"]


@pytest.fixture
def files(tmp_path):
    """Files a, b and c of 10, 20 and 30 rows."""
    for name, n in zip("abc", (10, 20, 30), strict=True):
        written(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)])
    return tmp_path


weights = st.lists(
    st.tuples(st.sampled_from([0.1, 0.5, 1, 2, 3, 10]), st.integers(1, 500)),
    min_size=2,
    max_size=5,
)


@given(weights)
def test_shares_hold_to_the_row(drawn):
    sources = [SourceConfig(str(i), weight=weight) for i, (weight, _) in enumerate(drawn)]
    sizes = [size for _, size in drawn]
    try:
        counts = shares_of(sources, sizes)
    except lk.LorakitError as error:
        assert "would give no row" in str(error)
        return
    total, whole = sum(counts), sum(weight for weight, _ in drawn)
    for count, (weight, size) in zip(counts, drawn, strict=True):
        assert 1 <= count <= size
        assert abs(count - total * weight / whole) < 1
    # one row more in all would need a row that a source does not have
    more = total + 1
    assert any(more * weight / whole > size + 1e-9 for weight, size in drawn)


def test_sources_are_mixed_by_weight_by_number_and_whole(files):
    a, b, c = (str(files / f"{name}.jsonl") for name in "abc")
    rows = opened([{"path": a, "weight": 1}, {"path": b, "weight": 3}, {"path": c, "rows": 5}])
    counts = {name: sum(row.text[0] == name for row in rows) for name in "abc"}
    # 20 rows are 3/4 of 26 2/3, so there are 26 of both: 6.5 and 19.5, of which one is rounded up
    assert counts == {"a": 7, "b": 19, "c": 5}
    assert [row.place for row in rows] == [rows.place(i) for i in range(len(rows))]
    assert [row.place for row in rows] == [rows[i].place for i in range(len(rows))]
    assert len({row.place for row in rows}) == len(rows) == 31
    again = opened([{"path": a, "weight": 1}, {"path": b, "weight": 3}, {"path": c, "rows": 5}])
    assert list(again) == list(rows)
    other = opened([a, {"path": c, "rows": 5}], seed=1)
    assert {r.text for r in other if r.text[0] == "c"} != {r.text for r in rows if r.text[0] == "c"}
    assert len(opened([a, b, c])) == 60
    assert len(list(opened(a))) == 10


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(0, 3))
def test_what_is_drawn_stands_in_the_source(tmp_path_factory, count, seed):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    written(path, [{"text": str(i)} for i in range(10)])
    texts = [row.text for row in opened({"path": str(path), "rows": count}, seed=seed)]
    assert len(texts) == count
    assert texts == sorted(set(texts))


def test_columns(tmp_path):
    written(tmp_path / "a.csv", [{"question": "2 + 2?", "answer": "4", "text": "x"}])
    columns = {"prompt": "question", "completion": "answer"}
    for rows in (
        opened(str(tmp_path / "a.csv"), columns=columns),
        opened({"path": str(tmp_path / "a.csv"), "columns": columns}, columns={"text": "none"}),
    ):
        assert [row[:2] for row in rows] == [("2 + 2?", "4")]
        assert rows[0][:2] == ("2 + 2?", "4")  # fetched again
    with pytest.raises(lk.LorakitError, match="line 2 has no column 'question ' .did you mean"):
        list(opened(str(tmp_path / "a.csv"), columns={"prompt": "question "}))


def test_a_run_trains_on_a_mixture(files, tiny_dir):
    tok = lk.load_tokenizer(tiny_dir)
    rows = opened([str(files / "a.jsonl"), {"path": str(files / "b.jsonl"), "rows": 4}])
    examples = lk.encode_rows(rows, tok, max_seq_length=16)
    assert len(examples) == 14
    assert examples.place(13).startswith(str(files / "b.jsonl"))


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "train is an empty list"),
        ([{"path": "a.jsonl", "weight": 2}, "b.jsonl"], "one source alone has a weight"),
        ([{"path": "a.jsonl", "rows": 1, "weight": 2}], "has rows and weight: keep one"),
        ([{"path": "a.jsonl", "rows": 0}], "rows must be positive or null, not 0"),
        ([{"path": "org/x", "streaming": True}], "org/x is streamed: say how many rows"),
        ([{"path": "a.jsonl", "weights": 1}], "train 0: unknown key 'weights'.*'weight'"),
        ([3], "train 0 must be a mapping"),
        ({"weight": 1}, "train 0: path is missing"),
        ({"path": "none.jsonl"}, "none.jsonl does not exist"),
        ({"path": "data/none.jsonl"}, "data/none.jsonl does not exist"),
        ({"path": "none.jsonl", "split": "test"}, "none.jsonl is no data set, so it has no split"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(sources, said):
    with pytest.raises(lk.LorakitError, match=said) as caught:
        list(opened(sources))
    assert "\n" not in str(caught.value)


def test_sources_that_do_not_fit(files):
    a = str(files / "a.jsonl")
    with pytest.raises(lk.LorakitError, match=r"a.jsonl has 10 rows, and 11 are wanted"):
        opened({"path": a, "rows": 11})
    pair = written(files / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(
        lk.LorakitError,
        match=r"a.jsonl line 1 has one answer, and .*p.jsonl line 1 has two answers",
    ):
        opened([a, str(pair)])
    with pytest.raises(lk.LorakitError, match="would give no row of 10 with its weight of 0.001"):
        opened([{"path": a, "weight": 1}, {"path": str(files / "b.jsonl"), "weight": 0.001}])


# The Hub is out of reach, and HF_HOME is a folder of the test: what is read lies in the cache.
HUB = """
import shutil, sys
import lorakit as lk

columns = {"prompt": "question", "completion": "answer"}
def rows(path, split="train", **options):
    source = lk.SourceConfig(path, split=split, columns=columns, **options)
    return list(lk.open_data(lk.DataConfig([source]))["train"])

folder, cache = sys.argv[1:]
local = rows(folder)
assert len(local) == 20 and local[3].prompt == "q3", local
first = rows(folder, streaming=True, rows=7)
assert [row.completion for row in first] == [f"a{i}" for i in range(7)], first
shutil.move(f"{cache}/toy", f"{cache}/org___toy")
hub = rows("org/toy")
assert [row[:2] for row in hub] == [row[:2] for row in local]
assert hub[3].place == "org/toy row 3"
assert [row.prompt for row in rows("org/toy", split="validation")] == ["v0", "v1"]
for path, split in (("org/toy", "none"), ("org/other", "train")):
    try:
        rows(path, split=split)
    except lk.LorakitError as error:
        print(error)
"""


def test_data_sets_of_the_hub_come_from_its_cache(tmp_path):
    pytest.importorskip("datasets")
    folder, home = tmp_path / "toy", tmp_path / "home"
    folder.mkdir()
    for split, n in (("train", 20), ("validation", 2)):
        values = [{"question": f"{'qv'[n == 2]}{i}", "answer": f"a{i}"} for i in range(n)]
        written(folder / f"{split}-00000-of-00001.parquet", values)
    done = programs.run(
        ["-c", HUB, str(folder), str(home / "datasets")],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    no_split, no_set = done.stdout.splitlines()
    assert no_split.startswith("org/toy cannot be read as a data set, with split 'none': ")
    assert no_set.startswith("org/other cannot be read as a data set, with split 'train': ")
    shutil.rmtree(home)
