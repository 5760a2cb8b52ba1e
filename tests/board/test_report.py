"""A report holds what the runs have written, and nothing it cannot show."""

import json
import re

import pytest

import lorakit as lk

from .folders import COMPLETION, HOSTILE, write_comparison, write_run


def test_a_report_of_a_comparison_begins_with_it(tmp_path):
    write_comparison(tmp_path / "sizes")
    write_run(tmp_path / "sizes" / "runs" / "one", steps=4)
    text = lk.write_report(tmp_path / "sizes", tmp_path / "r.html").read_text()
    assert '"home":"comparisons"' in text
    text = lk.write_report(tmp_path / "sizes" / "runs", tmp_path / "r.html").read_text()
    assert '"home":"runs"' in text


def answers(path):
    """What a report answers, and its name."""
    [frozen] = re.findall(r'id="frozen">(.*?)</script>', path.read_text(encoding="utf-8"))
    values = json.loads(frozen)
    return values["answers"], values["name"]


def test_a_report_has_what_the_runs_wrote(tmp_path):
    write_run(tmp_path / "runs" / "a", steps=40)
    write_run(tmp_path / "runs" / "deep" / HOSTILE.replace("/", ""), steps=20, state="failed")
    write_comparison(tmp_path / "runs" / "sizes")
    path = lk.write_report(tmp_path / "runs", tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    found, name = answers(path)
    assert name == "runs"
    assert [run["id"] for run in found["api/runs"]] == ["a", f"deep/{HOSTILE}"]
    assert [run["state"] for run in found["api/runs"]] == ["finished", "failed"]
    lines = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").open()]
    curve = found["api/runs/a/metrics"]["loss"]
    assert curve["step"] == list(range(1, 41))
    written = [line["loss"] for line in lines if "loss" in line]
    assert curve["value"] == pytest.approx(written, rel=5e-6)  # six digits are kept
    assert "padding" not in found["api/runs/a/metrics"]
    assert found["api/runs/a/evaluations"][-1]["eval_rouge_l"] == 0.54
    assert found["api/runs/a/settings"]["lora.r"] == 8
    assert found["api/runs/a/samples"][-1]["completion"] == COMPLETION
    assert found["api/comparisons/sizes"]["tasks"][0]["name"] == "sentiment"
    [listed] = found["api/comparisons"]
    assert listed == {"id": "sizes", "name": f"sizes {HOSTILE}", "state": "finished"}


def test_runs_are_named_one_by_one(tmp_path):
    for place in ("x/run", "y/run", "other"):
        write_run(tmp_path / place, steps=8, samples=False)
    runs = [tmp_path / "x" / "run", str(tmp_path / "y"), tmp_path / "other", tmp_path / "other"]
    found, name = answers(lk.write_report(runs, tmp_path / "r.html"))
    assert [run["name"] for run in found["api/runs"]] == [
        str(tmp_path / "x" / "run"),
        f"{tmp_path / 'y'}/run",
        "other",
    ]
    assert name == "3 runs"
    assert set(found) >= {f"api/runs/{run['id']}/metrics" for run in found["api/runs"]}


def test_many_runs_have_fewer_points_with_their_extremes(tmp_path):
    for i in range(60):
        write_run(tmp_path / "runs" / f"{i}", steps=4, samples=False)
    spike = {"step": 700, "loss": 99.0}
    with open(tmp_path / "runs" / "7" / "metrics.jsonl", "a") as file:
        for step in range(5, 2000):
            file.write(json.dumps(spike if step == 700 else {"step": step, "loss": 1.0}) + "\n")
    found, _ = answers(lk.write_report(tmp_path / "runs", tmp_path / "r.html"))
    curve = found["api/runs/7/metrics"]["loss"]
    assert len(curve["step"]) <= 20_000 // 60
    assert max(curve["value"]) == 99.0
    assert curve["step"][-1] == 1999


def test_a_run_without_a_step_has_no_curve(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"state": "failed", "error": "no memory"}')
    found, _ = answers(lk.write_report(tmp_path / "run", tmp_path / "r.html"))
    [run] = found["api/runs"]
    assert (run["state"], run["error"]) == ("failed", "no memory")
    assert found[f"api/runs/{run['id']}/metrics"] == {}


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(lk.LorakitError, match="at least one run"):
        lk.write_report([], tmp_path / "r.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lk.LorakitError, match="empty holds no run"):
        lk.write_report(tmp_path / "empty", tmp_path / "r.html")
    with pytest.raises(lk.LorakitError, match="is no folder"):
        lk.write_report(tmp_path / "missing", tmp_path / "r.html")
    write_run(tmp_path / "run", steps=4)
    with pytest.raises(lk.LorakitError, match="is a directory"):
        lk.write_report(tmp_path / "run", tmp_path)
    with pytest.raises(lk.LorakitError, match="is not a directory"):
        lk.write_report(tmp_path / "run", tmp_path / "run" / "run.json" / "r.html")
    (tmp_path / "run" / "comparison.json").write_text("[1]")
    with pytest.raises(lk.LorakitError, match="comparison.json must hold a JSON object"):
        lk.write_report(tmp_path / "run", tmp_path / "r.html")
