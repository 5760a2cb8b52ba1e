"""`lorakit adapter show` and `lorakit adapter convert`."""

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from tests.adapters.peft_files.adapters_of_peft import peft_adapter


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
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    peft_adapter(base, tmp_path / "dora", use_dora=True)
    command = ["adapter", "convert", str(tmp_path / "dora"), str(tmp_path / "out")]
    assert main(command) == 1
    assert (
        "DoRA scales the weights of the base: give base_model (--base-m" in capsys.readouterr().err
    )
    assert main([*command, "--base-model", str(tiny_dir), "--rank", "12"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "14 layers, r=12, lora_alpha=12, relative error 0." in out
