"""`Family`: the form of a row of families.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LEFTOVERS = ("sliding_window", "layer_types")
"""Keys of files whose family has no window, for `ignored`."""


@dataclass(frozen=True)
class Family:
    """What a model_type says beyond the keys of its config.json."""

    architecture: str
    """Name of the family's class in transformers, for the key `architectures`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """ModelConfig fields that every model of the family has."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of transformers for keys that may be left out, where they are not ModelConfig's."""
    ignored: tuple[str, ...] = ()
    """Keys that files of the family carry and transformers does not use."""
    activation: str = "hidden_act"
    """Key under which the family's files name the MLP's activation."""
    activations: dict[str, str] = field(default_factory=dict)
    """Names of activations that mean another one in the family's files -> that one."""
    rope_types: dict[str, str] = field(default_factory=dict)
    """Names of rotary scalings that mean another one in the family's files -> that one."""
    slides: Callable[[int, int], bool] = field(default=lambda layer, first: layer >= first)
    """Whether a layer has the window where a file has neither layer_types nor a pattern.

    It gets the layer's number and the file's max_window_layers, 0 if there is none.
    """

    last_is_full: bool = False
    """Whether the last layer has no window, whatever a file says."""
