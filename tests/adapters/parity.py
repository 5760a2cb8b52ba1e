"""How adapters are compared with PEFT's, on tiny models of several families."""

import os
import warnings

import torch

import lorakit as lk
from lorakit.adapters.manage import attached

IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))

BASES = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "gemma3": ("gemma3_text", {"head_dim": 12, "sliding_window": 6}),
    "gemma3 tied": (
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
}


def ours_config(options):
    return lk.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


def peft_attach(theirs, options):
    import peft

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(theirs, config).eval()


def peft_load(theirs, path, **options):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(theirs, path, **options).eval()


def peft_save(theirs, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(path, **options)


def disturb(parameters):
    """So that every one of them, by name, matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter += 0.1 * torch.randn(parameter.shape)


def trained(module, name="default"):
    """The parameters of adapter `name`, by their names in peft's file."""
    return {
        f"base_model.model.{place}.{ending}": parameter
        for place, each in attached(module).items()
        if name in each.adapters
        for ending, parameter in each.trained_tensors(name).items()
    }


def logits_of(module, ids=IDS):
    with torch.no_grad():
        found = module(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same(found, expected):
    """1e-5 of the largest: the same formulas in fp32, sums in another order. Kernels that were told
    to do without vectors sum one by one, in the least exact order.
    """
    difference = (found - expected).abs().max() / expected.abs().max()
    limit = 2e-5 if os.environ.get("LORAKIT_ISA") == "scalar" else 1e-5
    assert difference <= limit, f"{difference:.1e}"
