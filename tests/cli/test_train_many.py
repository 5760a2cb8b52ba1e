"""`lorakit train` of a file with several adapters, as a user meets it."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from lorakit.board.folder import Folder
from lorakit.board.runs import summary
from lorakit.cli.main import main

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def many_file(run_file, tmp_path):
    values = yaml.safe_load(run_file.read_text())
    other = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)[:7]
    (tmp_path / "other.jsonl").write_text("".join(other))
    values["adapters"] = {
        "small": {"lora": {"r": 2}, "eval_steps": 2},
        "tenant": {"data": str(tmp_path / "other.jsonl"), "max_steps": 2, "seed": 1},
    }
    run_file.write_text(yaml.safe_dump(values))
    return run_file


def test_the_folders_are_those_of_runs(many_file, tiny_dir, tmp_path, capsys):
    """Each is read by the verbs that read a run, and says what its run file would say."""
    assert main(["train", str(many_file)]) == 0
    out = capsys.readouterr().out
    assert "training 2 adapters in one pass a step: small, tenant" in out
    assert "step 2/3: 2 adapters, " in out
    assert "small   3 steps, loss " in out
    folder = tmp_path / "out"
    runs = Folder(folder).runs()
    assert list(runs) == ["small", "tenant"]
    for name, path in runs.items():
        told = summary(path, name)
        assert told["state"] == "finished"
        assert told["step"] == told["total_steps"] == (3 if name == "small" else 2)
        record = json.loads((path / "run.json").read_text())
        again = tmp_path / f"{name}.yaml"
        again.write_text(yaml.safe_dump(record["run_file"] | {"output_dir": str(tmp_path / name)}))
        assert main(["train", str(again)]) == 0
        shown = json.loads((tmp_path / name / "run.json").read_text())
        for each in (record, shown):
            for key in ("pid", "started", "ended"):
                del each[key]
            del each["settings"]["output_dir"], each["run_file"]["output_dir"]
        assert record == shown
        names = sorted(p.name for p in (tmp_path / name).iterdir())
        assert sorted(p.name for p in path.iterdir()) == names
    data = str(tmp_path / "train.jsonl")
    capsys.readouterr()
    options = ["--adapter", str(folder / "small"), "--dtype", "float32"]
    assert main(["evaluate", str(tiny_dir), data, *options]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", str(tiny_dir), str(folder / "tenant"), str(merged)]) == 0
    assert main(["plot", *map(str, runs.values()), "--out", str(tmp_path / "plot.svg")]) == 0


def test_a_sweep_from_the_command_line(run_file, tmp_path, capsys):
    """A second run finds all done, and leaves the same bytes."""
    sweep = ["sweep.lora.r=[2, 3]", "sweep.learning_rate=[1.0e-3, 2.0e-3]", "resume=auto"]
    assert main(["train", str(run_file), *sweep, "save_steps=2"]) == 0
    names = [f"r-{r}--learning_rate-{rate}e-3" for r in (2, 3) for rate in (1, 2)]
    folders = [tmp_path / "out" / name for name in names]
    before = [(folder / ADAPTER).read_bytes() for folder in folders]
    assert len(set(before)) == 4
    assert "step 3/3: 4 adapters" in capsys.readouterr().out
    assert main(["train", str(run_file), *sweep, "save_steps=2"]) == 0
    assert [(folder / ADAPTER).read_bytes() for folder in folders] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile"], "--profile is for a run of one adapter"),
        (["--nproc", "2"], "--nproc is for a run of one adapter"),
        (["adapters.small.objective=dpo"], "adapter 'small': several adapters in one pass: the"),
        (["adapters.small.lora.use_dora=true"], "'small' does more at "),
        (["adapters.small.lora.target_modules=[x_proj]"], "adapter 'small': "),
        (["adapters.small.data=/no/rows.jsonl"], "/no/rows.jsonl does not exist"),
        (["adapters=null"], ""),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(
    many_file, tmp_path, capsys, monkeypatch, options, message
):
    import lorakit as lk

    def loaded(*args, **options):
        raise lk.LorakitError("loaded")

    monkeypatch.setattr(lk, "load_model", loaded)
    assert main(["train", str(many_file), *options]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.endswith("loaded\n") == (not message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(many_file, tmp_path, capsys):
    options = ["max_steps=30", "adapters.tenant.max_steps=20", "save_steps=3", "resume=auto"]
    assert main(["train", str(many_file), *options, f"output_dir={tmp_path / 'whole'}"]) == 0
    command = [sys.executable, "-m", "lorakit", "train", str(many_file), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert 3 <= json.loads((tmp_path / "out" / "many.json").read_text())["adapters"]["small"] < 30
    capsys.readouterr()
    assert main(["train", str(many_file), *options]) == 0
    assert "resumed from" in capsys.readouterr().out
    for name in ("small", "tenant"):
        ours, whole = (tmp_path / folder / name / ADAPTER for folder in ("out", "whole"))
        assert ours.read_bytes() == whole.read_bytes()
