"""PEFT's names over lorakit's functions: a script that uses PEFT changes one import."""

from lorakit.compat.peft.peft_model import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

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
