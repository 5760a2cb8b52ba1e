"""metrics.jsonl, read while a run writes it."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.board import metrics as module
from lorakit.board.folder import NotThereError
from lorakit.board.metrics import Cache, Metrics, parsed
from lorakit.config.errors import LorakitError
from tests.board.conftest import write_metrics


def losses(metrics):
    return metrics.curves(1000, ["loss"]).get("loss", {"step": [], "value": []})


def test_a_line_waits_until_it_is_whole(tmp_path):
    path, metrics = tmp_path / "metrics.jsonl", Metrics(tmp_path)
    with pytest.raises(NotThereError, match="metrics.jsonl is not there"):
        metrics.read()
    with open(path, "a") as file:
        for text, steps in [
            ('{"step": 1, "loss": 2.0}\n', [1]),
            ('{"step": 2, "lo', [1]),
            ('ss": 1.5}', [1]),
            ("\n", [1, 2]),
            ('{"step": 3, "loss": NaN}\n{"step": 4, "loss": 1e999}\n', [1, 2, 3, 4]),
        ]:
            file.write(text)
            file.flush()
            metrics.read()
            assert losses(metrics)["step"] == steps
    assert losses(metrics)["value"] == [2.0, 1.5, None, None]


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    write_metrics(tmp_path, 50)
    metrics = Metrics(tmp_path)
    metrics.read()
    seen = []
    monkeypatch.setattr(module, "parsed", lambda text: seen.append(text) or parsed(text))
    metrics.read()
    assert seen == []
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 51, "loss": 0.5}\n')
    metrics.read()
    assert seen == [b'{"step": 51, "loss": 0.5}']


def test_a_run_that_was_resumed_is_read_from_its_start(tmp_path):
    """A resumed run cuts the file back to its checkpoint, and writes the steps once more."""
    path, metrics = tmp_path / "metrics.jsonl", Metrics(tmp_path)
    write_metrics(tmp_path, 9)
    metrics.read()
    lines = path.read_text().splitlines(keepends=True)
    again = [json.dumps({"step": i, "loss": 5.0, "tokens": 1}) + "\n" for i in (7, 8, 9, 10, 11)]
    for text in (lines[:6], lines[:6] + again):
        path.with_name("new").write_text("".join(text))
        os.replace(path.with_name("new"), path)
        metrics.read()
        assert losses(metrics)["step"] == list(range(1, len(text) + 1))
    assert losses(metrics)["value"][-5:] == [5.0] * 5


def test_steps_rise_whatever_a_file_says(tmp_path):
    lines = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 9.0), (4, 4.0), (4, 5.0)]
    text = "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = Metrics(tmp_path)
    metrics.read()
    assert losses(metrics) == {"step": [1, 2, 4], "value": [1.0, 9.0, 5.0]}


def test_points_names_and_the_steps_after_one(tmp_path):
    write_metrics(tmp_path, 1000, eval_loss=3.0)
    metrics = Metrics(tmp_path)
    metrics.read()
    assert set(metrics.curves(10)) == {
        "loss",
        "tokens",
        "tokens_per_second",
        "eval_loss",
        "seconds",
    }
    curve = metrics.curves(10, ["loss", "nothing", "loss"])
    assert set(curve) == {"loss"}
    assert len(curve["loss"]["step"]) <= 10
    assert curve["loss"]["value"][-1] == 1 / 1000  # exact
    assert metrics.curves(100, ["loss"], since=997)["loss"]["step"] == [998, 999, 1000]
    with pytest.raises(LorakitError, match="points is 3; it must be at least 4"):
        metrics.curves(3)


def test_seconds_are_those_of_the_steps(tmp_path):
    """100 tokens a step at 50 a second take two seconds."""
    write_metrics(tmp_path, 5)
    metrics = Metrics(tmp_path)
    metrics.read()
    assert metrics.curves(10)["seconds"]["value"] == [2.0, 4.0, 6.0, 8.0, 10.0]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 9)},
            optional={
                "loss": st.floats() | st.integers() | st.just(10**400) | st.just("x"),
                "tokens": st.integers(0, 99) | st.floats(),
                "tokens_per_second": st.floats(0.5, 9.0) | st.just(0.0),
                "eval_loss": st.floats(0, 1),
            },
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_many_lines_at_once_say_what_they_say_one_by_one(tmp_path_factory, lines, rising):
    """Columns are a faster way for files as runs write them, with the same numbers."""
    if rising:
        lines = [{**line, "step": 2 * i + line["step"] % 2} for i, line in enumerate(lines)]
    path = tmp_path_factory.mktemp("columns")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    fast, slow = Metrics(path), Metrics(path)
    slow._take_columns = lambda lines: False
    for metrics in (fast, slow):
        metrics.read()
    assert fast.curves(100) == slow.curves(100)


def test_evaluations(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_loss": 3.0, "eval_accuracy": 0.5},
        {"step": 2, "eval_loss": math.nan},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = Metrics(tmp_path)
    metrics.read()
    assert metrics.evaluations() == [
        {"step": 1, "eval_loss": 3.0, "eval_accuracy": 0.5},
        {"step": 2, "eval_loss": None},
    ]


def test_the_cache_forgets_the_run_that_was_asked_for_longest_ago(tmp_path):
    cache = Cache(most=5 * 100)  # a run below has 4 quantities of 50 steps: 400 numbers
    for name in "abc":
        write_metrics(tmp_path / name, 50)
        assert len(losses(cache.of(tmp_path / name))["step"]) == 50
    assert list(cache.kept) == [tmp_path / "c"]


LINES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"[" * 2000, b"{}", b'{"step": 1}', b'{"a": 1}, {"b": 2}', b"1, 2", b"]["]
        ),
        st.fixed_dictionaries(
            {"step": st.integers() | st.none() | st.booleans()},
            optional={"loss": st.floats() | st.text() | st.booleans() | st.integers()},
        ).map(lambda value: json.dumps(value).encode()),
    ),
    max_size=8,
)


@given(LINES)
def test_any_bytes_are_read(tmp_path_factory, lines):
    """Lines that are no metrics are left out; those that are stay, whatever stands between."""
    path = tmp_path_factory.mktemp("any")
    (path / "metrics.jsonl").write_bytes(
        b"\n".join([*lines, b'{"step": 9223372036854775807, "loss": 0.25}', b""])
    )
    metrics = Metrics(path)
    metrics.read()
    assert losses(metrics)["value"][-1] == 0.25
    json.dumps(metrics.curves(100), allow_nan=False)


def test_a_number_that_no_double_holds_is_left_out(tmp_path):
    huge = 10**400
    lines = [{"step": 1, "tokens": huge, "tokens_per_second": 5.0, "loss": 1.0}]
    lines += [{"step": 2, "tokens": 10, "tokens_per_second": huge}, {"step": 3, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = Metrics(tmp_path)
    metrics.read()
    curves = metrics.curves(10)
    assert curves["loss"] == {"step": [1, 3], "value": [1.0, 2.0]}
    assert curves["tokens"] == {"step": [2], "value": [10.0]}
    assert "seconds" not in curves


def test_a_line_without_an_end_is_not_read_again_and_again(tmp_path, monkeypatch):
    """A file of one endless line would otherwise be held in memory, and read at each call."""
    monkeypatch.setattr("lorakit.board.metrics._PART", 1 << 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "x": "' + b"a" * 5000)
    metrics = Metrics(tmp_path)
    metrics.read()
    assert path.stat().st_size - metrics._offset < 1 << 10
    with path.open("ab") as file:
        file.write(b'"}\n{"step": 3, "loss": 2.0}\n')
    metrics.read()
    assert metrics.curves(10)["loss"] == {"step": [1, 3], "value": [3.0, 2.0]}
