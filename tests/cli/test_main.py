"""The command line as a user meets it: what it prints, writes and returns."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time

import pytest
import torch
import yaml

import lorakit as lk
from lorakit.cli.main import main
from tests.conftest import ROWS


@pytest.fixture
def run_file(tiny_dir, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    values = {
        "model": str(tiny_dir),
        "quantize": "nf4",
        "dtype": "float32",
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "validation": str(tmp_path / "train.jsonl"),
        },
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "learning_rate": 1.0e-2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_profile(run_file, tmp_path, capsys):
    """The rows are a step, and nothing is saved."""
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


def test_quantize_report(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize-report", str(tiny_dir), "block_size=32", "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "the 2 worst" in out
    assert "14 layers, mean relative error 0.0" in out
    assert out.endswith("plot in quantize-report.png\n")
    assert (tmp_path / "quantize-report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["quantize-report", "--no-plot", str(tiny_dir), "lm_head=int8"]) == 0
    assert "15 layers" in capsys.readouterr().out
    assert main(["quantize-report", str(tiny_dir), "--plot", "new/one.png"]) == 0
    assert (tmp_path / "new" / "one.png").exists()
    for wrong, message in [
        ("blocksize=32", "unknown key 'blocksize' (did you mean 'block_size'?)"),
        ("quant_type=q4", "quant_type is 'q4'; choose nf4, fp4 or int8"),
        ("block_size=[", "the value is not valid YAML"),
        ("skip_modules=[nothing]", "'nothing' is no layer"),
    ]:
        assert main(["quantize-report", str(tiny_dir), wrong]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for plot in ("", "/"):
        assert main(["quantize-report", str(tiny_dir), "--plot", plot]) == 1
        assert "not the name of a file" in capsys.readouterr().err
    for wrong in (["block_size"], ["--worst", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["quantize-report", str(tiny_dir), *wrong])


def test_run_file_of_axolotl(run_file, tmp_path, capsys):
    """Other names, the same adapter."""
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


def test_plot(run_file, tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        assert main(["train", str(run_file), f"output_dir={tmp_path / name}"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["plot", "one", "--out", "new/both", "two"]) == 0
    assert capsys.readouterr().out == "plots in new/both/runs.html\n"
    assert (
        "<tr><th></th><th>one</th><th>two</th></tr>"
        in (tmp_path / "new" / "both" / "runs.html").read_text()
    )
    assert main(["plot", "one"]) == 0
    assert (tmp_path / "plots" / "loss.png").exists()
    assert main(["plot", "one", "new"]) == 1
    assert capsys.readouterr().err == (
        "lorakit: new holds no metrics.jsonl; name the output_dir of a training run\n"
    )
    assert main(["plot", "one", "--out", "run.yaml"]) == 1
    assert "run.yaml is not a directory" in capsys.readouterr().err


@pytest.fixture
def trained(run_file, tmp_path, capsys):
    assert main(["train", str(run_file), "max_steps=1", "lora.use_rslora=true", "lora.r=5"]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_adapter_show(trained, tmp_path, capsys):
    assert main(["adapter", "show", str(trained)]) == 0
    out = capsys.readouterr().out
    assert out == f"{lk.describe_adapter(trained)}\n"
    assert "model.layers.1.mlp.down_proj" in out
    assert "14 layers, rank 5, " in out
    assert main(["adapter", "show", str(tmp_path / "none")]) == 1
    assert "none/adapter_config.json does not exist" in capsys.readouterr().err
    weights = trained / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for command in (["show", str(trained)], ["convert", str(trained), str(tmp_path / "x")]):
        assert main(["adapter", *command]) == 1
        error = capsys.readouterr().err
        assert "damaged or cut off" in error
        assert error.count("\n") == 1


def test_adapter_convert(trained, tiny_dir, tmp_path, capsys):
    out = tmp_path / "plain"
    assert main(["adapter", "convert", str(trained), str(out)]) == 0
    assert capsys.readouterr().out == (
        "rsLoRA: its scaling is now lora_alpha / r\n"
        f"14 layers, r=5, lora_alpha=5, exact, in {out}\n"
    )
    models = [lk.load_model(tiny_dir, dtype="float32") for _ in range(2)]
    for model, path in zip(models, (trained, out), strict=True):
        lk.load_adapter(model, path)
    ids = torch.arange(24).view(2, 12)
    # one more rounding of B, to fp32
    assert (models[0](ids) - models[1](ids)).abs().max() < 1e-5
    assert main(["adapter", "convert", str(trained), str(tmp_path / "wide"), "--rank", "8"]) == 0
    assert "ranks 5 made 8 with zeros" in capsys.readouterr().out
    for arguments, message in [
        ([str(trained), str(out)], "holds another adapter already: remove it first, or name"),
        ([str(trained), str(trained)], "is the adapter to be converted"),
        ([str(tmp_path), str(tmp_path / "x")], "adapter_config.json does not exist"),
        ([str(trained), str(tmp_path / "x"), "--rank", "4"], "cannot hold a layer of rank 5"),
        ([str(trained), str(tmp_path / "x"), "--base-model", "/none"], "/none does not exist"),
    ]:
        assert main(["adapter", "convert", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_adapter_convert_of_dora(tiny_dir, tmp_path, capsys):
    from tests.adapters.test_convert import peft_adapter
    from tests.adapters.test_peft_files import hugging_face

    peft_adapter(hugging_face(tiny_dir), tmp_path / "dora", use_dora=True)
    command = ["adapter", "convert", str(tmp_path / "dora"), str(tmp_path / "out")]
    assert main(command) == 1
    assert (
        "DoRA scales the weights of the base: give base_model (--base-m" in capsys.readouterr().err
    )
    assert main([*command, "--base-model", str(tiny_dir), "--rank", "12"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "14 layers, r=12, lora_alpha=12, relative error 0." in out


def test_options_may_stand_anywhere(run_file, tiny_dir, capsys):
    assert main(["train", str(run_file), "--debug", "max_steps=1", "learning_rate=2e-3"]) == 0
    assert "step 1/1: loss" in capsys.readouterr().out
    short = ["--max-new-tokens", "2"]
    assert main(["generate", str(tiny_dir), "--chat", "hello", *short]) == 0
    assert main(["generate", "--dtype", "float32", str(tiny_dir), *short, "hello"]) == 0


def test_prompt_from_standard_input(tiny_dir):
    command = [
        sys.executable,
        "-m",
        "lorakit.cli",
        "generate",
        str(tiny_dir),
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(command, input="hello", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tok = lk.load_model(tiny_dir), lk.load_tokenizer(tiny_dir)
    assert done.stdout == lk.generate(model, tok, "hello", max_new_tokens=3) + "\n"


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


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_bad_run_file(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_debug_shows_the_traceback(run_file, capsys):
    assert main(["train", str(run_file), "model=/nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


WRONG = [
    [],
    ["tain"],
    ["train"],
    ["train", "run.yaml", "max_steps"],
    ["train", "run.yaml", "=3"],
    ["generate", "m", "--top-q", "1"],
    ["generate", "m", "a", "b"],
    ["plot"],
    ["plot", "--out", "x"],
    ["plot", "x", "--to", "y"],
    ["adapter"],
    ["adapter", "shw", "x"],
    ["adapter", "show"],
    ["adapter", "show", "x", "y"],
    ["adapter", "convert", "x"],
    ["adapter", "convert", "x", "y", "--rank", "r"],
    ["adapter", "convert", "x", "y", "--base", "b", "z"],
]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage" in err or "is not of the form key=value" in err


HELP = [
    [],
    ["train"],
    ["generate"],
    ["plot"],
    ["adapter"],
    ["adapter", "show"],
    ["adapter", "convert"],
]


@pytest.mark.parametrize("arguments", [[*verb, "--help"] for verb in HELP])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: lorakit" in capsys.readouterr().out


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
    """On a terminal a bar shows loss, rate, tokens/s and memory."""
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


@pytest.fixture
def small_adapter(tiny_dir, tmp_path):
    """An adapter that changes something."""
    torch.manual_seed(0)
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=2))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, 0, 0.1)
    lk.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("base", [None, "dequantized", "dense", "nf4"])
def test_merge(tiny_dir, small_adapter, tmp_path, capsys, base):
    options = [] if base is None else ["--quantize", "nf4", "--base", base]
    out = tmp_path / "merged"
    command = ["merge", str(tiny_dir), str(small_adapter), str(out), "--dtype", "float32", *options]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"merged on {base or 'dequantized'} weights: logits of 32 tokens moved by" in said
    model = lk.load_model(tiny_dir, dtype="float32", quantize=None if base is None else "nf4")
    lk.load_adapter(model, small_adapter)
    lk.merge(model, base or "dequantized")
    ids = torch.arange(20)[None]
    assert torch.equal(lk.load_model(out, dtype="float32")(ids), model(ids))
    assert main(command) == 1
    assert "is there already, and not empty" in capsys.readouterr().err


def test_merge_refuses(tiny_dir, small_adapter, tmp_path, capsys):
    out = str(tmp_path / "merged")
    assert main(["merge", str(tiny_dir), str(small_adapter), out, "--base", "nf4"]) == 1
    assert "add --quantize nf4" in capsys.readouterr().err
    assert main(["merge", str(tiny_dir), str(tmp_path / "none"), out]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_ctrl_c_before_anything_is_imported():
    """The exit imports nothing: torch, cut off once, cannot be imported again."""
    code = """
        import sys
        from lorakit.cli import main, plot
        def interrupted(args):
            raise KeyboardInterrupt
        plot.plot = interrupted
        assert main(["plot", "x"]) == 130
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "lorakit: interrupted\n")
