"""Buttons: a run is stopped, resumed and started as a process of its own."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

import lorakit as lk
from lorakit.board import control as module
from lorakit.board import runs
from lorakit.training.record import recorded
from lorakit.training.state import only_run_in
from tests.board.conftest import TOKEN
from tests.conftest import ROWS

RUN_FILE = "model: org/name  # mine\ndata: rows.jsonl\n"
# What stands in for `lorakit train`: it says its arguments, and waits for the end.
WAITS = "import os, sys, time; print(os.getcwd(), *sys.argv[1:]); time.sleep(60)"
FAILS = "import sys; print('a line'); sys.exit('lorakit: the model is away')"
PLANS = "import sys; print('{\"fits\": true}'); sys.exit(1)"


@pytest.fixture
def command(monkeypatch):
    """command(script) lets a script stand in for the command."""

    def command(script):
        monkeypatch.setattr(
            module, "_lorakit", lambda arguments: [sys.executable, "-S", "-c", script, *arguments]
        )

    command(WAITS)
    return command


@pytest.fixture
def children(client):
    """The processes that the board has started, which end with the test."""
    yield client.board.runs.control.children
    for child in client.board.runs.control.children:
        child.kill()
        child.wait(20)


@pytest.fixture
def post(client):
    def post(path, **body):
        response = client.post(f"/{TOKEN}/api/{path}", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return post


def state(get, id_):
    [found] = [run for run in get("runs") if run["id"] == id_]
    return found["state"], found["error"]


def wait_for(condition):
    """Wait until a condition holds; what it waits for takes a process a moment."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_start_and_stop(command, children, folder, get, post, refused):
    assert post("runs", run_file=RUN_FILE, name="new/my run") == {"id": "new/my run"}
    run = folder / "new" / "my run"
    assert (run / "run.yaml").read_text() == RUN_FILE
    assert get("runs/new%2Fmy%20run/run_file") == {"text": RUN_FILE}
    wait_for(lambda: (run / "output.log").read_text())
    output_dir = f'output_dir="{run}"'
    assert (run / "output.log").read_text().split(" train ") == [
        os.getcwd(),
        f"{run}/run.yaml {output_dir}\n",
    ]
    assert state(get, "new/my run") == ("running", None)
    assert refused("runs/new%2Fmy%20run/resume", x=1) == (409, "the run goes on already.")
    [child] = children
    assert os.getsid(child.pid) == child.pid  # the end of the board's terminal is not its end
    assert post("runs/new%2Fmy%20run/stop")["id"] == "new/my run"
    assert child.wait(20) == -signal.SIGTERM
    assert state(get, "new/my run") == ("stopped", None)
    assert refused("runs/new%2Fmy%20run/stop", x=1) == (409, "the run is not going on.")


def test_a_run_that_cannot_begin_says_why(command, children, get, post):
    command(FAILS)
    post("runs", run_file=RUN_FILE, name="new")
    children[0].wait(20)
    assert state(get, "new") == ("failed", "the model is away")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"run_file": RUN_FILE, "name": "a"}, 409, "there is something called 'a' already"),
        ({"run_file": "model: x\n", "name": "n"}, 409, "data is missing"),
        ({"run_file": "model: [", "name": "n"}, 409, "the run file is not valid YAML"),
        ({"run_file": "- 1", "name": "n"}, 409, "must be a mapping"),
        ({"run_file": RUN_FILE + "lora_r: x\n", "name": "n"}, 409, "lora"),
        ({"run_file": RUN_FILE}, 400, "name"),
        ({"run_file": 3, "name": "n"}, 400, "run_file"),
        ({"run_file": RUN_FILE, "nmae": "n"}, 400, "name"),
    ],
)
def test_a_wrong_run_file_starts_nothing(command, client, folder, refused, body, status, said):
    code, sentence = refused("runs", **body)
    assert code == status
    assert said in sentence
    assert sorted(os.listdir(folder)) == ["a", "deep"]
    assert client.board.runs.control.children == []


@pytest.mark.parametrize(
    "name",
    "|.|..|../b|/b|b/|b//c|b/../../c|.b|b |b\n|a\0|checkpoint-1|link/b|a/b/c/d/e/f/g|<img>|b."
    "|\u202eb|a/metrics.jsonl/b|{}".format("x" * 101).split("|"),
)
def test_a_name_that_leads_elsewhere_starts_nothing(
    command, client, folder, tmp_path, refused, name
):
    os.symlink(tmp_path / "secret", folder / "link")
    assert refused("runs", run_file=RUN_FILE, name=name)[0] == 409
    assert client.board.runs.control.children == []
    assert os.listdir(tmp_path / "secret") == ["metrics.jsonl"]


def test_resume_takes_the_run_file_and_the_place_of_the_run(
    command, children, folder, tmp_path, get, post, refused
):
    assert refused("runs/a/resume", x=1)[0] == 404  # there is no run file
    record = {"state": "finished", "run_file": {"model": "m", "data": "d"}, "started": 1.0}
    record |= {"cwd": str(tmp_path), "ranks": 2}
    (folder / "a" / "run.json").write_text(json.dumps(record))
    assert refused("runs/a/resume", x=1) == (409, "the run has finished.")
    (folder / "a" / "run.json").write_text(json.dumps(record | {"state": "running"}))
    assert state(get, "a") == ("failed", "the process of the run was killed")
    [found] = [run for run in get("runs") if run["id"] == "a"]
    assert found["can_resume"]
    assert post("runs/a/resume")["state"] == "running"
    run = folder / "a"
    wait_for(lambda: (run / "output.log").read_text())
    output_dir = f'output_dir="{run}"'
    rest = f"train {run}/.resumed.yaml {output_dir} resume=auto --nproc 2\n"
    assert (run / "output.log").read_text() == f"{tmp_path} {rest}"
    assert yaml.safe_load((run / ".resumed.yaml").read_text()) == record["run_file"]
    record["cwd"] = str(tmp_path / "gone")
    (folder / "deep" / "b c" / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    assert "which is gone" in refused("runs/deep%2Fb%20c/resume", x=1)[1]


def test_a_run_that_several_pages_resume_at_once_goes_on_once(command, children, folder, client):
    """Each would write the same files, and one may find those of another half made."""
    run, said = folder / "a", []
    record = {"state": "stopped", "run_file": {"model": "x"}, "cwd": os.getcwd(), "started": 1.0}
    (run / "run.json").write_text(json.dumps(record))
    start = threading.Barrier(6)

    def resume():
        start.wait(20)
        try:
            client.board.runs.control.resume(run)
        except Exception as error:
            said.append(error)

    threads = [threading.Thread(target=resume) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [str(error) for error in said] == ["the run goes on already"] * 5
    assert len(children) == 1


def test_a_full_disk_is_said_in_a_sentence(folder, client, refused, monkeypatch):
    (folder / "a" / "run.json").write_text('{"state": "stopped", "run_file": {"model": "x"}}')

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_text", full)
    status, sentence = refused("runs/a/resume", x=1)
    assert status == 409
    assert "No space left on device" in sentence


def test_a_run_of_another_terminal_is_stopped_by_its_lock(folder, refused, post, monkeypatch):
    """The process id of run.json counts only while the lock is held by whoever wrote it."""
    run, sent = folder / "a", []
    monkeypatch.setattr(module.os, "kill", lambda pid, number: sent.append((pid, number)))
    with recorded(run, {}, lambda: True, print):
        pass
    (run / "run.json").write_text((run / "run.json").read_text().replace("finished", "running"))
    assert refused("runs/a/stop", x=1) == (409, "the run is not going on.")
    with only_run_in(run):  # the record is still that of a run before
        assert "does not say yet which process" in refused("runs/a/stop", x=1)[1]
        with recorded(run, {"host": "elsewhere"}, lambda: True, print):
            assert refused("runs/a/stop", x=1)[1] == "the run goes on on elsewhere: stop it there."
        with recorded(run, {}, lambda: True, print):
            assert post("runs/a/stop")["state"] == "running"
            # a second signal would end it at once, without its checkpoint
            asked = "the run was asked to end already; it does after its step."
            assert refused("runs/a/stop", x=1) == (409, asked)
        with recorded(run, {"pid": 1}, lambda: True, print):
            assert refused("runs/a/stop", x=1)[0] == 409
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert socket.gethostname() in (run / "run.json").read_text()


def test_a_board_that_looks_does_not_keep_a_run_from_its_folder(tmp_path):
    """A look holds the lock for a moment; a run asks for it more than once."""
    with only_run_in(tmp_path):
        pass
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH);"
        "print('held', flush=True); time.sleep(0.05)"
    )
    command = [sys.executable, "-S", "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as looker:
        assert looker.stdout.readline() == b"held\n"
        with only_run_in(tmp_path):
            assert runs.is_locked(tmp_path / ".lock")
    assert not runs.is_locked(tmp_path / ".lock")


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert runs.is_locked(path)
    assert not runs.is_locked(path)
    assert not runs.is_locked(tmp_path / "nothing")


def test_forecast(command, folder, get, post, refused, monkeypatch):
    command(PLANS)  # the exit code is 1 if the run does not fit
    assert get("runs/a/memory")["forecast"] is None
    (folder / "a" / "run.yaml").write_text(RUN_FILE)
    assert post("forecast", run_file=RUN_FILE) == {"fits": True}
    assert get("runs/a/memory")["forecast"] == {"fits": True}
    monkeypatch.setattr(module, "FORECASTS", 1)  # the last one is kept
    assert post("forecast", run_file="model: m") == {"fits": True}
    assert get("runs/a/memory")["forecast"] is None
    command("import sys; sys.exit(f'lorakit: {sys.argv[2]}, lora: no')")
    assert refused("forecast", run_file="x") == (409, "the run file, lora: no.")
    command(WAITS)
    monkeypatch.setattr(module, "FORECAST_SECONDS", 0.1)
    assert "took more than 0.1 seconds" in refused("forecast", run_file="y")[1]


def test_no_python_file_of_the_folder_of_a_run_is_run(tmp_path):
    for name in ("lorakit", "json", "runpy", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken')")
    done = subprocess.run(
        module._lorakit(["--version"]),
        cwd=tmp_path,
        env={**module._environment(), "PYTHONSAFEPATH": ""},  # which Python 3.10 does not know
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"lorakit {lk.__version__}\n"


@pytest.mark.slow
def test_a_real_run_is_started_stopped_and_resumed(children, folder, tiny_dir, tmp_path, get, post):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {"model": str(tiny_dir), "data": str(tmp_path / "rows.jsonl"), "dtype": "float32"}
    text = yaml.safe_dump({**values, "max_steps": 3000, "per_device_train_batch_size": 1})
    post("runs", run_file=text, name="real")
    wait_for(lambda: (folder / "real" / "metrics.jsonl").exists())
    last = lambda: get("runs")[-1]["step"]  # noqa: E731
    wait_for(lambda: last() > 3)
    assert post("runs/real/stop")["state"] == "running"
    assert children[0].wait(60) == 130
    assert state(get, "real") == ("stopped", None)
    step = last()
    assert (folder / "real" / f"checkpoint-{step}").is_dir()
    settings = get("runs/real/settings")
    assert settings["max_steps"] == 3000
    assert settings["lora.r"] == lk.LoraConfig().r
    post("runs/real/resume")
    wait_for(lambda: last() > step + 3)
    assert post("runs/real/stop")["total_steps"] == 3000
    assert children[-1].wait(60) == 130
