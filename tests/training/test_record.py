"""run.json: what a run says of itself, while it goes on and when it has ended."""

import json
import os
import signal

import pytest

import lorakit as lk
from lorakit.training import record
from tests.conftest import ROWS
from tests.training.runs import adapted, run


def read(path):
    return json.loads((path / "run.json").read_text())


def test_the_record_of_a_run(tiny_dir, tok, tmp_path):
    model, seen = adapted(tiny_dir), []
    config = lk.TrainConfig(str(tmp_path), max_steps=2, learning_rate=1e-2)
    said = lk.RunConfig.from_dict(
        {"model": "org/name", "data": "rows.jsonl", "lora": {"r": 4}, "max_steps": 2}
    )
    look = lambda: seen.append(read(tmp_path))  # noqa: E731
    lk.train(model, tok, ROWS, config, base_model="org/name", run=said, after_step=look)
    during, after = seen[0], read(tmp_path)
    assert during["state"] == "running"
    assert during["pid"] == os.getpid()
    assert "ended" not in during
    assert after["state"] == "finished"
    assert after["ended"] >= after["started"]
    assert after["error"] is None
    expected = {"model": "org/name", "objective": "sft", "total_steps": 2, "ranks": 1}
    assert {name: after[name] for name in expected} == expected
    assert after["cwd"] == os.getcwd()
    assert after["settings"]["lora"]["r"] == 4
    assert after["settings"]["learning_rate"] == 1e-2  # of the run itself, not of its file
    assert after["settings"]["train"] == "adapter"
    assert lk.RunConfig.from_dict(after["run_file"]) == said


def test_a_run_without_a_run_file(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, max_steps=1)
    found = read(tmp_path)
    assert found["run_file"] is None
    assert found["settings"]["lora"]["r"] == 4
    assert found["model"] == str(tiny_dir)


def test_how_a_run_ended(tiny_dir, tok, tmp_path):
    def train(name, after_step):
        config = lk.TrainConfig(str(tmp_path / name), max_steps=3)
        return lk.train(adapted(tiny_dir), tok, ROWS, config, after_step=after_step)

    def fail():
        raise ValueError("no reason")

    assert train("stopped", lambda: signal.raise_signal(signal.SIGTERM)).interrupted
    assert read(tmp_path / "stopped")["state"] == "stopped"
    with pytest.raises(ValueError, match="no reason"):
        train("failed", fail)
    assert read(tmp_path / "failed")["state"] == "failed"
    assert read(tmp_path / "failed")["error"] == "no reason"


def test_a_run_that_cannot_begin_leaves_the_record_of_the_one_before(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, max_steps=2, save_steps=1)
    before = read(tmp_path)
    with pytest.raises(lk.LorakitError, match="holds checkpoints of an earlier run"):
        run(tiny_dir, tok, tmp_path, max_steps=2)
    assert read(tmp_path) == before


def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(record, "write_json", full)
    with record.recorded(tmp_path, {}, lambda: True, said.append):
        pass
    assert set(said) == {
        "lorakit: run.json could not be written (No space left on device); the run goes on"
    }
