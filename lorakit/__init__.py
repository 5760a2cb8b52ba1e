"""lorakit: fine-tune language models with LoRA and QLoRA. The names below are the whole public API.

They are imported on first use, so that `import lorakit` costs nothing beside `import torch`.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AdaLoraConfig": "adalora",
    "Drift": "merging",
    "IA3Config": "ia3",
    "LoraConfig": "config",
    "LorakitError": "config",
    "ModelConfig": "model_config",
    "PrefixTuningConfig": "prompts",
    "PromptEncoderConfig": "prompts",
    "PromptTuningConfig": "prompts",
    "QuantConfig": "config",
    "RunConfig": "config",
    "TrainConfig": "config",
    "VeraConfig": "vera",
    "adapter_names": "attached",
    "adapter_rows": "attached",
    "allocate": "adalora",
    "attach": "attaching",
    "collate_packed": "packing",
    "combine_adapters": "combination",
    "convert_adapter": "conversion",
    "delete_adapter": "attached",
    "describe_adapter": "adapter_files",
    "detach": "attached",
    "disable_adapters": "attached",
    "dpo_loss": "preference",
    "encode_rows": "data",
    "eva": "eva_initialization",
    "evaluate": "evaluation",
    "generate": "generation",
    "generate_batch": "generation",
    "lint_rows": "inspection",
    "load_adapter": "adapter_loading",
    "load_model": "checkpoint",
    "load_tokenizer": "tokenizer",
    "loftq": "loftq_initialization",
    "merge": "merging",
    "merge_and_unload": "merging",
    "orpo_loss": "preference",
    "orthogonality": "adalora",
    "pack": "packing",
    "padding_share": "packing",
    "pair_losses": "preference",
    "plot_runs": "plots",
    "profile_training": "profiling",
    "quantize": "quantization",
    "quantize_report": "report",
    "read_rows": "rows",
    "rouge_l": "metrics",
    "save_adapter": "adapter",
    "save_model": "checkpoint",
    "set_adapter": "attached",
    "show_rows": "inspection",
    "split": "rows",
    "train": "trainer",
    "tune_allocator": "memory",
    "unmerge": "merging",
}
_MODULES = ("kernels", "memory", "metrics", "optim")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
