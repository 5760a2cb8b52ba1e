"""Names in PEFT's files: the files themselves, their keys, and the modules of other models.

    adapter_config.json          the config of the adapter, and PEFT's name of its method
    adapter_model.safetensors    base_model.model.<module>.<ending> -> tensor

save.py lists the endings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor, open_safetensors
from lorakit.models.decoder import Decoder
from lorakit.models.multimodal import text_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

PATTERNS = ("rank_pattern", "alpha_pattern")
# What PEFT takes where an adapter_config.json leaves the key out; lorakit's own defaults differ.
PEFT_RANK, PEFT_ALPHA = 8, 8


class AdapterFiles(NamedTuple):
    """An adapter on disk, by the names of PEFT."""

    path: Path
    """Its directory, or its .gguf file."""
    values: Mapping[str, Any]
    """The config, as adapter_config.json has it."""
    tensors: Mapping[str, LazyTensor]
    """The tensors by their keys."""
    written_by: str = "PEFT"
    """The library whose files they are: PEFT, MLX or llama.cpp."""


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the adapter in the directory `path` by their keys, still on disk.

    Raises LorakitError if their file is missing, damaged or pickled.
    """
    if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
        raise LorakitError(
            f"{path}: adapter_model.bin is pickled, which is not read: save the adapter with a "
            "recent PEFT, as safetensors"
        )
    return open_safetensors(path / WEIGHTS_FILE)


def name_in(model: nn.Module, name: str) -> str:
    """Return the name in `model` of the module that a file calls `name`.

    A lorakit decoder is the text model alone, also where the adapter was trained on a multimodal
    model.
    """
    return text_name(name) if isinstance(model, Decoder) else name
