"""Tell what lorakit does with each option of PEFT's LoraConfig.

PEFT has more options than lorakit, and each of its releases adds some. Every option stands in
exactly one of these tables:

    HONOURED         lorakit's LoraConfig has a field of this name
    FILES_ONLY       a file may use it; a new config says it in another way
    HARMLESS         changes nothing in what an adapter computes
    SPENT            tells how PEFT starts or trains an adapter, or spreads it over devices. A file
                     holds the result, so there the option is spent. A new config with it is
                     refused: lorakit would do something else than it says
    REFUSED          changes what an adapter computes, or how it learns, and lorakit lacks it

NOT_PLAIN names the options that lorakit honours and that plain LoRA cannot hold. SPENT_TENSORS
names the tensors of SPENT options that only training reads. An option counts as used unless it is
null, false, zero or empty, which are the defaults of all that are refused.

A test compares the tables with the options of the installed PEFT. A release with a new option fails
there until somebody decides what the option means here.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError

MERGE = "merge it into the model with PEFT, and serve that"

HONOURED = frozenset(field.name for field in dataclasses.fields(LoraConfig))

FILES_ONLY = {
    "target_parameters": "those of experts and weights are read; a new config names layers",
}

HARMLESS = {
    "auto_mapping": "it names the classes that PEFT wraps around the model",
    "base_model_name_or_path": "it names the model that the adapter was trained on",
    "inference_mode": "it freezes the adapter",
    "megatron_core": "it names a module that only megatron_config uses",
    "peft_type": "it names the method, which is read before the options are",
    "peft_version": "it names the version that wrote the file",
    "qalora_group_size": "only use_qalora uses it",
    "revision": "it names a version of the model that the adapter was trained on",
    "runtime_config": "it moves weights between devices while they are merged",
    "task_type": "it names what the model is for",
}

SPENT = {
    "corda_config": "settings of the initialization CorDA",
    "eva_config": "settings of PEFT's EVA; lorakit's EVA has its own",
    "loftq_config": "settings of PEFT's LoftQ; lorakit's LoftQ reads them from the quantized layer",
    "lora_ga_config": "settings of the initialization LoRA-GA",
    "megatron_config": "it spreads the layers over several devices",
    "monteclora_config": "MonteCLoRA adds noise to A in training; the result is plain LoRA",
    "velora_config": "VeLoRA keeps less for backward; the result is plain LoRA",
}

# The tensors in a file that an option of SPENT adds, by a part of their keys.
SPENT_TENSORS = {
    "monteclora_config": ".lora_monteclora_sampler.",
    "velora_config": ".lora_velora_embed",
}

# Each option with what it is, and with advice to the user.
REFUSED = {
    "alora_invocation_tokens": (
        "aLoRA, which tokens of the input switch on, and which no merge can hold: compute in PEFT"
    ),
    "arrow_config": "Arrow, which mixes several adapters by the input: take these, one by one",
    "kasa_config": f"KaSA, which takes a part out of the base's weights: {MERGE}",
    "layer_replication": f"it builds more layers out of copies of the base's: {MERGE}",
    "use_bdlora": f"BD-LoRA, whose A or B is a block-diagonal matrix: {MERGE}",
    "use_qalora": (
        "QALoRA, whose A reads sums over groups of inputs of GPTQ layers: compute in PEFT"
    ),
}

NOT_PLAIN = {"modules_to_save": MERGE, "trainable_token_indices": MERGE}


def check_new(values: Mapping[str, Any]) -> None:
    """Raise LorakitError if a new config of PEFT's kind uses an option that lorakit lacks."""
    for name in sorted([*FILES_ONLY, *SPENT, *REFUSED]):
        if values.get(name):
            raise LorakitError(f"LoraConfig: lorakit has no {name}")


def check_file(path: Path, values: Mapping[str, Any]) -> None:
    """Raise LorakitError if adapter_config.json uses an option that lorakit lacks."""
    for name, why in REFUSED.items():
        if values.get(name):
            raise LorakitError(
                f"{path}: {name}={json.dumps(values[name])} is not supported ({why})"
            )


def check_plain(path: Path, values: Mapping[str, Any]) -> None:
    """Raise LorakitError if adapter_config.json uses an option that plain LoRA cannot hold."""
    for name, advice in (NOT_PLAIN | REFUSED).items():
        if values.get(name):
            raise LorakitError(
                f"{path}: {name}={json.dumps(values[name])} does not fit in plain LoRA: {advice}"
            )
