"""lorakit: fine-tune language models with LoRA and QLoRA. The names below are the whole public API.

They are imported on first use, so that `import lorakit` costs nothing beside `import torch`.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AdaLoraConfig": "adapters.methods.adalora",
    "Drift": "adapters.merge",
    "IA3Config": "adapters.methods.ia3",
    "LoraConfig": "config.adapters",
    "LorakitError": "config.errors",
    "ModelConfig": "models.config",
    "PrefixTuningConfig": "adapters.methods.prompts",
    "PromptEncoderConfig": "adapters.methods.prompts",
    "PromptTuningConfig": "adapters.methods.prompts",
    "QuantConfig": "config.quantization",
    "RunConfig": "config.run",
    "TrainConfig": "config.training",
    "VeraConfig": "adapters.methods.vera",
    "adapter_names": "adapters.manage",
    "adapter_rows": "adapters.manage",
    "allocate": "adapters.methods.adalora",
    "attach": "adapters.attach",
    "collate_packed": "data.packing",
    "combine_adapters": "adapters.combine",
    "convert_adapter": "adapters.peft_files.convert",
    "delete_adapter": "adapters.manage",
    "describe_adapter": "adapters.peft_files.inspect",
    "detach": "adapters.manage",
    "disable_adapters": "adapters.manage",
    "dpo_loss": "training.losses.preference",
    "encode_rows": "data.encode",
    "eva": "adapters.eva",
    "evaluate": "training.evaluate",
    "generate": "inference.generate",
    "generate_batch": "inference.generate",
    "lint_rows": "data.inspect",
    "load_adapter": "adapters.peft_files.load",
    "load_model": "models.load",
    "load_tokenizer": "models.tokenizer_files",
    "loftq": "adapters.loftq",
    "merge": "adapters.merge",
    "merge_and_unload": "adapters.merge",
    "orpo_loss": "training.losses.preference",
    "orthogonality": "adapters.methods.adalora",
    "pack": "data.packing",
    "padding_share": "data.packing",
    "pair_losses": "training.losses.preference",
    "plot_runs": "evaluation.plots",
    "profile_training": "training.profile",
    "quantize": "models.packed_layers",
    "quantize_report": "evaluation.quantization_report",
    "read_rows": "data.rows",
    "rouge_l": "evaluation.metrics",
    "save_adapter": "adapters.peft_files.save",
    "save_model": "models.save",
    "set_adapter": "adapters.manage",
    "show_rows": "data.inspect",
    "split": "data.rows",
    "train": "training.train",
    "tune_allocator": "training.memory",
    "unmerge": "adapters.merge",
}
_MODULES = {
    "kernels": "kernels",
    "memory": "training.memory",
    "metrics": "evaluation.metrics",
    "optim": "training.optim",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
