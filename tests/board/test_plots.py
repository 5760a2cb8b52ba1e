"""Curves of runs: what is drawn is what metrics.jsonl holds."""

import json
import math
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import lorakit as lk
from lorakit.board.plots import PLOTS


def lines_of(steps, evaluate_at=(), loss=lambda step: 5 / step):
    lines = []
    for step in range(1, steps + 1):
        values = {"learning_rate": 1e-3 / step, "grad_norm": 0.5 * step, "tokens": 100 * step}
        lines.append(
            {"step": step, "loss": loss(step), **values, "tokens_per_second": 1000.0 + step}
        )
        if step in evaluate_at:
            lines.append({"step": step, "eval_loss": 6 / step, "eval_exact_match": 1 / step})
    return lines


def write_run(directory, lines, end=""):
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + end)
    return directory


def test_files(tmp_path):
    one = write_run(tmp_path / "one", lines_of(7, (3, 7)))
    two = write_run(tmp_path / "<b>&two", lines_of(4))
    path = lk.plot_runs([one, two], tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "runs.html"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        ["runs.html", *(f"{name}.png" for name in PLOTS)]
    )
    pictures = [(path.parent / f"{name}.png").read_bytes() for name in PLOTS]
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)
    [frozen] = re.findall(r'id="frozen">(.*?)</script>', path.read_text())
    runs = json.loads(frozen)["answers"]["api/runs"]
    assert [run["name"] for run in runs] == ["one", "<b>&two"]
    assert [run["eval_loss"] for run in runs] == [6 / 7, None]


def drawn(monkeypatch, paths, out):
    """label -> points, of each figure."""
    figures = {}

    def keep(figure, path, **_):
        path.write_bytes(b"")
        [axes] = figure.axes
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        figures[axes.get_ylabel()] = curves

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        lk.plot_runs(paths, out)
    return figures


def test_curves(tmp_path, monkeypatch):
    first = write_run(tmp_path / "a" / "x$y", lines_of(5, (2, 4)))
    same = write_run(tmp_path / "b" / "x$y", lines_of(3))
    third = write_run(tmp_path / "_c", lines_of(3, loss=lambda s: math.inf if s == 2 else s))
    figures = drawn(monkeypatch, [first, str(same), third, first], tmp_path / "out")
    assert list(figures) == [label for label, _, _ in PLOTS.values()]
    name, other = (str(path).replace("$", r"\$") for path in (first, same))
    loss = figures["loss, nats per label token"]
    assert list(loss) == [name, f"{name}, evaluation", other, " _c"]
    assert loss[name] == [[s, 5 / s] for s in range(1, 6)]
    assert loss[f"{name}, evaluation"] == [[2, 3.0], [4, 1.5]]
    assert loss[" _c"][0] == [1, 1]
    assert math.isnan(loss[" _c"][1][1])
    assert figures["gradient norm"][other] == [[1, 0.5], [2, 1.0], [3, 1.5]]
    assert figures["tokens per second"][other] == [[1, 1001], [2, 1002], [3, 1003]]
    assert figures["learning rate"][other] == [[s, 1e-3 / s] for s in range(1, 4)]


@given(cut=st.integers(1, 200))
def test_a_cut_off_last_line_is_left_out(cut, tmp_path_factory):
    """A run that was killed while it wrote a line: the page is that of the lines before."""
    line = json.dumps(lines_of(4)[-1])
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, lines_of(3), end=line[:cut])
    with pytest.MonkeyPatch.context() as patch:
        figures = drawn(patch, directory, directory / "out")
    assert [len(curve) for curves in figures.values() for curve in curves.values()] == [3] * 4


def test_the_cut_is_said_in_one_line(tmp_path, caplog):
    lk.plot_runs(write_run(tmp_path / "run", lines_of(2), end='{"step": 3, "lo'), tmp_path)
    [message] = caplog.messages
    assert message.endswith("run/metrics.jsonl: the last line is cut off and left out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run holds no metrics.jsonl; name the output_dir of a training run"),
        ("", "metrics.jsonl holds no step yet"),
        ('{"step": 1', "metrics.jsonl holds no step yet"),
        ('{"step": 1}\n{"ste\n{"step": 2}\n', "metrics.jsonl line 2 is not valid JSON"),
        ("[1]\n", "line 1: an object with a whole number 'step' is wanted"),
        ('{"loss": 1.0}\n', "line 1: an object with a whole number 'step' is wanted"),
        ('{"step": true}\n', "line 1: an object with a whole number 'step' is wanted"),
        ('{"step": 1, "loss": "low"}\n', "line 1: loss must be a number, not 'low'"),
        ('{"step": 1, "loss": 1%s}\n' % ("0" * 400), "line 1: loss must be a number"),
        ("\udcff\n", "metrics.jsonl is not UTF-8 text"),
    ],
)
def test_what_is_no_run(tmp_path, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        data = content.encode("utf-8", "surrogateescape")
        (tmp_path / "run" / "metrics.jsonl").write_bytes(data)
    with pytest.raises(lk.LorakitError, match=message) as caught:
        lk.plot_runs([tmp_path / "run"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(lk.LorakitError, match="at least one run"):
        lk.plot_runs([], tmp_path)
    run = write_run(tmp_path / "run", lines_of(2))
    with pytest.raises(lk.LorakitError, match=r"metrics.jsonl is not a directory"):
        lk.plot_runs(run, run / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lk.LorakitError, match="plots need matplotlib"):
        lk.plot_runs(run, tmp_path / "out")


def test_numbers_and_names_at_the_edge(tmp_path):
    """Losses that no axis holds, and half a surrogate pair in a name."""
    lines = lines_of(2)
    lines[0] |= {"loss": 1.7e308, "\ud800": 1.0}
    lines[1]["loss"] = -1.7e308
    page = lk.plot_runs(write_run(tmp_path / "a", lines), tmp_path / "out")
    assert "\\ud800" in page.read_text(encoding="utf-8")
