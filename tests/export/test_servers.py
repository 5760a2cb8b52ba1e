"""Adapters for vLLM and SGLang: plain LoRA of which PEFT computes the same, and the command."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorakit as lk
from tests.export.models import name_base, train_adapter, write_model

IDS = torch.arange(4, 24)[None]
FANCY = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("servers") / "model", "llama")


@pytest.mark.parametrize("server", ["vllm", "sglang", "peft"])
def test_peft_computes_the_same_with_one_rank_and_one_alpha(model, tmp_path, server):
    adapted = train_adapter(model, tmp_path / "adapter", **FANCY)
    name_base(tmp_path / "adapter", "someone/base")
    served = lk.export_for_server(tmp_path / "adapter", tmp_path / "plain", server=server)
    values = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert values["r"] == 9
    assert not values["use_rslora"]
    assert values.keys().isdisjoint({"rank_pattern", "alpha_pattern", "modules_to_save"})
    assert all("." not in name for name in values["target_modules"])
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "plain").eval()
    with torch.no_grad():
        gap = (theirs(IDS).logits - adapted(IDS)).abs().max()
    assert gap <= 1e-4  # two fp32 implementations, and one rounding of B
    place = f"plain={tmp_path / 'plain'}"
    assert (
        served.command
        == {
            "vllm": "vllm serve someone/base --enable-lora --max-lora-rank 16 "
            f"--lora-modules {place}",
            "sglang": "python -m sglang.launch_server --model-path someone/base --enable-lora "
            f"--lora-paths {place}",
            "peft": None,
        }[server]
    )
    assert str(served).endswith(served.command or str(served.report))


def test_sglang_has_endings_where_peft_has_whole_names(model, tmp_path):
    """An adapter of one layer only: SGLang sees from the tensors which one it is."""
    train_adapter(model, tmp_path / "adapter", layers_to_transform=[1], target_modules=["q_proj"])
    named = {}
    for server in ("vllm", "sglang"):
        lk.export_for_server(tmp_path / "adapter", tmp_path / server, server=server)
        values = json.loads((tmp_path / server / "adapter_config.json").read_text())
        named[server] = values["target_modules"]
    assert named == {"vllm": ["model.layers.1.self_attn.q_proj"], "sglang": ["q_proj"]}
    files = [tmp_path / each / "adapter_model.safetensors" for each in named]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("r", "flag"), [(1, 1), (2, 8), (17, 32), (300, 320)])
def test_the_rank_of_vllm_is_one_that_it_has(model, tmp_path, r, flag):
    train_adapter(model, tmp_path / "adapter", r=r, target_modules=["q_proj"])
    served = lk.export_for_server(tmp_path / "adapter", tmp_path / "my adapter")
    assert f"vllm serve BASE --enable-lora --max-lora-rank {flag} --lora-modules" in served.command
    assert served.command.endswith(f"'my adapter={tmp_path / 'my adapter'}'")


def test_what_a_server_cannot_hold_is_to_be_merged(model, tmp_path):
    train_adapter(model, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(lk.LorakitError, match="modules_to_save.*merge it into the model"):
        lk.export_for_server(tmp_path / "saved", tmp_path / "out")
    train_adapter(model, tmp_path / "large", r=513, target_modules=["q_proj"])
    with pytest.raises(lk.LorakitError, match="rank 513 is more than vLLM's largest, 512: merge"):
        lk.export_for_server(tmp_path / "large", tmp_path / "out")
    tied = write_model(tmp_path / "tied", "llama tied")
    train_adapter(tied, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(lk.LorakitError, match="one weight, which servers cannot change for one"):
        lk.export_for_server(tmp_path / "head", tmp_path / "out", base_model=tied)
    with pytest.raises(lk.LorakitError, match="server must be vllm, sglang or peft, not 'tgi'"):
        lk.export_for_server(tmp_path / "head", tmp_path / "out", server="tgi")
    assert not (tmp_path / "out").exists()
    train_adapter(model, tmp_path / "own", target_modules=["lm_head", "q_proj"])
    served = lk.export_for_server(tmp_path / "own", tmp_path / "out", server="sglang")
    assert "lm_head is adapted, which servers support for some models only" in str(served)
