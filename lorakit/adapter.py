"""LoRA adapters on disk, in PEFT's format, both ways.

    adapter_config.json          the LoraConfig, with the fields that every PEFT version reads
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [r, in] and .lora_B.weight
    [out, r], fp32

`target_modules` is written as the full names of the adapted layers, so that reading does not depend
on what "all-linear" means elsewhere.
"""

import json
from pathlib import Path

import torch
from torch import nn

from .config import LoraConfig, LorakitError, from_mapping
from .files import read_json, write_json
from .lora import attach, detach, lora_layers
from .tensors import open_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# PEFT features that change the computation and that lorakit does not have: value when unused
UNSUPPORTED = {
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "layers_to_transform": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}
# initializations that leave the base weights alone; PiSSA and its like change them, also on loading
PLAIN_INITS = (None, True, False, "gaussian", "eva")


def save_adapter(module: nn.Module, path: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapter attached to `module` into directory `path`, which is made if missing.

    `base_model` is recorded as base_model_name_or_path. The weights are written before the config,
    and each file whole or not at all. Raises LorakitError if no adapter is attached.
    """
    layers = lora_layers(module)
    if not layers:
        raise LorakitError("save_adapter: no adapter is attached")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.float()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.float()
    config = next(iter(layers.values())).config
    values = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": sorted(layers),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_json(path / CONFIG_FILE, values)


def load_adapter(module: nn.Module, path: str | Path) -> nn.Module:
    """Attach the PEFT adapter in directory `path` to `module`, in place; returns `module`.

    Raises LorakitError, and leaves `module` without an adapter, for a missing or truncated file, a
    PEFT feature that lorakit does not have, or tensors that are missing, unknown or of another
    shape.
    """
    path = Path(path).expanduser()
    values = read_json(path / CONFIG_FILE)
    if values.get("peft_type") != "LORA":
        raise LorakitError(
            f"{path}: peft_type is {values.get('peft_type')!r}; only 'LORA' is supported"
        )
    for name, unused in UNSUPPORTED.items():
        if values.get(name) not in (None, unused, []):
            raise LorakitError(f"{path}: {name}={json.dumps(values[name])} is not supported")
    if values.get("init_lora_weights") not in PLAIN_INITS:
        raise LorakitError(
            f"{path}: init_lora_weights={json.dumps(values['init_lora_weights'])} changes the base "
            "weights; convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_"
            "conversion)"
        )
    config = from_mapping(LoraConfig, values, str(path / CONFIG_FILE), ignore_unknown=True)
    tensors = open_safetensors(path / WEIGHTS_FILE)
    trainable = {p: p.requires_grad for p in module.parameters()}
    attach(module, config)
    try:
        expected = {}
        for name, layer in lora_layers(module).items():
            expected[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
            expected[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        _check_tensors(path, tensors, expected)
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(tensors[name].read())
    except BaseException:
        detach(module)
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
        raise
    return module


def _check_tensors(path, tensors, expected) -> None:
    for name in expected:
        if name not in tensors:
            raise LorakitError(f"{path}: tensor {name} is missing")
    for name, tensor in tensors.items():
        if name not in expected:
            raise LorakitError(f"{path}: tensor {name} belongs to no adapted layer of this model")
        if tensor.shape != tuple(expected[name].shape):
            raise LorakitError(
                f"{path}: tensor {name} is {tensor.shape}, "
                f"the model needs {tuple(expected[name].shape)}"
            )
