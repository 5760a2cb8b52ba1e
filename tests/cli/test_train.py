"""`lorakit train` as a user meets it: what it prints, writes and returns."""

import fcntl
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
import yaml

import lorakit as lk
from lorakit.cli.main import main
from lorakit.models.named_templates import NAMED_TEMPLATES
from lorakit.training.trackers import reporter


def test_profile(run_file, tmp_path, capsys):
    """The times of the rows add up to that of a step, and nothing is saved."""
    options = ["gradient_checkpointing=true", "eval_metrics=[rouge_l]"]
    assert main(["train", str(run_file), "--profile", *options]) == 0
    head, *rows = capsys.readouterr().out.partition("a step takes ")[2].splitlines()
    step = float(head.split(" ms")[0])
    times = {line.rsplit(None, 3)[0].strip(): float(line.split()[-3]) for line in rows}
    assert {"lora_linear: TiledMLPOutput", "optimizer"} <= times.keys()
    assert 0 < times["lora_linear: TiledMLPInput backward"] < step
    # forward runs again in backward, inside of no op of ours; each row is rounded to 0.1 ms
    assert abs(sum(times.values()) - step) < 0.1 * len(rows)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["0", "1000"])
def test_a_number_of_processes_that_cannot_be_is_refused(number, run_file, capsys):
    assert main(["train", str(run_file), "--nproc", number]) == 1
    assert f"--nproc is {number}; on this machine it is from 1 to" in capsys.readouterr().err


def test_what_a_run_cannot_write_to_is_said_before_the_model_is_loaded(
    run_file, tmp_path, capsys, monkeypatch
):
    """The model does not exist, which would be said next."""
    monkeypatch.setattr(reporter.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "file").touch()
    for said, options in {
        "report_to: wandb is not installed; pip install": ["report_to=wandb"],
        "is a file; choose another name": [f"output_dir={tmp_path / 'file'}"],
    }.items():
        assert main(["train", str(run_file), "model=/no/model", *options]) == 1
        assert said in capsys.readouterr().err


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


def test_rows_with_an_empty_answer(run_file, tmp_path, capsys, caplog):
    rows = [{"instruction": "Say a", "output": output} for output in ("a", "", "b")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["train", str(run_file), "max_steps=1"]
    assert main(options) == 1
    error = capsys.readouterr().err
    assert "train.jsonl line 2: the output is empty" in error
    assert "set skip_empty to leave such rows out" in error
    assert main([*options, "skip_empty=true"]) == 0
    assert "train.jsonl: 1 of 3 rows have an empty answer and were left out" in caplog.text


def test_the_model_itself(run_file, tmp_path, capsys):
    """The model in output_dir answers; new tokens have rows, and a tokenizer that knows them."""
    options = ["train", str(run_file), "max_steps=2", "train=full"]
    assert main(options) == 1
    assert "leave out lora" in capsys.readouterr().err
    options += ["lora=null", "quantize=null", "add_tokens=[<a>, <b>]", "freeze=[norm]"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "training the model on" in out
    assert re.search(r"train: full trains [\d,]+ of the [\d,]+ parameters", out)
    assert f"model in {tmp_path / 'out'}" in out
    assert len(lk.load_tokenizer(tmp_path / "out").encode("<a><b>", add_special_tokens=False)) == 2
    assert main(["generate", str(tmp_path / "out"), "a<b>", "--max-new-tokens", "2"]) == 0


def test_errors_of_rows_come_before_the_model(run_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a" * 99, "completion": "b"}))
    monkeypatch.setattr(lk, "load_model", None)
    assert main(["train", str(run_file), "max_seq_length=9", "over_length=raise"]) == 1
    assert "line 1: 102 tokens, more than max_seq_length=9" in capsys.readouterr().err


def test_a_chat_template_for_a_model_without_one(run_file, tiny_dir, tmp_path, capsys):
    """It is saved with the adapter, and used by what comes after: more training, chat, a merge."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_dir, base)
    (base / "chat_template.jinja").unlink()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": chat}))
    options = ["train", str(run_file), f"model={base}", "max_steps=1"]
    assert main(options) == 1
    assert "set chat_template to a jinja file or to chatml, gemma" in capsys.readouterr().err
    lint = ["data", "lint", str(tmp_path / "train.jsonl"), "--model", str(base)]
    assert main(lint) == 1
    assert main([*lint, "--chat-template", "zephyr"]) == 0
    assert main([*options, "chat_template=zephyr"]) == 0
    template = NAMED_TEMPLATES["zephyr"]
    assert (out / "chat_template.jinja").read_text() == template
    assert main([*options, f"adapter={out}", "lora={}", f"output_dir={tmp_path / 'more'}"]) == 0
    assert (tmp_path / "more" / "chat_template.jinja").read_text() == template

    dense = ["--dtype", "float32"]
    capsys.readouterr()
    chatting = ["generate", str(base), "a", "--chat", "--max-new-tokens", "4", *dense]
    assert main([*chatting, "--adapter", str(out)]) == 0
    answer = capsys.readouterr().out
    tok = lk.load_tokenizer(base, chat_template="zephyr")
    model = lk.load_adapter(lk.load_model(base, dtype="float32"), out)
    assert answer == lk.generate(model, tok, chat[:1], max_new_tokens=4) + "\n"
    assert main(chatting) == 1
    assert "set chat_template to" in capsys.readouterr().err

    for name, given, expected in [
        ("a", [], template),
        ("b", ["--chat-template", "{{ 1 }}"], "{{ 1 }}"),
    ]:
        assert main(["merge", str(base), str(out), str(tmp_path / name), *dense, *given]) == 0
        assert lk.load_tokenizer(tmp_path / name).chat_template == expected
    assert (
        main(["merge", str(base), str(out), str(tmp_path / "c"), "--chat-template", "zefyr"]) == 1
    )
    assert not (tmp_path / "c").exists()


def test_loftq_before_training(run_file, capsys):
    assert main(["train", str(run_file), "lora.init_lora_weights=loftq", "max_steps=1"]) == 0
    assert "LoftQ: mean relative error of 14 layers 0." in capsys.readouterr().out
    assert main(["train", str(run_file), "lora.init_lora_weights=loftq", "quantize=null"]) == 1
    assert "set quantize too" in capsys.readouterr().err


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [each["loss"] for each in map(json.loads, lines) if "loss" in each]


def going_on(run_file, **change):
    """Make the run file one that names an adapter, and so none of a new one's settings."""
    values = yaml.safe_load(run_file.read_text())
    del values["lora"]
    run_file.write_text(yaml.safe_dump(values | change))


@pytest.mark.parametrize("name", ["adapter", "lora_model_dir"])
def test_going_on_from_an_adapter(run_file, tiny_dir, tmp_path, capsys, name):
    """The second run is the one that Python gets with the loaded adapter."""
    assert main(["train", str(run_file)]) == 0
    first = tmp_path / "out"
    going_on(run_file, output_dir=str(tmp_path / "more"), **{name: str(first)})
    capsys.readouterr()
    assert main(["train", str(run_file), "max_steps=2"]) == 0
    assert f"going on from the adapter in {first}" in capsys.readouterr().out

    tok = lk.load_tokenizer(tiny_dir)
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    lk.load_adapter(model, first)
    config = lk.TrainConfig(str(tmp_path / "python"), max_steps=2, learning_rate=1e-2)
    data = dict.fromkeys(("train", "validation"), tmp_path / "train.jsonl")
    lk.train(model, tok, data, config)
    ours, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("more", "python")
    )
    assert ours == other
    assert losses(tmp_path / "more")[0] < losses(first)[0]


@pytest.mark.parametrize("key", ["add_tokens", "tokens"])
def test_new_tokens_from_the_run_file_to_the_merged_model(
    run_file, tiny_dir, tmp_path, capsys, key
):
    """Each verb finds the tokens; the merged model computes what model and adapter do."""
    values = yaml.safe_load(run_file.read_text()) | {key: ["<a>", "<b>"], "quantize": None}
    rows = [{"prompt": f"{i} <a>", "completion": f"{i}<b>"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_file.write_text(yaml.safe_dump(values))
    assert main(["train", str(run_file)]) == 0
    out, merged = tmp_path / "out", tmp_path / "merged"
    tok = lk.load_tokenizer(out)
    ids = tok.encode("1 <a>1<b>")
    new = [tok.backend.token_to_id(text) for text in ("<a>", "<b>")]
    assert set(new) <= set(ids)
    written = json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"]
    assert written["embed_tokens"] == new
    options = ["--dtype", "float32"]
    assert main(["merge", str(tiny_dir), str(out), str(merged), *options]) == 0
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), out)
    again = lk.load_model(merged, dtype="float32")
    x = torch.tensor([ids])
    assert (again(x) - model(x)).abs().max() < 1e-4  # one weight, or two products, in fp32
    assert lk.load_tokenizer(merged).encode("1 <a>1<b>") == ids
    told = ["--adapter", str(out), "--max-new-tokens", "2", *options]
    assert main(["generate", str(tiny_dir), "1 <a>", *told]) == 0
    going_on(run_file, output_dir=str(tmp_path / "more"), adapter=str(out))
    assert main(["train", str(run_file)]) == 1
    assert "leave out add_tokens" in capsys.readouterr().err
    values = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != key}))
    assert main(["train", str(run_file)]) == 0
    assert lk.load_tokenizer(tmp_path / "more").encode("1 <a>1<b>") == ids


def test_preferences_of_an_adapter_in_its_own_directory(run_file, tmp_path, capsys):
    """The first loss is ln 2. The adapter stays whole until the new one takes its place, and a run
    that was cut short goes on from its checkpoint with the same reference.
    """
    assert main(["train", str(run_file)]) == 0
    pairs = [{"prompt": f"{a} is ", "chosen": f"{a}.", "rejected": f"{a + 1}!"} for a in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    out, copied = tmp_path / "out", tmp_path / "copied"
    shutil.copytree(out, copied)
    data, options = str(tmp_path / "pairs.jsonl"), {"objective": "dpo", "save_steps": 2}
    going_on(run_file, data=data, adapter=str(out), output_dir=str(out), max_steps=4, **options)
    before = (out / "adapter_model.safetensors").read_bytes()
    rejected = ["adapter=" + str(tmp_path), "max_steps=4"]
    assert main(["train", str(run_file), *rejected]) == 1
    assert (
        "holds no adapter_config.json; name the directory of an adapter" in capsys.readouterr().err
    )
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert main(["train", str(run_file)]) == 0
    assert losses(out)[0] == pytest.approx(math.log(2), abs=1e-6)
    after = (out / "adapter_model.safetensors").read_bytes()
    assert after != before

    # The same again from the checkpoint in the middle: the adapter is the new one by now.
    shutil.rmtree(out / "checkpoint-4")
    assert main(["train", str(run_file), "resume=auto"]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == after
    elsewhere = [f"adapter={copied}", f"output_dir={tmp_path / 'elsewhere'}"]
    assert main(["train", str(run_file), *elsewhere]) == 0
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").read_bytes() == after


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
        (
            ["adapter=/nowhere"],
            "adapter in /nowhere has settings of its own: take out lora.lora_alpha, lora.r, or",
        ),
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


def test_a_missing_package_of_a_metric_is_named_before_the_model_is_loaded(
    run_file, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(lk, "load_model", None)
    assert main(["train", str(run_file), "eval_metrics=[bleu]"]) == 1
    assert capsys.readouterr().err == (
        "lorakit: bleu and chrf need sacrebleu; pip install 'lorakit[metrics]'\n"
    )


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
