"""Names that run files of TRL, transformers and Axolotl give to lorakit's settings.

Every foreign name stands in one of the tables below, which docs/run-file.md prints:

    RENAMED    the name means a setting of lorakit; a.b is a field of a mapping
    CONVERTED  the value, too, says something in other words
    SETTLED    the values listed ask for what lorakit does in any case; others are refused
    IGNORED    the name changes nothing in what is learned; one line says so
    REFUSED    lorakit cannot do what the name asks for

VALUES holds other spellings of values. A foreign name whose value is null says nothing, as in
Axolotl's templates, except for the names in NULL_SAYS. Errors are ValueErrors without the name of
the file, which the caller puts in front (RunConfig.from_dict in run.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from lorakit.config.data import source_of
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

File = Mapping[Any, Any]  # the mapping of a run file
Meaning = dict[str, Any]  # lorakit's names -> values
Notes = list[str]  # lines for the user


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


# ---- conversions ----
# A conversion takes the value of a name, the whole file and the list of notes, to which it may add.
# It returns what the value means in lorakit's names.

Conversion = Callable[[Any, File, Notes], Meaning]


def _switch(target: str, meant: Any) -> Conversion:
    """Return a conversion in which true sets `target` to `meant`, and false says nothing."""

    def convert(value: Any, values: File, notes: Notes) -> Meaning:
        return {target: meant} if _true(value) else {}

    return convert


def _true(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"it must be true or false, not {value!r}")
    return value


def _bf16(value: Any, values: File, notes: Notes) -> Meaning:
    if value in ("auto", "full"):
        return {"dtype": "bfloat16"}
    return {"dtype": "bfloat16" if _true(value) else "float32"}


def _load_in_4bit(value: Any, values: File, notes: Notes) -> Meaning:
    if not _true(value) or values.get("bnb_4bit_quant_type") is not None:
        return {}
    return {"quantize.quant_type": "nf4"}


def _of_4bit(target: str) -> Conversion:
    """Return a conversion of a setting that counts in bitsandbytes only beside load_in_4bit."""

    def convert(value: Any, values: File, notes: Notes) -> Meaning:
        if values.get("load_in_4bit") is not True:
            raise ValueError("it says how load_in_4bit packs: set that to true, or take it out")
        return {target: value}

    return convert


def _adapter(value: Any, values: File, notes: Notes) -> Meaning:
    """Convert Axolotl's name of a method. Any other text is a directory, as lorakit means it.

    Null trains all weights in Axolotl. It means that only in a file that is surely Axolotl's.
    """
    if value is None and values.get("base_model") is not None:
        notes.append("adapter: null is taken as train: full")
        return {"train": "full"}
    if value is None:
        raise ValueError(
            "null asks Axolotl to train all weights: say train: full for that, or take it out"
        )
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"choose lora or qlora, or name the directory of an adapter, not {value!r}; without "
            "this key a new one starts"
        )
    if value not in ("lora", "qlora"):
        return {"adapter": value}
    if value == "lora" or values.get("load_in_4bit") is True:
        return {}
    if values.get("load_in_4bit") is not None:
        raise ValueError("qlora needs load_in_4bit: true")
    return {"quantize.quant_type": "nf4"}


def _use_peft(value: Any, values: File, notes: Notes) -> Meaning:
    return {} if _true(value) else {"train": "full"}


def _unfrozen(value: Any, values: File, notes: Notes) -> Meaning:
    """Convert Axolotl's patterns of the weights that train, which begin where a name does."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("give a list of patterns")
    if any(re.search(r"\[\d*:\d*\]", each) for each in value):
        raise ValueError("rows of a weight, as in [0:100], cannot be trained alone")
    return {"freeze": [f"^(?!{'|'.join(f'(?:{each})' for each in value)})"] if value else []}


def _lora_model_dir(value: Any, values: File, notes: Notes) -> Meaning:
    return {"adapter": value}


def _datasets(target: str) -> Conversion:
    """Return a conversion of a list of entries with paths, the sources of `target`."""

    def convert(value: Any, values: File, notes: Notes) -> Meaning:
        fine = isinstance(value, list) and value and all(isinstance(e, Mapping) for e in value)
        if not fine:
            raise ValueError("a list of entries with a path is wanted")
        sources = [source_of(entry, notes) for entry in value]
        alone = len(sources) == 1 and set(sources[0]) == {"path"}
        return {target: sources[0]["path"] if alone else sources}

    return convert


def _text_field(value: Any, values: File, notes: Notes) -> Meaning:
    return {} if value == "text" else {"data.columns": {"text": value}}


def _completion_only(value: Any, values: File, notes: Notes) -> Meaning:
    return {"train_on": "completion" if _true(value) else "all"}


def _packing_strategy(value: Any, values: File, notes: Notes) -> Meaning:
    """Convert TRL's strategy, which also says whether a row that is too long is cut in several."""
    if value not in ("bfd", "bfd_split"):
        raise ValueError(f"choose bfd or bfd_split, not {value!r}: a row holds whole documents")
    return {"over_length": "split"} if value == "bfd_split" else {}


def _train_on_inputs(value: Any, values: File, notes: Notes) -> Meaning:
    if _true(value):
        return {"train_on": "all"}
    if values.get("train_on") == "all":
        raise ValueError("it is false, and train_on is all: keep one of them")
    return {}


def _assistant_only(value: Any, values: File, notes: Notes) -> Meaning:
    """Convert TRL's setting, which speaks of chats alone; train_on speaks of all rows."""
    if _true(value):
        return {"train_on": "completion"}
    decided = ("train_on", "completion_only_loss", "train_on_inputs")
    if all(values.get(name) is None for name in decided):
        raise ValueError(
            "false learns every token of a chat, but of a prompt with its completion only the "
            "completion: say which, with train_on: all or train_on: completion"
        )
    return {}


def _target_linear(value: Any, values: File, notes: Notes) -> Meaning:
    if _true(value):
        return {"lora.target_modules": "all-linear"}
    lora = values.get("lora")
    named = isinstance(lora, Mapping) and lora.get("target_modules") is not None
    if not named and values.get("lora_target_modules") is None:
        raise ValueError("it is false: name the layers to adapt, as lora_target_modules")
    return {}


def _strategy(steps: str) -> Conversion:
    """Return a conversion of "no" or "steps", which must agree with the setting `steps`."""

    def convert(value: Any, values: File, notes: Notes) -> Meaning:
        value = "no" if value is False else value  # YAML reads a bare no as false
        if value not in ("no", "steps"):
            raise ValueError(f"give {steps} instead of {value!r}")
        if (value == "steps") != (values.get(steps) is not None):
            given = "is missing" if value == "steps" else "is given too"
            raise ValueError(f"it is {value!r}, and {steps} {given}")
        return {}

    return convert


def _resume(value: Any, values: File, notes: Notes) -> Meaning:
    if isinstance(value, bool):
        return {"resume": "auto"} if value else {}
    return {"resume": value}


def _special_tokens(value: Any, values: File, notes: Notes) -> Meaning:
    """Pass over Axolotl's tokens for padding and for what is unknown, and refuse the others."""
    if not isinstance(value, Mapping):
        raise ValueError("give a mapping of names to tokens")
    given = [name for name, token in value.items() if token is not None]
    for name in given:
        if name not in ("pad_token", "unk_token"):
            raise ValueError(
                f"{name} is the tokenizer's own: write it into the tokenizer_config.json beside "
                "the model; new tokens go into add_tokens"
            )
    if given:
        notes.append("special_tokens is ignored: no row learns padding, whatever its token is")
    return {}


def _jinja(value: Any, values: File, notes: Notes) -> Meaning:
    """Convert Axolotl's template, a text or a file, which counts only beside chat_template: jinja.

    `own_names` has taken that word out.
    """
    if values.get("chat_template") not in ("jinja", None):
        raise ValueError("it counts only with chat_template: jinja: keep one of them")
    return {"chat_template": value}


CONVERTED: dict[str, Conversion] = {
    "chat_template_jinja": _jinja,
    "special_tokens": _special_tokens,
    "bf16": _bf16,
    "load_in_4bit": _load_in_4bit,
    "load_in_8bit": _switch("quantize.quant_type", "int8"),
    "bnb_4bit_quant_type": _of_4bit("quantize.quant_type"),
    "use_bnb_nested_quant": _of_4bit("quantize.double_quant"),
    "bnb_4bit_use_double_quant": _of_4bit("quantize.double_quant"),
    "adapter": _adapter,
    "use_peft": _use_peft,
    "unfrozen_parameters": _unfrozen,
    "lora_model_dir": _lora_model_dir,
    "lora_target_linear": _target_linear,
    "packing_strategy": _packing_strategy,
    "train_on_inputs": _train_on_inputs,
    "completion_only_loss": _completion_only,
    "assistant_only_loss": _assistant_only,
    "dataset_text_field": _text_field,
    "datasets": _datasets("data.train"),
    "test_datasets": _datasets("data.validation"),
    "save_strategy": _strategy("save_steps"),
    "eval_strategy": _strategy("eval_steps"),
    "evaluation_strategy": _strategy("eval_steps"),
    "resume_from_checkpoint": _resume,
    "auto_resume_from_checkpoints": _switch("resume", "auto"),
}

# Null asks for something here: to train all weights, and to cut off no row, which is refused.
# `adapter` is a setting of lorakit too, a directory; Axolotl's is the name of a method.
NULL_SAYS = ("adapter", "max_length")
ALIASES = {*RENAMED, *CONVERTED, *SETTLED, *IGNORED, *REFUSED}
