"""Open the files of an adapter, and give everything in them PEFT's names.

mlx_files.py and gguf_files.py do this for those that mlx_lm and llama.cpp wrote. In PEFT's files a
tensor's key may be longer than PEFT writes it. Each of these is read, and a line in the log says
so:

    ....lora_A.default.weight             the name of the adapter, as model.state_dict() has it
    base_model.model.base_model.model...  a PeftModel inside another
    module. _orig_mod. and others         a wrapper of the run that saved it (files/wrappers.py)

A key of LoRA without base_model.model. is read too. If the module itself has such names, as a
compiled module has, then they stay.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.peft_files.features import SPENT_TENSORS
from lorakit.adapters.peft_files.gguf_files import open_gguf
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, AdapterFiles, open_weights
from lorakit.adapters.peft_files.mlx_files import is_mlx, open_mlx
from lorakit.config.errors import LorakitError
from lorakit.files.hub import fetch_adapter
from lorakit.files.local import read_json
from lorakit.files.safetensors import LazyTensor
from lorakit.files.wrappers import is_wrapped, renamed, unwrapped, without_wrappers
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder

# What may stand before the adapter's name in a key of state_dict().
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_E|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|vera_lambda_[bd]|miss_block)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=$|\.(?:weight|bias)$)"
    r"|\.modules_to_save\.([^.]+)(?=\.)"
)
_BEGINNINGS = {"module.base_model.": "base_model.", PREFIX + PREFIX: PREFIX}
# The options of adapter_config.json that hold names of modules.
_NAMES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)


def open_files(
    path: str | Path, module: nn.Module | None = None, base: ModelConfig | None = None
) -> AdapterFiles:
    """Open the files of an adapter; the values of its tensors stay on disk.

    Args:
        path: The directory of the adapter, its .gguf file, or a Hub id.
        module: The module that the adapter is for, if there is one.
        base: The config of the model that it is for, if there is no module.

    Returns:
        The adapter's config and tensors, by the names that PEFT gives them.

    Raises:
        LorakitError: A file is missing, damaged or pickled, two tensors would get one name, or the
            files of mlx_lm or llama.cpp hold something else than LoRA.
    """
    path = fetch_adapter(path)
    if path.suffix == ".gguf" and path.is_file():
        if module is not None and not isinstance(module, Decoder):
            raise LorakitError(f"{path}: adapters of llama.cpp are for models of load_model")
        return open_gguf(path, base if module is None else module.config)
    values = _read_config(path)
    if is_mlx(values):
        return open_mlx(path, values)
    tensors = open_weights(path)
    for option, part in SPENT_TENSORS.items():
        if values.get(option):
            tensors = {key: tensor for key, tensor in tensors.items() if part not in key}
    own = [] if module is None else [name for name, _ in module.named_modules()]
    if not is_wrapped(own) and not any(f"{name}.".startswith(PREFIX) for name in own):
        tensors = unwrapped(tensors, str(path), _BEGINNINGS)
        values = values | {key: _unwrapped(values[key]) for key in _NAMES if key in values}
    tensors = _without_adapter_name(path, tensors)
    if not any(key.startswith("base_model.") for key in tensors):
        tensors = {PREFIX + key if ".lora_" in key else key: t for key, t in tensors.items()}
    return AdapterFiles(path, values, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the contents of adapter_config.json; an error says what lies there in its place."""
    if path.is_file():
        raise LorakitError(f"{path} is a file: give the directory of the adapter, {path.parent}")
    if not (path / CONFIG_FILE).exists():
        inner = sorted(found.parent.name for found in path.glob(f"*/{CONFIG_FILE}"))
        if inner:
            raise LorakitError(
                f"{path / CONFIG_FILE} does not exist; there is one in {', '.join(inner)}: name "
                "that directory"
            )
    return read_json(path / CONFIG_FILE)


def _unwrapped(value: Any) -> Any:
    """Return the names in an option without those of wrappers; a regex stays as it is."""
    if isinstance(value, list):
        return [_unwrapped_name(each) for each in value]
    if isinstance(value, dict):
        return {_unwrapped_name(key): each for key, each in value.items()}
    return value


def _unwrapped_name(name: Any) -> Any:
    return without_wrappers(name) if isinstance(name, str) else name


def _without_adapter_name(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors by their keys without the name of the adapter.

    Raises LorakitError if the keys have the names of several adapters.
    """
    adapters: set[str] = set()

    def shorter(found: re.Match[str]) -> str:
        adapters.add(found[2] or found[3])
        return f".{found[1]}" if found[1] else ""

    names = {key: _NAMED.sub(shorter, key) for key in tensors}
    if len(adapters) > 1:
        raise LorakitError(
            f"{path}: the file holds several adapters, {', '.join(sorted(adapters))}: save each by "
            "itself, with PEFT's save_pretrained"
        )
    return renamed(tensors, names, str(path), "a state_dict with the adapter's name in it")
