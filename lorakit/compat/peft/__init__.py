"""PEFT's names over lorakit's functions: a script that uses PEFT changes one import.

    from lorakit.compat.peft import LoraConfig, get_peft_model, PeftModel

Each name does what it does in PEFT, on a model of transformers and on lorakit's decoder. Nothing
here computes: `lk.attach` and the functions beside it decide what an adapter is, and what is
refused. docs/migration.md shows both libraries side by side, and says where they differ.

    configs.py        LoraConfig with all of PEFT's fields, TaskType
    peft_model.py     PeftModel, get_peft_model
    lora_model.py     LoraModel, which stands between a PeftModel and the model
    state_dict.py     the tensors of an adapter by the keys of its file
    preparation.py    prepare_model_for_kbit_training
    selection.py      which adapter computes and which one trains, step by step as in PEFT
"""

from lorakit.compat.peft.configs import LoraConfig, PeftConfig, TaskType
from lorakit.compat.peft.lora_model import LoraModel
from lorakit.compat.peft.peft_model import PeftModel, PeftModelForCausalLM, get_peft_model
from lorakit.compat.peft.preparation import prepare_model_for_kbit_training
from lorakit.compat.peft.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "LoraConfig",
    "LoraModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
