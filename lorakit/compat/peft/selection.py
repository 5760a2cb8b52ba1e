"""Which adapter computes, and which one trains: two questions in PEFT, one in lorakit.

`lk.attach`, `lk.load_adapter` and `lk.set_adapter` select an adapter and train it at once. In PEFT
a second adapter waits until it is selected, a loaded one stays frozen, and merging selects without
training. The functions here do lorakit's steps and put back what PEFT would have left alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import nn

from lorakit.adapters.attach import attach
from lorakit.adapters.manage import attached, selected_adapter, set_adapter
from lorakit.adapters.methods.prompts import PromptConfig
from lorakit.adapters.peft_files.load import load_adapter
from lorakit.compat.peft.configs import LoraConfig
from lorakit.config.adapters import TargetConfig


def is_trained(model: nn.Module, name: str) -> bool:
    """Return whether any parameter of adapter `name` gets a gradient."""
    parts = [each.adapters[name] for each in attached(model).values() if name in each.adapters]
    return any(p.requires_grad for part in parts for p in part.parameters())


def set_trained(model: nn.Module, name: str, trained: bool) -> None:
    """Train adapter `name` from now on, or freeze it."""
    for each in attached(model).values():
        if name in each.adapters:
            each.adapters[name].requires_grad_(trained)


@contextmanager
def same_selection(model: nn.Module) -> Iterator[None]:
    """Select and train after the `with` block what was selected and trained before it.

    The block attaches one more adapter. If that is the first one of the model, it stays selected.
    """
    before = selected_adapter(model)
    with nullcontext() if before is None else same_training(model):
        yield
        if before is not None:
            set_adapter(model, before)


@contextmanager
def same_training(model: nn.Module) -> Iterator[None]:
    """Train after the `with` block what trained before it, whatever is selected inside it."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, trained in required:
        parameter.requires_grad_(trained)


def add_adapter(model: nn.Module, name: str, config: TargetConfig | PromptConfig) -> None:
    """Attach a new adapter, which waits to be selected unless it is the first."""
    with same_selection(model):
        attach(model, config, name=name)
    if isinstance(config, LoraConfig) and config.inference_mode:
        set_trained(model, name, False)


def add_adapter_from(model: nn.Module, path: Path, name: str, is_trainable: bool) -> None:
    """Attach the adapter of a directory, frozen unless `is_trainable`."""
    with same_selection(model):
        load_adapter(model, path, name=name)
    set_trained(model, name, is_trainable)
