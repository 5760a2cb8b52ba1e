"""What settings of TRL, transformers and Axolotl say in lorakit's words, where a name is not all.

A conversion takes the value of a name, the whole file and the list of notes, to which it may add.
It returns what the value means in lorakit's names. Errors are ValueErrors without the name of the
setting, which the caller puts in front (aliases.py).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.config.data import source_of

File = Mapping[Any, Any]  # the mapping of a run file
Meaning = dict[str, Any]  # lorakit's names -> values
Notes = list[str]  # lines for the user
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
