"""Names in PEFT's files: the files themselves, their keys, and the modules of other models.

adapter_config.json          the config of the adapter, and PEFT's name of its method
adapter_model.safetensors    base_model.model.<module>.<ending> -> tensor
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.files.safetensors import LazyTensor
from lorakit.models.decoder import Decoder
from lorakit.models.multimodal import text_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

PATTERNS = ("rank_pattern", "alpha_pattern")


class AdapterFiles(NamedTuple):
    """An adapter on disk: its directory, its config, and its tensors by their keys."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def name_in(model: nn.Module, name: str) -> str:
    """Return the name in `model` of the module that a file calls `name`.

    A lorakit decoder is the text model alone, also where the adapter was trained on a multimodal
    model.
    """
    return text_name(name) if isinstance(model, Decoder) else name
