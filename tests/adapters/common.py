"""What tests of adapters share."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers

IDS = torch.arange(24).view(2, 12)
SHORT_IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])

# fp32 sums of up to 32 products in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


CONFIG = lk.LoraConfig(r=4, lora_alpha=8)


def filled(module):
    """`module`, each trained value moved by noise, so that adapters change what is computed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def randomize(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_B.normal_(0, 0.1)
    return module


def chain(**options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return filled(lk.attach(module, lk.LoraConfig(r=2, **options)))


def hugging_face(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def edit_config(path, **change):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def edit_tensors(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def nested():
    """A module where `0` is the name of a layer, and the end of the name of another, `1.0`."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), inner)
