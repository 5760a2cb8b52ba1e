"""Fine-tune language models with LoRA and QLoRA.

The names below are the whole public API. Each is imported when it is first used, so `import
lorakit` itself costs almost nothing. `__init__.pyi` tells type checkers and editors the same names.
"""

import importlib
import warnings

__version__ = "0.1.0"

# public name -> the module of lorakit that defines it
_HOME = {
    "AdaLoraConfig": "adapters.methods.adalora",
    "Ballot": "comparison.votes",
    "BertScore": "evaluation.bertscore",
    "BlindPair": "comparison.votes",
    "Card": "training.memory_plan.cards",
    "Classifier": "models.classifier",
    "ClassifierConfig": "config.classifier",
    "Comparison": "evaluation.intervals",
    "ComparedRun": "comparison.compare",
    "ComparisonConfig": "config.comparison",
    "ComparisonResult": "comparison.compare",
    "Completion": "evaluation.completions",
    "DataConfig": "config.data",
    "DistillationConfig": "config.distillation",
    "Drift": "adapters.merge",
    "Engine": "inference.engine",
    "Event": "inference.request",
    "ExportCheck": "export.check",
    "GgufFile": "export.gguf",
    "GrpoConfig": "config.grpo",
    "IA3Config": "adapters.methods.ia3",
    "Importance": "export.importance",
    "Interval": "evaluation.intervals",
    "Judgement": "evaluation.judge",
    "LoraConfig": "config.adapters",
    "LorakitError": "config.errors",
    "Mended": "data.mend",
    "ManyConfig": "config.many",
    "MemoryPlan": "training.memory_plan.plan",
    "MissConfig": "adapters.methods.miss",
    "MlxAdapter": "export.mlx",
    "ModelConfig": "models.config",
    "OllamaFiles": "export.ollama",
    "PlannedRun": "training.memory_plan.planned",
    "PrefixTuningConfig": "adapters.methods.prompts",
    "Prediction": "evaluation.predict",
    "PromptEncoderConfig": "adapters.methods.prompts",
    "PromptTuningConfig": "adapters.methods.prompts",
    "QuantConfig": "config.quantization",
    "Reference": "training.losses.reference",
    "Request": "inference.request",
    "RewardConfig": "config.grpo",
    "RunConfig": "config.run",
    "Sampling": "inference.sampling",
    "Saving": "training.memory_plan.search",
    "ServedAdapter": "export.servers",
    "Session": "training.session",
    "Share": "comparison.votes",
    "SourceConfig": "config.data",
    "TaskConfig": "config.comparison",
    "TextEncoder": "evaluation.encoder",
    "TrainConfig": "config.training",
    "VeraConfig": "adapters.methods.vera",
    "adalora_allocate": "adapters.methods.adalora",
    "adalora_orthogonality": "adapters.methods.adalora",
    "adapter_names": "adapters.manage",
    "adapter_rows": "adapters.manage",
    "add_tokens": "adapters.new_tokens",
    "attach": "adapters.attach",
    "balance_rows": "data.mend",
    "bert_score": "evaluation.bertscore",
    "bootstrap_interval": "evaluation.intervals",
    "check_export": "export.check",
    "check_many": "training.many.train",
    "check_many_memory": "training.many.memory",
    "check_memory": "training.memory_plan.before",
    "check_outputs": "training.train",
    "check_run": "training.memory_plan.before",
    "classification_loss": "training.losses.classification",
    "classifier_of": "config.classifier",
    "collate_packed": "data.packing",
    "combine_adapters": "adapters.combine",
    "compare_models": "comparison.compare",
    "compare_predictions": "evaluation.intervals",
    "complete_rows": "evaluation.completions",
    "convert_adapter": "adapters.peft_files.convert",
    "cpo_loss": "training.losses.preference",
    "dedup_rows": "data.mend",
    "delete_adapter": "adapters.manage",
    "describe_adapter": "adapters.peft_files.inspect",
    "detach": "adapters.manage",
    "disable_adapters": "adapters.manage",
    "distillation_loss": "training.losses.distillation",
    "dpo_loss": "training.losses.preference",
    "encode_rows": "data.examples",
    "eva": "adapters.eva",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation.tasks",
    "export_for_server": "export.servers",
    "export_gguf": "export.gguf",
    "export_gguf_adapter": "export.gguf_adapter",
    "export_mlx": "export.mlx",
    "export_ollama": "export.ollama",
    "fetch_adapter": "files.hub",
    "find_card": "training.memory_plan.cards",
    "forecast_savings": "training.memory_plan.search",
    "generate": "inference.generate",
    "generate_batch": "inference.generate",
    "import_mlx": "export.mlx",
    "grpo_loss": "training.losses.grpo",
    "head_of_run": "training.head",
    "importance": "export.importance",
    "largest_that_fits": "training.memory_plan.search",
    "judge_answers": "evaluation.judge",
    "kto_loss": "training.losses.unpaired",
    "lint_rows": "data.lint",
    "load_adapter": "adapters.peft_files.load",
    "load_encoder": "evaluation.encoder",
    "load_importance": "export.importance",
    "load_model": "models.load",
    "load_teacher": "training.teaching",
    "load_tokenizer": "models.tokenizer_files",
    "loftq": "adapters.loftq",
    "merge": "adapters.merge",
    "merge_and_unload": "adapters.merge",
    "mesh_of_run": "training.division",
    "open_data": "data.sources",
    "orpo_loss": "training.losses.preference",
    "own_threads": "training.cores",
    "pack_rows": "data.packing",
    "padding_share": "data.packing",
    "pair_losses": "training.losses.preference",
    "parse_yaml": "files.yaml_text",
    "plan_comparison": "comparison.compare",
    "plan_memory": "training.memory_plan.plan",
    "plan_table": "training.memory_plan.table",
    "plot_runs": "board.plots",
    "profile_training": "training.profile",
    "predict": "evaluation.predict",
    "push_to_hub": "export.push",
    "quantize": "models.packed_layers",
    "quantize_report": "evaluation.quantization_report",
    "read_classifier": "adapters.peft_files.labels",
    "read_comparison": "comparison.compare",
    "read_completions": "evaluation.completions",
    "read_rows": "data.rows",
    "resize_embeddings": "models.resize",
    "reward_loss": "training.losses.classification",
    "rouge_l": "evaluation.metrics",
    "sample_rows": "data.mend",
    "save_adapter": "adapters.peft_files.save",
    "save_model": "models.save",
    "save_teacher_logits": "training.losses.teacher",
    "serve": "serving.serve",
    "serve_board": "board.serve",
    "set_adapter": "adapters.manage",
    "settled_run": "training.memory_plan.search",
    "settings_that_fit": "training.memory_plan.search",
    "shard": "models.sharding",
    "show_rows": "data.inspect",
    "simpo_loss": "training.losses.preference",
    "split_rows": "data.splitting",
    "top_k_distillation_loss": "training.losses.distillation",
    "train": "training.train",
    "train_many": "training.many.train",
    "tune_allocator": "training.memory",
    "unmerge": "adapters.merge",
    "write_card": "export.card",
    "write_rows": "data.write",
    "write_completions": "evaluation.completions",
    "write_report": "board.report",
}
# public name of a module -> the module
_MODULES = {
    "kernels": "kernels",
    "memory": "training.memory",
    "metrics": "evaluation.metrics",
    "optim": "training.optim",
}
# old name -> new name; lorakit 0.2 drops the old names
_RENAMED = {
    "allocate": "adalora_allocate",
    "orthogonality": "adalora_orthogonality",
    "pack": "pack_rows",
    "split": "split_rows",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> object:
    """Import and return a public name that is used for the first time."""
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(
            f"lorakit.{name} is now lorakit.{new}; the old name leaves with lorakit 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__(new)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
