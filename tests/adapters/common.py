"""What tests of adapters share."""

import torch
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
