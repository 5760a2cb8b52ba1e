"""The list of the methods, and how to find the method of a config or of a file."""

from typing import Any

from lorakit.adapters.methods.adalora import AdaLora
from lorakit.adapters.methods.ia3 import IA3
from lorakit.adapters.methods.lora import Lora
from lorakit.adapters.methods.method import Method
from lorakit.adapters.methods.miss import Miss
from lorakit.adapters.methods.prompts import PrefixTuning, PromptEncoder, PromptTuning
from lorakit.adapters.methods.vera import Vera
from lorakit.config.errors import LorakitError

METHODS: tuple[Method[Any], ...] = (
    Lora(),
    IA3(),
    Vera(),
    AdaLora(),
    Miss(),
    PromptTuning(),
    PromptEncoder(),
    PrefixTuning(),
)


def method_of(config: object) -> Method[Any]:
    """Return the method that `config` belongs to; raises LorakitError if it belongs to none."""
    for method in METHODS:
        if isinstance(config, method.config_type):
            return method
    kind = f"{type(config).__module__}.{type(config).__name__}"
    raise LorakitError(f"attach: {kind} is not the config of a lorakit adapter, as LoraConfig is")


def method_called(peft_type: object) -> Method[Any] | None:
    """Return the method that PEFT calls `peft_type`, None if lorakit does not have it."""
    return next((method for method in METHODS if method.peft_type == peft_type), None)
