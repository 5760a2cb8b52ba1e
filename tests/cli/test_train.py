"""`lorakit train` as a user meets it: what it prints, writes and returns."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import yaml

import lorakit as lk
from lorakit.cli.main import main


def test_profile(run_file, tmp_path, capsys):
    """The times of the rows add up to that of a step, and nothing is saved."""
    options = ["gradient_checkpointing=true", "eval_metrics=[rouge_l]"]
    assert main(["train", str(run_file), "--profile", *options]) == 0
    head, *rows = capsys.readouterr().out.partition("a step takes ")[2].splitlines()
    step = float(head.split(" ms")[0])
    times = {line.rsplit(None, 3)[0].strip(): float(line.split()[-3]) for line in rows}
    assert {"lora_linear: LoraMLP", "lora_linear: LoraMLP backward", "optimizer"} <= times.keys()
    assert 0 < times["lora_linear: LoraMLP backward"] < step
    # forward runs again in backward, inside of no op of ours; each row is rounded to 0.1 ms
    assert abs(sum(times.values()) - step) < 0.1 * len(rows)
    assert not (tmp_path / "out").exists()


def test_train_then_generate(run_file, tiny_dir, tmp_path, capsys):
    assert main(["train", str(run_file), "max_steps=4", "lora.r=2"]) == 0
    out = capsys.readouterr().out
    assert "step 4/4: loss" in out
    assert "validation loss" in out
    assert f"adapter in {tmp_path / 'out'}" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["base_model_name_or_path"] == str(tiny_dir)

    base = [str(tiny_dir), "hello", "--dtype", "float32", "--quantize", "nf4"]
    options = ["--adapter", str(tmp_path / "out"), "--max-new-tokens", "6"]
    assert main(["generate", *base, *options]) == 0
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    lk.load_adapter(model, tmp_path / "out")
    tok = lk.load_tokenizer(tiny_dir)
    assert capsys.readouterr().out == lk.generate(model, tok, "hello", max_new_tokens=6) + "\n"
    assert main(["generate", *base, *options, "--chat", "--temperature", "0.5", "--seed", "1"]) == 0


def test_format_of_the_data(run_file, capsys):
    assert main(["train", str(run_file), "data.format=text"]) == 1
    assert "train.jsonl line 1: field 'text' is missing" in capsys.readouterr().err
    assert main(["train", str(run_file), "data.format=txt"]) == 1
    assert "did you mean 'text'" in capsys.readouterr().err


def test_loftq_before_training(run_file, capsys):
    assert main(["train", str(run_file), "lora.init_lora_weights=loftq", "max_steps=1"]) == 0
    assert "LoftQ: mean relative error of 14 layers 0." in capsys.readouterr().out
    assert main(["train", str(run_file), "lora.init_lora_weights=loftq", "quantize=null"]) == 1
    assert "set quantize too" in capsys.readouterr().err


def test_run_file_of_axolotl(run_file, tmp_path, capsys):
    """A run file in Axolotl's names trains the same adapter."""
    assert main(["train", str(run_file)]) == 0
    values = yaml.safe_load(run_file.read_text())
    theirs = {
        "base_model": values["model"],
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": 4,
        "lora_alpha": 8,
        "datasets": [{"path": values["data"]["train"]}],
        "bf16": False,
        "output_dir": str(tmp_path / "theirs"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "flash_attention": True,
    }
    run_file.write_text(yaml.safe_dump(theirs))
    capsys.readouterr()
    assert main(["train", str(run_file), "lora_r=4"]) == 0
    ours, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "theirs")
    )
    assert ours == other
    assert main(["train", str(run_file), "lora.r=8"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == f"lorakit: {run_file}: lora_r and lora.r set the same thing: keep one of them"


def test_eval_metrics(run_file, tmp_path, capsys):
    assert main(["train", str(run_file), "eval_metrics=[exact_match, rouge_l]"]) == 0
    assert ", exact_match 0.0000, rouge_l 0." in capsys.readouterr().out
    last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert {"eval_loss", "eval_exact_match", "eval_rouge_l"} < json.loads(last).keys()
    assert main(["train", str(run_file), "eval_metrics=[rouge]"]) == 1
    assert "unknown metric 'rouge' (did you mean 'rouge_l'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["learning_rat=3"], "unknown key 'learning_rat' (did you mean 'learning_rate'?)"),
        (
            ["lora.target_modules=[q_prj]"],
            "'q_prj' matches no layer (did you mean 'q_proj'?)",
        ),
        (["model=/nowhere"], "/nowhere does not exist"),
        (["data=/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["max_steps=three"], "max_steps must be int or null, not 'three'"),
        (["seed=2024-13-45"], "the value is not valid YAML"),
        (
            ["seed=99999999999999999999999"],
            "seed must be int, not 9999",
        ),
        (["max_steps=null", "num_train_epochs=.inf"], "num_train_epochs must be float, not inf"),
        (["model.name=3"], "model is not a mapping"),
        (["lora=[1"], "the value is not valid YAML"),
        (["max_seq_length=4", "over_length=raise"], "more than max_seq_length=4"),
    ],
)
def test_an_error_is_one_sentence(run_file, tmp_path, capsys, change, message):
    assert main(["train", str(run_file), *change]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("lorakit: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_the_adapter(run_file, tmp_path):
    command = [
        sys.executable,
        "-u",
        "-m",
        "lorakit.cli",
        "train",
        str(run_file),
        "max_steps=100000",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the adapter so far is in" in err
    assert "Traceback" not in err
    assert time.monotonic() - started < 30
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_progress_bar_on_a_terminal(run_file):
    """A bar on the terminal shows loss, learning rate, tokens/s and memory."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 x 120
    command = [sys.executable, "-m", "lorakit.cli", "train", str(run_file)]
    process = subprocess.Popen(command, stdout=child, stderr=child)
    os.close(child)
    seen = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(parent)
    assert process.wait() == 0
    text = seen.decode()
    assert "training: 100%" in text
    for part in ("loss ", "lr ", "tok/s", "MB", "validation loss"):
        assert part in text
    assert "step 1/" not in text
