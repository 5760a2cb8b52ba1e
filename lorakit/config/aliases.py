"""Names that run files of TRL, transformers and Axolotl give to lorakit's settings.

Every foreign name stands in one of these tables, which docs/run-file.md prints:

    RENAMED    the name means a setting of lorakit; a.b is a field of a mapping
    CONVERTED  the value, too, says something in other words (conversions.py)
    SETTLED    the values listed ask for what lorakit does in any case; others are refused
    IGNORED    the name changes nothing in what is learned; one line says so
    REFUSED    lorakit cannot do what the name asks for

VALUES holds other spellings of values. A foreign name whose value is null says nothing, as in
Axolotl's templates, except for the names in NULL_SAYS. Errors are ValueErrors without the name of
the file, which the caller puts in front (RunConfig.from_dict in run.py).
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorakit.config.conversions import CONVERTED, File, Meaning, Notes
from lorakit.config.grpo import GrpoConfig

RENAMED = {
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset_name": "data.train",
    "torch_dtype": "dtype",
    "chat_template_path": "chat_template",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sequence_len": "max_seq_length",
    "max_length": "max_seq_length",
    "sample_packing": "packing",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "tokens": "add_tokens",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_exclude_modules": "lora.exclude_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_layers_to_transform": "lora.layers_to_transform",
    "lora_fan_in_fan_out": "lora.fan_in_fan_out",
    "use_rslora": "lora.use_rslora",
    "peft_use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "peft_use_dora": "lora.use_dora",
    "init_lora_weights": "lora.init_lora_weights",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "reward_funcs": "grpo.rewards",
}
_NO_ALIASES = ("rewards", "beta", "loss_type")  # the last two have a meaning beside grpo too
RENAMED |= {f.name: f"grpo.{f.name}" for f in fields(GrpoConfig) if f.name not in _NO_ALIASES}

VALUES: dict[str, dict[Any, Any]] = {
    "optim": {
        "adamw_torch_fused": "adamw_torch",
        "adamw_hf": "adamw_torch",
        "adamw_bnb_8bit": "adamw_8bit",
    },
    "report_to": {"none": None},
    "loss_type": {"chunked_nll": "nll"},
    "max_steps": {-1: None},
    "chat_template": {"tokenizer_default": None},
}

DEVICE = "lorakit trains on one device: take it out"
PER_EPOCH = "give the number of steps, as save_steps or eval_steps"
REFUSED = {
    "deepspeed": DEVICE,
    "fsdp": DEVICE,
    "fsdp_config": DEVICE,
    "reward_weights": "give each entry of rewards its weight",
    "saves_per_epoch": PER_EPOCH,
    "evals_per_epoch": PER_EPOCH,
}

# name -> the values that ask for what lorakit does in any case, and what to do about others
SETTLED: dict[str, tuple[list[Any], str]] = {
    "fp16": ([False], "gradients of a float16 model underflow: set bf16: true or dtype: float32"),
    "tf32": ([False], "lorakit leaves torch's precision of products alone: take it out"),
    "val_set_size": (
        [0],
        "lorakit splits no rows off: write those to evaluate on to a file and name it in data, "
        "as validation",
    ),
    "lora_task_type": (["CAUSAL_LM"], "lorakit trains causal language models only"),
    "importance_sampling_level": (["token"], "for the ratio of a sequence set loss_type: gspo"),
}

ATTENTION = "lorakit chooses the kernel of attention itself, with the same result"
TOKENIZER = "it is read from the model's directory"
EVALUATION = "evaluation takes per_device_train_batch_size rows at a time, with the same result"
OWN_KERNELS = "lorakit has kernels of its own"
IGNORED = {
    "logging_steps": "metrics.jsonl gets every step",
    "flash_attention": ATTENTION,
    "xformers_attention": ATTENTION,
    "sdp_attention": ATTENTION,
    "attn_implementation": ATTENTION,
    "gradient_checkpointing_kwargs": "there is one way to do it, with the same gradients",
    "per_device_eval_batch_size": EVALUATION,
    "eval_batch_size": EVALUATION,
    "eval_sample_packing": EVALUATION,
    "pad_to_sequence_len": "rows are padded to the longest of a batch",
    "dataset_prepared_path": "rows are read again for each run, which takes seconds",
    "dataloader_num_workers": "rows are read before training",
    "model_type": TOKENIZER,
    "tokenizer_type": TOKENIZER,
    "trust_remote_code": "lorakit runs no code of a model",
    "use_liger_kernel": OWN_KERNELS,
    "lora_mlp_kernel": OWN_KERNELS,
    "lora_qkv_kernel": OWN_KERNELS,
    "lora_o_kernel": OWN_KERNELS,
    "use_vllm": "the model in training samples, in the same process",
    "log_completions": "rollouts.jsonl gets every completion",
    "strict": "unknown keys are always errors",
}
WANDB = "report_to: wandb sends the numbers, where its own variables say, as WANDB_PROJECT"


def own_names(values: File) -> tuple[dict[Any, Any], Notes]:
    """Return a run file's mapping with lorakit's names alone, and what to tell the user.

    Raises:
        ValueError: A name asks for what lorakit cannot do, or two names set the same thing.
    """
    own = {name: value for name, value in values.items() if not is_alias(name)}
    if own.get("chat_template") == "jinja" and values.get("chat_template_jinja") is not None:
        del own["chat_template"]
    _open_mappings(own)
    notes: Notes = []
    said_by: dict[str, str] = {}  # a setting -> the alias that has set it
    for name in ("beta", "loss_type") if own.get("objective") == "grpo" else ():
        if own.get(name) is not None:
            _put(own, f"grpo.{name}", own.pop(name), name, said_by)
    for name, value in values.items():
        if is_alias(name) and (value is not None or name in NULL_SAYS):
            for target, meant in _meaning(name, value, values, notes).items():
                _put(own, target, meant, name, said_by)
    _respell_values(own, said_by, notes)
    _check_adapter(own, said_by)
    return own, notes


def _open_mappings(own: dict[Any, Any]) -> None:
    """Make mappings of a file name for data and a quant_type for quantize, and copy the others.

    Aliases then find a mapping to write to, and the caller's stays as it is.
    """
    for name, leaf in (("data", "train"), ("quantize", "quant_type")):
        if isinstance(own.get(name), (str, list)):
            own[name] = {leaf: own[name]}
    for name in ("data", "lora", "quantize", "grpo"):
        if isinstance(own.get(name), Mapping):
            own[name] = dict(own[name])


def _put(own: dict[Any, Any], target: str, value: Any, alias: str, said_by: dict[str, str]) -> None:
    """Set `target` to what its alias says, or raise ValueError if something has set it already."""
    parent, dot, leaf = target.rpartition(".")
    place = own.setdefault(parent, {}) if dot else own
    if not isinstance(place, dict) or leaf in place:
        other = said_by.get(target, target if isinstance(place, dict) else parent)
        raise ValueError(f"{alias} and {other} set the same thing: keep one of them")
    place[leaf], said_by[target] = value, alias


def _respell_values(own: dict[Any, Any], said_by: dict[str, str], notes: Notes) -> None:
    """Put lorakit's spelling of a value in the place of another library's."""
    for name, spellings in VALUES.items():
        value = own.get(name)
        if type(value) in (str, int) and value in spellings:
            own[name] = spellings[value]
            notes.append(f"{said_by.get(name, name)}: {value} is taken as {own[name]}")


def _check_adapter(own: dict[Any, Any], said_by: dict[str, str]) -> None:
    """Raise ValueError for settings of a new adapter beside the directory of another one."""
    lora = own.get("lora")
    if own.get("adapter") is None or not isinstance(lora, Mapping) or not lora:
        return
    names = [said_by.get(f"lora.{name}", f"lora.{name}") for name in lora]
    raise ValueError(
        f"{said_by.get('adapter', 'adapter')}: the adapter in {own['adapter']} has settings of its "
        f"own: take out {', '.join(names)}, or start a new adapter"
    )


def is_alias(name: Any) -> bool:
    """Say whether a key of a run file is another library's name for something."""
    return isinstance(name, str) and (name in ALIASES or name.startswith("wandb_"))


def _meaning(name: str, value: Any, values: File, notes: Notes) -> Meaning:
    """Return what an alias says in lorakit's names, or raise ValueError if lorakit cannot."""
    if name == "max_length" and value is None:
        raise ValueError("max_length: null cuts off no row: give the length of the longest one")
    if name in RENAMED:
        return {RENAMED[name]: value}
    if name in CONVERTED:
        try:
            return CONVERTED[name](value, values, notes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if name in REFUSED:
        raise ValueError(f"{name}: {REFUSED[name]}")
    if name in SETTLED:
        fine, otherwise = SETTLED[name]
        if value not in fine:
            raise ValueError(f"{name} is {value!r}: {otherwise}")
        return {}
    notes.append(f"{name} is ignored: {IGNORED.get(name, WANDB)}")
    return {}


# Null asks for something here: to train all weights, and to cut off no row, which is refused.
# `adapter` is a setting of lorakit too, a directory; Axolotl's is the name of a method.
NULL_SAYS = ("adapter", "max_length")
ALIASES = {*RENAMED, *CONVERTED, *SETTLED, *IGNORED, *REFUSED}
