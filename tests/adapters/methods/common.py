"""The methods that tests go through, and how they are compared with PEFT's."""

import torch

import lorakit as lk
from tests.adapters.common import hugging_face

IDS = torch.arange(3, 27).view(2, 12)

LAYERS = ["q_proj", "k_proj", "v_proj", "down_proj"]

METHODS = {
    "ia3": ("IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"target_modules": LAYERS, "r": 6}),
    "vera unsaved": (
        "VeraConfig",
        {"target_modules": LAYERS, "r": 6, "save_projection": False, "projection_prng_key": 7},
    ),
    "miss": ("MissConfig", {"target_modules": LAYERS, "r": 6}),
    "miss mini": (
        "MissConfig",
        {"target_modules": LAYERS, "r": 4, "init_weights": "mini", "mini_r": 8},
    ),
    "adalora": ("AdaLoraConfig", {"target_modules": LAYERS, "init_r": 4, "total_step": 9}),
}

LENGTH = {"num_virtual_tokens": 5}

PROMPTS = {
    "prompt": ("PromptTuningConfig", LENGTH),
    "p-tuning": ("PromptEncoderConfig", {**LENGTH, "encoder_hidden_size": 20}),
    "p-tuning lstm": (
        "PromptEncoderConfig",
        {**LENGTH, "encoder_hidden_size": 20, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", LENGTH),
    "prefix projected": (
        "PrefixTuningConfig",
        {**LENGTH, "prefix_projection": True, "encoder_hidden_size": 20},
    ),
}

EVERY = METHODS | PROMPTS


def ours(model, method):
    kind, fields = EVERY[method]
    torch.manual_seed(0)
    return shaken(lk.attach(model, getattr(lk, kind)(**fields)))


def theirs(tiny_dir, method):
    import peft

    kind, fields = EVERY[method]
    torch.manual_seed(0)
    config = getattr(peft, kind)(**fields, task_type="CAUSAL_LM")
    return peft.get_peft_model(hugging_face(tiny_dir), config).eval()


def shaken(model):
    """What trains, moved: most of it starts where nothing is changed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits_of(peft_model, ids):
    """peft returns those of the prompt's own positions too."""
    return peft_model(ids).logits[:, -ids.shape[1] :]


def assert_same(a, b):
    # fp32, and two orders of the same sums: 1e-5 of the largest logit
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
