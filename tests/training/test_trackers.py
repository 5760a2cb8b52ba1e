"""What trackers stored is what the run logged, read back with their own API; and none is waited
for."""

import json
import re
import struct
import threading
import time

import pytest

import lorakit as lk
from lorakit.training.trackers import reporter
from tests.conftest import ROWS
from tests.training.runs import run

NAMES = ("loss", "learning_rate", "grad_norm", "epoch")


def lines_of(tmp_path):
    """The lines of metrics.jsonl: those of steps, and those of evaluations."""
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    return [line for line in lines if line not in evaluated], evaluated


def train_and_go_on(tiny_dir, tok, tmp_path, **options):
    """Train four steps, the last two in a run that goes on from a checkpoint."""
    data = {"train": ROWS, "validation": ROWS[:4]}
    run(tiny_dir, tok, tmp_path, data, max_steps=2, save_steps=2, **options)
    run(tiny_dir, tok, tmp_path, data, max_steps=4, resume="auto", **options)


def test_tensorboard_has_the_numbers_of_the_log(tiny_dir, tok, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = {"train": ROWS, "validation": ROWS[:4]}
    run(tiny_dir, tok, tmp_path, data, max_steps=4, eval_steps=2, report_to="tensorboard")
    steps, evaluated = lines_of(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    places = [(f"train/{name}", name, steps) for name in NAMES]
    places += [("train/num_tokens", "tokens", steps), ("eval/loss", "eval_loss", evaluated)]
    for tag, name, lines in places:
        logged = [(line["step"], line[name]) for line in lines]
        shown = [(event.step, event.value) for event in board.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        # the files hold fp32
        assert [v for _, v in shown] == pytest.approx([v for _, v in logged], rel=1e-6)


def test_trackio_has_the_numbers_of_the_log(tiny_dir, tok, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    # the variable TRACKIO_DIR is read once, when trackio is imported
    for module in (trackio, sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    out = tmp_path / "mine"
    train_and_go_on(tiny_dir, tok, out, report_to=["trackio"])
    [stored] = trackio.Api().runs("lorakit")
    assert stored.name == "mine"
    assert stored.config["learning_rate"] == 1e-2
    rows = sqlite_storage.SQLiteStorage.get_logs("lorakit", "mine", run_id=stored.id)
    steps, evaluated = lines_of(out)
    found = [
        {"step": r["step"], **{n: r[f"train/{n}"] for n in NAMES}}
        for r in rows
        if "train/loss" in r
    ]
    assert found == [{name: line[name] for name in ("step", *NAMES)} for line in steps]
    assert [r["train/num_tokens"] for r in rows if "train/loss" in r] == [
        line["tokens"] for line in steps
    ]
    losses = [(r["step"], r["eval/loss"]) for r in rows if "eval/loss" in r]
    assert losses[-1] == (4, evaluated[-1]["eval_loss"])


def test_mlflow_has_the_numbers_of_the_log(tiny_dir, tok, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    out = tmp_path / "mine"
    train_and_go_on(tiny_dir, tok, out, report_to="mlflow")
    client = mlflow.tracking.MlflowClient()
    [stored] = client.search_runs([client.get_experiment_by_name("lorakit").experiment_id])
    assert (stored.info.run_name, stored.info.status) == ("mine", "FINISHED")
    assert stored.data.params["optim"] == "adamw_torch"
    steps, evaluated = lines_of(out)
    places = [(name, name) for name in NAMES] + [("num_tokens", "tokens")]
    for metric, name in places:
        history = client.get_metric_history(stored.info.run_id, metric)
        assert [(m.step, m.value) for m in history] == [(s["step"], s[name]) for s in steps]
    history = client.get_metric_history(stored.info.run_id, "eval_loss")
    assert history[-1].value == evaluated[-1]["eval_loss"]


def records(data):
    """The records of an offline file: LevelDB's log format, after a header of 7 bytes."""
    place, whole = 7, b""
    while place < len(data):
        if 2**15 - place % 2**15 < 7:  # the end of a block, too short for a record
            place += 2**15 - place % 2**15
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)  # after the checksum
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def test_wandb_has_the_numbers_of_the_log(tiny_dir, tok, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tiny_dir, tok, tmp_path, max_steps=2, report_to="wandb")
    [path] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    steps, _ = lines_of(tmp_path)
    assert [{name: row[f"train/{name}"] for name in NAMES} for row in found] == [
        {name: line[name] for name in NAMES} for line in steps
    ]


# ---- trackers that are not well ----


class Broken:
    """A tracker that cannot be reached."""

    def start(self, run):
        raise ConnectionError("no route\n to host")

    def log(self, step, values): ...

    def end(self): ...


class Hanging:
    """A tracker that answers no line until the test is over."""

    over = threading.Event()

    def start(self, run): ...

    def log(self, step, values):
        self.over.wait(60)

    def end(self): ...


def test_a_tracker_that_fails_or_hangs_does_not_stop_the_run(
    tiny_dir, tok, tmp_path, monkeypatch, capsys
):
    trackers = {**reporter.TRACKERS, "trackio": Broken, "wandb": Hanging}
    monkeypatch.setattr(reporter, "TRACKERS", trackers)
    monkeypatch.setattr(reporter, "check_trackers", lambda names: None)
    monkeypatch.setattr(reporter, "PATIENCE", 0.3)
    monkeypatch.setattr(reporter, "ROOM", 2)
    started = time.monotonic()
    try:
        run(tiny_dir, tok, tmp_path, max_steps=6, report_to=["trackio", "wandb", "tensorboard"])
    finally:
        Hanging.over.set()
    assert time.monotonic() - started < 50  # the hanging tracker alone would take 60 s a line
    out = capsys.readouterr().out
    assert out.count("trackio failed, and the run goes on without it: no route to host") == 1
    assert "report_to: wandb did not finish in" in out
    # of six lines two wait, and one is with the tracker, if its thread was quick
    assert re.search(r"wandb was too slow, and lacks [34] lines that are in metrics.jsonl", out)
    assert len(lines_of(tmp_path)[0]) == 6
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(
    tiny_dir, tok, tmp_path, monkeypatch
):
    monkeypatch.setattr(reporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lk.LorakitError, match=r"wandb is not installed; pip install 'lorakit\[wan"):
        run(tiny_dir, tok, tmp_path, max_steps=1, report_to=["wandb", "mlflow"])


def test_a_tracker_that_is_named_twice_is_one():
    assert lk.TrainConfig(report_to=["mlflow", "mlflow"]).trackers == ["mlflow"]
    assert lk.TrainConfig(report_to="mlflow").trackers == ["mlflow"]
    assert lk.TrainConfig().trackers == lk.TrainConfig(report_to=[]).trackers == []
    with pytest.raises(lk.LorakitError, match="choose tensorboard, trackio, wandb, mlflow or null"):
        lk.TrainConfig(report_to=["clearml"])
