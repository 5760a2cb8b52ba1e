"""Names of tensors that the wrappers of a training run have lengthened.

A wrapper holds the model as a child of its own, so the state of the wrapped model has longer names:

    module.model.layers.0...                          DistributedDataParallel, DeepSpeed
    _orig_mod.model.layers.0...                       torch.compile
    model.layers.0._fsdp_wrapped_module.mlp...        FSDP
    model.layers.0._checkpoint_wrapped_module.mlp...  torch's wrapper for activation checkpointing
    _forward_module.model.layers.0...                 Lightning Fabric

`module` is a name that a model may use itself, so it goes only where every tensor begins with it.
The others are private names of the wrappers, and go wherever they stand.
"""

import logging
from collections.abc import Mapping
from typing import TypeVar

from lorakit.config.errors import LorakitError

log = logging.getLogger("lorakit")

T = TypeVar("T")

_PRIVATE = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)


def without_wrappers(name: str) -> str:
    """Return a name of a module or tensor without the private names of wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def is_wrapped(names: list[str]) -> bool:
    """Return whether a wrapper's private name is part of one of these names."""
    return any(without_wrappers(name) != name for name in names)


def unwrapped(tensors: Mapping[str, T], where: str, beginnings: Mapping[str, str]) -> dict[str, T]:
    """Return tensors by their names without wrappers, and log one line if names are shortened.

    Args:
        tensors: Anything by the names of tensors in a file.
        where: The place of the file, for messages.
        beginnings: Beginnings of names, and what stands in their place. Each is replaced as long as
            every name begins with it, so what stands in its place must be shorter.

    Returns:
        The same values by their shorter names, in the same order.

    Raises:
        LorakitError: Two tensors would get one name.
    """
    names = {name: without_wrappers(name) for name in tensors}
    for beginning, other in beginnings.items():
        while names and all(name.startswith(beginning) for name in names.values()):
            names = {k: other + name.removeprefix(beginning) for k, name in names.items()}
    return renamed(tensors, names, where, "wrappers such as DDP, FSDP or torch.compile")


def renamed(
    tensors: Mapping[str, T], names: Mapping[str, str], where: str, cause: str
) -> dict[str, T]:
    """Return tensors by their new names, and log one line if a name has changed.

    Args:
        tensors: Anything by the names of tensors in a file.
        names: The new name of each.
        where: The place of the file, for messages.
        cause: What gave the tensors their old names, for the log.

    Returns:
        The same values by their new names, in the same order.

    Raises:
        LorakitError: Two tensors would get one name.
    """
    found: dict[str, T] = {}
    changed: list[str] = []
    for name, tensor in tensors.items():
        if names[name] in found:
            raise LorakitError(f"{where}: two tensors are {names[name]}, one of them as {name}")
        found[names[name]] = tensor
        changed += [name] if names[name] != name else []
    if changed:
        log.warning(
            "lorakit: %s: %d names of tensors come from %s; %s is read as %s",
            where, len(changed), cause, changed[0], names[changed[0]],
        )  # fmt: skip
    return found
