"""`lorakit merge`: the merged model, and what it refuses."""

import pytest
import torch
import transformers

import lorakit as lk
from lorakit.cli.main import main
from tests.conftest import BESIDE


@pytest.fixture
def small_adapter(tiny_dir, tmp_path):
    """Save an adapter that changes what the model computes, and return its directory."""
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


def test_merge_into_no_directory(tiny_dir, small_adapter, tmp_path, capsys):
    """It is refused before anything is merged."""
    (tmp_path / "file").write_text("")
    assert main(["merge", str(tiny_dir), str(small_adapter), str(tmp_path / "file" / "out")]) == 1
    assert "cannot be made (Not a directory); choose another name" in capsys.readouterr().err


def test_files_that_contradict_new_tokens_do_not_go_along(copy, tmp_path, capsys):
    """llama.cpp's converter reads tokenizer.model first, which does not know the new token."""
    for name in ("tokenizer.model", "added_tokens.json", "preprocessor_config.json"):
        (copy / name).write_bytes(BESIDE[name])
    tok, model = lk.load_tokenizer(copy), lk.load_model(copy, dtype="float32")
    lk.attach(model, lk.add_tokens(model, tok, ["<new>"], lk.LoraConfig(r=2)))
    lk.save_adapter(model, tmp_path / "adapter")
    tok.save(tmp_path / "adapter")
    assert main(["merge", str(copy), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert "preprocessor_config.json" in names
    assert not {"tokenizer.model", "added_tokens.json"} & names
    ids = tok.encode("1 <new>")
    assert lk.load_tokenizer(tmp_path / "merged").encode("1 <new>") == ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs.encode("1 <new>") == ids
    assert (copy / "tokenizer.model").read_bytes() == BESIDE["tokenizer.model"]
