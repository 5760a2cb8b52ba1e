"""`lorakit export`: the files that it writes, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from lorakit.models.gguf import read_gguf
from tests.export.models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("export") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def adapter(model):
    """An adapter that changes what the model computes."""
    torch.manual_seed(0)
    adapted = lk.attach(lk.load_model(model, dtype="float32"), lk.LoraConfig(r=2))
    for name, p in adapted.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, 0, 0.1)
    lk.save_adapter(adapted, model.parent / "adapter")
    return model.parent / "adapter"


def test_one_file(model, tmp_path, capsys):
    file = tmp_path / "new" / "m.gguf"
    assert main(["export", str(model), str(file), "--tensor-type", "ffn_up=q8_0"]) == 0
    said = capsys.readouterr().out
    lk.export_gguf(model, tmp_path / "same.gguf", tensor_types={"ffn_up": "q8_0"})
    assert file.read_bytes() == (tmp_path / "same.gguf").read_bytes()
    assert said.startswith(f"{file}: q4_k_m, 0.0 M parameters in ")
    assert "not what q4_k_m means" in said


def test_several_types_of_a_merged_model(model, adapter, tmp_path, capsys):
    command = ["export", str(model), str(adapter), str(tmp_path), "--type", "f32,Q8_0"]
    assert main([*command, "--type", "f16", "--name", "Mine"]) == 0
    names = {f"Mine-{each}.gguf" for each in ("F32", "Q8_0", "F16")}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert capsys.readouterr().out.count(" parameters in ") == 3
    merged = lk.load_model(model, dtype="float32")
    lk.load_adapter(merged, adapter)
    lk.merge_and_unload(merged)
    name = "model.layers.1.self_attn.v_proj.weight"
    found = read_gguf(tmp_path / "Mine-F32.gguf")[1][name].read()
    assert torch.equal(found, merged.state_dict()[name])


def test_calibrated_on_rows(model, adapter, tmp_path):
    rows = [{"text": f"hello the {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["export", str(model), str(adapter), str(tmp_path / "m.gguf"), "--type", "q4_0"]
    assert main([*command, "--calibrate", str(tmp_path / "rows.jsonl")]) == 0
    tok, adapted = lk.load_tokenizer(model), lk.load_model(model)
    lk.load_adapter(adapted, adapter)
    lk.importance(adapted, tok, rows).save(tmp_path / "imatrix.gguf")
    command[3] = str(tmp_path / "same.gguf")
    assert main([*command, "--imatrix", str(tmp_path / "imatrix.gguf")]) == 0
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_what_is_wrong_is_one_sentence(model, tmp_path, capsys):
    file = str(tmp_path / "m.gguf")
    for command, said in [
        ([str(tmp_path / "none"), file], "none"),
        ([str(model), str(tmp_path / "none"), file], "does not exist"),
        ([str(model), file, "--type", "f32,f16"], "is one file, and --type names 2 of them"),
        ([str(model), file, "--tensor-type", "ffn_dwn=q8_0"], "fits no matrix"),
        ([str(model), file, "--calibrate", str(tmp_path / "none")], "does not exist"),
        ([str(model), file, "--context-length", "100"], "the model's 64"),
        ([str(model), str(tmp_path / "m")], "does not end in .gguf"),
        ([str(model), str(model / "model.safetensors")], "does not end in .gguf"),
    ]:
        assert main(["export", *command]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.startswith("lorakit: ")
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_file_to_write(model, adapter, capsys):
    """The adapter stands where the file would; no model goes into its directory."""
    before = {file.name for file in adapter.iterdir()}
    assert main(["export", str(model), str(adapter)]) == 1
    assert "is an adapter: name what to write after it" in capsys.readouterr().err
    assert {file.name for file in adapter.iterdir()} == before


def test_a_name_may_hold_a_slash(model, tmp_path):
    command = ["export", str(model), str(tmp_path), "--type", "q8_0", "--name", "../a/b"]
    assert main(command) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["..-a-b-Q8_0.gguf"]


@pytest.mark.parametrize("wrong", [["--type", "q3_k"], ["--tensor-type", "q8_0"], ["--to", "onnx"]])
def test_wrong_usage(model, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(model), str(tmp_path / "m.gguf"), *wrong])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(model, tmp_path):
    """The system lets the process write 20 kB of a file; an older file stays as it was."""
    file = tmp_path / "m.gguf"
    file.write_bytes(b"older")
    code = f"""if True:
        import resource, sys
        from lorakit.cli.main import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.exit(main(["export", {str(model)!r}, {str(file)!r}]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"lorakit: {file} cannot be written (")
    assert done.stderr.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]
    assert file.read_bytes() == b"older"


def test_ctrl_c_leaves_no_half_file(model, tmp_path):
    """The signal comes while the tensors are written; an older file stays as it was."""
    (tmp_path / "m.gguf").write_bytes(b"older")
    code = f"""if True:
        import os, signal, sys
        from lorakit.cli.main import main
        import lorakit.export.gguf as writing
        real = writing._blocks
        def interrupted(stored, *rest):
            if stored == "blk.1.ffn_up.weight":
                os.kill(os.getpid(), signal.SIGINT)
            return real(stored, *rest)
        writing._blocks = interrupted
        sys.exit(main(["export", {str(model)!r}, {str(tmp_path / "m.gguf")!r}]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith("lorakit: interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"older"


@pytest.mark.parametrize("to", ["gguf-lora", "mlx", "vllm", "sglang", "peft"])
def test_an_adapter_for_another_program(model, adapter, tmp_path, capsys, to):
    """What was written holds the adapter, and the last line says how it is run."""
    out = tmp_path / ("a.gguf" if to == "gguf-lora" else "a")
    more = ["--type", "f32"] if to == "gguf-lora" else []
    assert main(["export", str(model), str(adapter), str(out), "--to", to, *more]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert str(out) in last
    begins = {"gguf-lora": "llama-server ", "mlx": "mlx_lm.generate ", "vllm": "vllm serve "}
    begins |= {"sglang": "python -m sglang.launch_server ", "peft": ""}
    assert last.startswith(begins[to])
    again = lk.load_adapter(lk.load_model(model, dtype="float32"), out)
    model_with_it = lk.load_adapter(lk.load_model(model, dtype="float32"), adapter)
    ids = torch.arange(20)[None]
    assert (again(ids) - model_with_it(ids)).abs().max() <= 1e-5  # B may be rounded once


def test_a_directory_for_ollama(model, adapter, tmp_path, capsys):
    command = ["export", str(model), str(adapter), str(tmp_path), "--to", "ollama"]
    command += ["--type", "q8_0", "--name", "Mine", "--system", "Be brief.", "--unmerged"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("\nollama run mine\n")
    names = {"Mine-Q8_0.gguf", "Mine-lora-F16.gguf", "Modelfile", "template", "system", "params"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert 'SYSTEM """Be brief."""' in (tmp_path / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "mlx"], "--to mlx writes an adapter: name it between the model and"),
        (["--to", "ollama", "--unmerged"], "--unmerged writes an adapter: name it between"),
        (["--to", "vllm", "--type", "q8_0"], "--type is for --to gguf and gguf-lora and ollama,"),
        (["--system", "x"], "--system is for --to ollama, not gguf"),
        (["--to", "ollama", "--type", "f32,q8_0"], "writes one --type at a time"),
    ],
)
def test_options_that_do_not_go_together(model, tmp_path, capsys, options, said):
    assert main(["export", str(model), str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_two_types(model, adapter, tmp_path, capsys):
    command = ["export", str(model), str(adapter), str(tmp_path / "a.gguf"), "--to", "gguf-lora"]
    assert main([*command, "--type", "q8_0"]) == 1
    assert "an adapter's --type is f16 or f32" in capsys.readouterr().err


def test_its_types_are_those_of_the_library():
    from lorakit.cli.export import TYPES
    from lorakit.models.gguf_mix import FILE_TYPES

    assert set(TYPES) == set(FILE_TYPES)
