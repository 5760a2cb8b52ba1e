"""One model in both libraries: how they are called, and how close they must be."""

import torch

IDS = torch.arange(24).view(2, 12)
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
# fp32 sums of up to 48 terms in another order, through two layers
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def randomize(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def logits(model, *args, **options):
    found = model(*args, **options)
    return found if isinstance(found, torch.Tensor) else found.logits
