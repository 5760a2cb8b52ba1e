"""Runs of a comparison at once: the bytes of one after the other, a failure, a kill and Ctrl-C."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

import lorakit as lk
from lorakit.comparison import at_once

TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")  # of no two runs the same


@pytest.fixture
def one_model(grid):
    """One model that is trained with two settings, of which the second cannot be had."""
    settings = {"r2": {}, "wrong": {"lora": {"target_modules": ["nothing"]}}}
    return grid | {
        "models": {"bytes": grid["models"]["bytes"]}, "settings": settings, "baseline": False,
    }  # fmt: skip


def what_is_learned(folder):
    """The files of a comparison that a second one has too, byte by byte."""
    names = ("adapter_model.safetensors", "run.yaml")
    files = [path for name in names for path in folder.glob(f"runs/*r2*/{name}")]
    files += folder.glob("predictions/*.jsonl")
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"")
        for path in files
    }


def scores(result):
    rows = [row for task in result.values["tasks"] for row in task["rows"]]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_bytes_are_those_of_one_after_the_other(one_model, tmp_path, capsys):
    """Also beside a run that fails, which is named."""
    result = lk.compare_models(one_model, at_once=2)
    one_model |= {"settings": {"r2": {}}, "output_dir": str(tmp_path / "alone")}
    alone = lk.compare_models(one_model)
    assert list(result.failed) == ["parity--bytes--wrong--s0"]
    assert "matches no layer" in result.failed["parity--bytes--wrong--s0"]
    said = capsys.readouterr().out
    assert "parity--bytes--wrong--s0 failed: " in said
    assert "run 2 of 2: " in said
    learned = what_is_learned(alone.folder)
    assert len(learned) == 3
    assert what_is_learned(result.folder) == learned
    assert scores(result) == scores(alone)
    folder = result.folder / "runs" / "parity--bytes--r2--s0"
    assert "step 3/3" in (folder / "output.log").read_text()
    assert lk.read_comparison(result.folder).values == result.values


@pytest.mark.parametrize(
    ("named", "threads"), [(None, 4), ("3", 3), ("8", 4), ("2,4", 2), ("0", 1), ("many", 4)]
)
def test_runs_have_no_more_threads_than_processors(monkeypatch, named, threads):
    monkeypatch.setattr(at_once.processors, "usable", lambda: 8)
    assert at_once._threads(named, 2) == threads


def test_less_than_one_at_once_is_refused(one_model):
    with pytest.raises(lk.LorakitError, match="at_once is 0, and at least 1 run is made at once"):
        lk.compare_models(one_model, at_once=0)


def wait_for(what, seconds=120):
    """Wait until `what` returns something true, and return it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def started(one_model, tmp_path):
    """`lorakit compare --jobs 2` of two long runs, which both have taken steps, and its folder."""
    one_model["base"] |= {"max_steps": 100_000}
    one_model["settings"] = {"r2": {}, "r1": {"lora": {"r": 1}}}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(one_model))
    command = [sys.executable, "-m", "lorakit", "compare", str(path), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "compared"
    metrics = [
        folder / "runs" / f"parity--bytes--{name}--s0/metrics.jsonl" for name in ("r2", "r1")
    ]
    wait_for(lambda: all(path.exists() and path.stat().st_size for path in metrics))
    return process, folder


def processes(folder):
    """The processes that make the runs of a comparison, by run."""
    records = folder.glob("runs/*/run.json")
    return {path.parent.name: json.loads(path.read_text())["pid"] for path in records}


@pytest.mark.slow
def test_ctrl_c_ends_all_with_checkpoints(one_model, tmp_path):
    process, folder = started(one_model, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in err
    states = {
        run["id"]: run["state"]
        for run in json.loads((folder / "comparison.json").read_text())["runs"]
    }
    assert set(states.values()) == {"stopped"}
    assert len(list(folder.glob("runs/*/checkpoint-*"))) == 2


@pytest.mark.slow
def test_a_run_that_is_killed_is_named_and_the_other_goes_on(one_model, tmp_path):
    process, folder = started(one_model, tmp_path)
    subprocess.run(["kill", "-9", str(processes(folder)["parity--bytes--r2--s0"])], check=True)
    path = folder / "runs/parity--bytes--r2--s0/compared.json"
    wait_for(lambda: json.loads(path.read_text())["state"] == "failed")
    assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert "parity--bytes--r2--s0 failed: its process was killed by SIGKILL" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process learns of its parent on Linux alone")
def test_runs_end_with_a_comparison_that_is_killed(one_model, tmp_path):
    process, folder = started(one_model, tmp_path)
    process.kill()
    process.communicate()
    wait_for(lambda: len(list(folder.glob("runs/*/checkpoint-*"))) == 2)
