"""Carried out of lorakit/attached.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.config.errors import LorakitError, nearest

# ---- walks ----


def plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, in the order of the tree, an Attached as one; a module that is held in
    several places under each of its names.
    """
    yield name, module
    if not isinstance(module, Attached):
        for leaf, child in module._modules.items():  # named_children leaves out the second place
            if child is not None:
                yield from plain_modules(child, f"{name}.{leaf}" if name else leaf)


def attached(module: nn.Module) -> dict[str, Attached]:
    """Every Attached inside `module` by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Attached)}


def adapter_names(module: nn.Module) -> list[str]:
    """The adapters attached to `module`, sorted."""
    return sorted({name for each in attached(module).values() for name in each.adapters})


def selected_adapter(module: nn.Module) -> str | None:
    """The adapter that `module` computes with, and trains; None if none is selected."""
    return next((m.selected for m in attached(module).values() if m.selected is not None), None)


def adapter_config(module: nn.Module, name: str):
    """The config that adapter `name` was attached with."""
    parts = (each.adapters[name] for each in attached(module).values() if name in each.adapters)
    return next(part.config for part in parts if isinstance(part, Part))


def having_adapters(module: nn.Module, what: str) -> dict[str, Attached]:
    """Every Attached inside `module`. Raises LorakitError, naming the caller, if there is none."""
    found = attached(module)
    if not found:
        raise LorakitError(f"{what}: no adapter is attached")
    return found


def check_no_block(module: nn.Module, what: str) -> None:
    """Raise LorakitError, naming the caller, inside `disable_adapters` and `adapter_rows`."""
    if any(not each.enabled or each.rows is not None for each in attached(module).values()):
        raise LorakitError(
            f"{what}: the adapters are disabled, or differ by row; leave that block, or enable them"
        )


def _unmerged(module: nn.Module, what: str) -> dict[str, Attached]:
    found = having_adapters(module, what)
    if any(each.merged is not None for each in found.values()):
        raise LorakitError(f"{what}: an adapter is merged; unmerge it first")
    return found


def check_new_name(module: nn.Module, name: str, what: str) -> None:
    """Raise LorakitError, naming the caller, unless an adapter may be attached as `name`."""
    names = adapter_names(module)
    if name in names:
        raise LorakitError(
            f"{what}: an adapter {name!r} is attached already; detach it first, or choose another "
            "name"
        )
    taken = {*dir(nn.ModuleDict()), ""}  # torch registers it among these
    if not isinstance(name, str) or "." in name or name in taken:
        raise LorakitError(
            f"{what}: {name!r} is no name for an adapter: it must hold no dot, and be no method of "
            "torch's ModuleDict"
        )


def check_adapter(module: nn.Module, name: str, what: str) -> None:
    """Raise LorakitError, naming the caller, unless adapter `name` is attached to `module`."""
    names = adapter_names(module)
    if not names:
        raise LorakitError(f"{what}: no adapter is attached")
    if name not in names:
        raise LorakitError(
            f"{what}: there is no adapter {name!r}{nearest(name, names)}; attached: "
            + ", ".join(names)
        )


def set_adapter(module: nn.Module, name: str) -> nn.Module:
    """Compute with adapter `name` from now on, and train it alone. Returns `module`.

    Raises LorakitError if there is no such adapter, or one is merged.
    """
    check_adapter(module, name, "set_adapter")
    for each in _unmerged(module, "set_adapter").values():
        each.select(name)
    return module


def delete_adapter(module: nn.Module, name: str) -> nn.Module:
    """Forget adapter `name`. If it was selected, the first of the others is from now on; with the
    last one every module returns to its place, as in `detach`. Returns `module`.

    Raises LorakitError if there is no such adapter, or one is merged.
    """
    check_adapter(module, name, "delete_adapter")
    check_no_block(module, "delete_adapter")
    found = _unmerged(module, "delete_adapter")
    names = [other for other in adapter_names(module) if other != name]
    kept = selected_adapter(module)
    if kept == name:
        kept = names[0] if names else None
    remove_parts(module, name, list(found), kept)
    return module


def remove_parts(module: nn.Module, name: str, places: list[str], selected: str | None) -> None:
    """Take adapter `name` from the modules at `places`; those that are left without any return to
    their places, the others compute with `selected`.
    """
    found = {place: module.get_submodule(place) for place in places}
    for each in found.values():
        if name in each.adapters:
            del each.adapters[name]
        if each.selected == name or each.selected != selected:  # or what trains stays as it is
            each.select(selected)
    gone = {place: each.plain for place, each in found.items() if not each.in_use()}
    put_back(module, gone)


def detach(module: nn.Module) -> nn.Module:
    """Remove all adapters: the modules they were on return to their places, still frozen."""
    found = having_adapters(module, "detach")
    put_back(module, {name: each.plain for name, each in found.items()})
    return module


def put_back(module: nn.Module, plain: dict[str, nn.Module]) -> None:
    """`plain` by the name of each Attached that makes way for it, in all its places."""
    instead = {id(module.get_submodule(name)): new for name, new in plain.items()}
    places = [(name, m) for name, m in plain_modules(module) if id(m) in instead]
    for name, each in places:
        module.set_submodule(name, instead[id(each)])


@contextmanager
def _for_the_block(found: Sequence[Attached]) -> Iterator[None]:
    """After the `with` block `enabled` and `rows` of each are what they were before."""
    before = [(each, each.enabled, each.rows) for each in found]
    try:
        yield
    finally:
        for each, each.enabled, each.rows in before:
            each.refresh()


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block every module computes without its adapter."""
    found = list(having_adapters(module, "disable_adapters").values())
    with _for_the_block(found):
        for each in found:
            each.enabled = False
            each.refresh()
        yield


@contextmanager
def adapter_rows(module: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside the `with` block row i of every batch goes through adapter names[i]; None: the base
    alone.

    Gradients go through, but `backward` belongs inside the block too where checkpointing computes
    again what it needs. A batch must have len(names) rows. The rows of one adapter are computed
    together. Raises LorakitError if there is no such adapter, one is merged, or, on the first
    batch, the rows do not reach an adapted module as they are: packed documents and experts mix
    them.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise LorakitError(f"adapter_rows: names must be a list of names and None, not {names!r}")
    for name in names:
        if name is not None:
            check_adapter(module, name, "adapter_rows")
    found = list(_unmerged(module, "adapter_rows").values())
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    rows = [(name, torch.tensor(index)) for name, index in rows.items()]
    with _for_the_block(found):
        for each in found:
            each.rows = rows
            each.refresh()
        yield
