"""Adapters that PEFT makes, for the tests of what reads them."""

import json
import math

import torch
from safetensors.torch import load_file

from tests.conftest import published, tiny

IDS = torch.arange(24).view(2, 12)
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = f"{PREFIX}model.layers.0.self_attn.q_proj"
# Two fp32 implementations of one adapted tiny model, which sum in another order.
LOGITS = 1e-4


def peft_adapter(base, path, **config):
    """A peft adapter of a transformers model with a random B (and DoRA magnitudes), saved."""
    import peft

    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": LEAVES, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    model.save_pretrained(path)
    return model


def peft_logits(base, path):
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(base, path).eval()(IDS).logits


def deltas(path):
    """s B A of every layer in fp64 by peft's rules, with |s| |B| |A|, which bounds its terms."""
    from peft.utils.other import get_pattern_key

    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    found = {}
    for key in [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]:
        name = key.removeprefix(PREFIX)
        ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
        r = ranks.get(get_pattern_key(ranks, name), config["r"])
        alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
        s = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
        assert a.shape[0] == r
        found[name] = s * b @ a, abs(s) * b.abs() @ a.abs()
    return found


MOE = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
SIZES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}


def moe_adapter(kind, path, parameters=("experts.gate_up_proj", "experts.down_proj"), **config):
    """A peft adapter of fused experts, and the weights' changes under their published names."""
    base = tiny(kind, **SIZES[kind])
    before = published({n: p.clone() for n, p in base.named_parameters()}, kind)
    base.save_pretrained(path / "base")
    config = {"target_modules": [], "target_parameters": list(parameters), **config}
    model = peft_adapter(base, path / "in", **config)
    with torch.no_grad():
        logits = model(IDS).logits
    after = published(dict(model.merge_and_unload().named_parameters()), kind)
    return logits, {n: (after[n] - before[n]).detach() for n in before if ".experts." in n}
