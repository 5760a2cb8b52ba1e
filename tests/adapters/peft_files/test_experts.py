"""Adapters of fused experts split into single ones and joined again, against peft."""

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.peft_files.experts import join_experts, split_experts
from tests.adapters.peft_files.adapters_of_peft import MOE, PREFIX, WEIGHTS, moe_adapter


@pytest.mark.parametrize("kind", MOE)
def test_split_experts_as_peft_computes_them(kind, tmp_path):
    _, truth = moe_adapter(kind, tmp_path, lora_alpha=8)
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    assert {".".join(name.split(".")[-4:-2]) for name in tensors} == {
        "mlp.experts",
        "experts.base_layer",
    }
    experts = 4 if kind == "mixtral" else 5
    split = split_experts(tensors, experts, MOE[kind])
    assert len(split) == 2 * len(truth)
    for name, delta in truth.items():
        key = PREFIX + name.removesuffix(".weight")
        ours = 2 * split[f"{key}.lora_B.weight"] @ split[f"{key}.lora_A.weight"]
        # the truth is a difference of fp32 weights, whose largest are some 1.5: 2^-24 of that
        assert (ours - delta).abs().max() <= 1e-6
        assert delta.abs().max() > 0.01
    # joined again: the same update from twice the rank, and that is taken apart again
    joined = join_experts(split, MOE[kind])
    assert joined.keys() == tensors.keys()
    for name in tensors:
        e_r = 2 if ".base_layer." in name else 1
        assert joined[name].numel() == e_r * tensors[name].numel()
        assert e_r == 2 or torch.equal(joined[name], tensors[name])
    again = split_experts(joined, experts, MOE[kind])
    assert again.keys() == split.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in split.items())


def test_peft_joins_experts_as_we_do(tmp_path):
    """What peft itself makes of single experts, saved again, is join_experts of them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    moe_adapter("mixtral", tmp_path)
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path / "out").save_pretrained(tmp_path / "joined")
    theirs = load_file(tmp_path / "joined" / WEIGHTS)
    ours = join_experts(load_file(tmp_path / "out" / WEIGHTS), MOE["mixtral"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_wrong_experts():
    a, b = torch.ones(8, 6), torch.ones(10, 8)
    key = "model.layers.0.mlp.experts"
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    with pytest.raises(lk.LorakitError, match="are not those of 3 experts"):
        split_experts(pair, 3)
    with pytest.raises(lk.LorakitError, match="experts must be a whole number from 1 on, not 0"):
        split_experts(pair, 0)
    with pytest.raises(lk.LorakitError, match="only one of lora_A and lora_B"):
        split_experts({f"{key}.lora_A.weight": a}, 2)
    with pytest.raises(lk.LorakitError, match="follows neither from its shape nor"):
        split_experts(pair, 2)
    split = split_experts({**pair, "other": a}, 2, target_parameters=["down_proj"])
    assert split.pop("other") is a
    assert f"{key}.1.down_proj.lora_B.weight" in split
    missing = split.pop(f"{key}.0.down_proj.lora_B.weight")
    with pytest.raises(lk.LorakitError, match="lora_B of expert 0's down_proj is missing"):
        join_experts(split)
    split[f"{key}.0.down_proj.lora_B.weight"] = missing[:, :2]
    with pytest.raises(lk.LorakitError, match=r"of expert 0's \(10, 2\)"):
        join_experts(split)
    halves = split_experts(pair, 2, target_parameters=["gate_up_proj"])
    with pytest.raises(lk.LorakitError, match="gate_proj and up_proj can only be joined together"):
        join_experts({name: t for name, t in halves.items() if "gate_proj" in name})
