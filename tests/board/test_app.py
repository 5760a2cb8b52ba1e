"""What a board answers about the runs of a folder."""

import json
import math
import os

import pytest

from lorakit.board import runs
from lorakit.board.app import Board
from lorakit.board.folder import Folder
from lorakit.config.errors import LorakitError
from tests.board.conftest import write_metrics


def test_the_list(get, folder):
    found = {run["id"]: run for run in get("runs")}
    assert set(found) == {"a", "deep/b c"}
    assert found["a"]["name"] == "a"
    assert found["a"]["step"] == 10
    assert found["a"]["loss"] == 0.1
    assert found["a"]["tokens"] == 1000
    assert found["a"]["peak_memory_mb"] == 70.0
    assert found["a"]["eval_loss"] is None
    assert found["a"]["metrics"] == ["loss", "peak_memory_mb", "tokens", "tokens_per_second"]
    assert found["deep/b c"]["step"] == 3
    assert get("board") == {"name": "runs"}


def test_a_file_that_has_not_changed_is_not_read_again(get, folder, monkeypatch):
    first, read = get("runs"), []
    end = runs.read_end
    monkeypatch.setattr(runs, "read_end", lambda path, most: read.append(path) or end(path, most))
    assert get("runs") == first
    assert not [path for path in read if path.name == "metrics.jsonl"]
    write_metrics(folder / "a", 11)
    assert get("runs")[0]["step"] == 11
    (folder / "a" / "metrics.jsonl").unlink()
    (folder / "a" / "run.json").write_text("{}")
    assert get("runs")[0]["step"] == 0


def test_what_is_no_run_is_not_listed(folder):
    for name in (".hidden", "checkpoint-3", "a/checkpoint-5", "a/.hidden"):
        write_metrics(folder / name, 1)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "metrics.jsonl")
    os.makedirs(os.fsencode(folder) + b"/\xff")
    (folder / "deep" / "back").symlink_to(folder)
    assert set(Folder(folder).runs()) == {"a", "deep/b c"}


def test_a_folder_that_is_a_run_itself(folder):
    found = Board(Folder(folder / "a"))
    [run] = found.runs.summaries()
    assert run["id"] == "/"
    assert found.folder.run("/") == folder / "a"
    with pytest.raises(LorakitError, match="is no folder; name the one that holds the runs"):
        Folder(folder / "a" / "metrics.jsonl")


def test_curves(get, refused):
    assert get("runs/a/metrics?points=4&names=loss") == {
        "loss": {"step": [1, 2, 9, 10], "value": [1.0, 1 / 2, 1 / 9, 1 / 10]}
    }
    assert get("runs/deep%2Fb%20c/metrics?names=loss")["loss"]["step"] == [1, 2, 3]
    assert get("runs/a/metrics?names=loss&since=8")["loss"]["step"] == [9, 10]
    assert get("runs/a/memory")["peak_mb"] == [[step, 70.0] for step in range(1, 11)]
    assert get("runs/a/evaluations") == []
    assert refused("runs/a/metrics?points=3")[1] == "points is 3; it must be at least 4."
    assert refused("runs/a/metrics?points=-1")[0] == 400
    assert refused("runs/a/metrics?since=1e3")[0] == 400
    assert refused("runs/b/metrics") == (404, "there is no run 'b' in this folder.")
    assert refused("nothing")[0] == 404


def test_settings_samples_and_run_file(get, refused, folder):
    assert get("runs/a/settings") == {}
    assert get("runs/a/samples") == []
    assert refused("runs/a/run_file") == (404, "this run was not started from a run file.")
    record = {
        "settings": {"lora": {"r": 8, "target_modules": ["q"]}, "seed": 0, "rope": {}},
        "run_file": {"learning_rate": 2e-05, "model": "é"},
    }
    (folder / "a" / "run.json").write_text(json.dumps(record))
    sample = {
        "step": 1,
        "row": 0,
        "prompt": "<img onerror>",
        "reference": "",
        "completion": "\ud800",
    }
    whole = json.dumps(sample) + "\n" + '{"step": 2, "completion": "", "row": NaN}\n{"step": 2}\n'
    (folder / "a" / "samples.jsonl").write_text(whole + '{"step": 3')
    assert get("runs/a/settings") == {
        "lora.r": 8,
        "lora.target_modules": ["q"],
        "seed": 0,
        "rope": {},
    }
    assert get("runs/a/samples") == [sample, {"step": 2, "completion": "", "row": None}]
    assert get("runs/a/run_file") == {"text": "model: é\nlearning_rate: 2.0e-05\n"}
    (folder / "a" / "run.yaml").write_text("# mine\nmodel: x\n")  # maybe what overrides changed
    assert get("runs/a/run_file")["text"].startswith("model: é")
    (folder / "a" / ".started").touch()  # the board wrote it
    assert get("runs/a/run_file") == {"text": "# mine\nmodel: x\n"}


@pytest.mark.parametrize("wrong", [None, [], {}, "x", 10**400, -1, True, math.nan])
def test_a_run_that_writes_nonsense_does_not_hide_the_others(get, folder, wrong):
    names = ("state", "started", "ended", "total_steps", "model", "settings", "run_file", "error")
    (folder / "a" / "run.json").write_text(json.dumps(dict.fromkeys(names, wrong)))
    (folder / "a" / ".started").write_text(json.dumps({"started": wrong, "cwd": wrong}))
    (folder / "a" / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": wrong}) + "\n")
    found = {run["id"]: run for run in get("runs")}
    assert found["deep/b c"]["step"] == 3
    assert found["a"]["state"] in ("running", "finished", "stopped", "failed")
    assert found["a"]["model"] in (None, "x")
    for what in ("settings", "samples", "metrics", "evaluations", "memory"):
        get(f"runs/a/{what}")


def test_a_run_that_has_written_nothing_yet(get, folder):
    (folder / "new").mkdir()
    (folder / "new" / ".started").write_text("{}")
    assert get("runs/new/metrics") == {}
    assert get("runs/new/evaluations") == []
    assert get("runs/new/memory") == {"peak_mb": [], "forecast": None}
