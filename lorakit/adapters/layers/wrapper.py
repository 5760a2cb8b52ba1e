"""What stands in the place of a module while adapters are attached to it, and the walks over them.

    Attached.base        the module itself, frozen, untouched
    Attached.adapters    what each adapter adds to it, by the adapter's name

One adapter, or none, is selected; its parameters train and those of the others do not. An adapter
need not have a part in every Attached: one without computes its base. Inside `disable_adapters`
all of them do. Inside `adapter_rows` each row of a batch goes through an adapter of its own.

A merged Attached computes with `merged`, a plain module that holds base and adapter in one; the
base is kept beside it, so that `unmerge` restores the very bits (subtracting the update again would
not), and `detach` puts it back where it was.

What kinds there are is not said here: see lora.py and its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import LorakitError, nearest


class Part(nn.Module):
    """What adapter `name` adds to one module, and the config that it came with."""

    def __init__(self, config):
        super().__init__()
        self.config = config


class Attached(nn.Module):
    """The common part of every kind; a kind says how one adapter computes, what of it is saved, and
    what the module is with the adapter in its weights.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.selected: str | None = None
        self.enabled = True
        self.merged: nn.Module | None = None
        self.rows: list[tuple[str | None, Tensor]] | None = None  # which ones each adapter computes
        self.using: tuple[nn.Module | None] = (None,)  # a tuple, lest torch registers it again
        self.train(base.training)

    # ---- what a kind says ----

    def compute(self, adapter: nn.Module, *args, **options):
        """The module's output with the part `adapter`."""
        raise NotImplementedError

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """What is trained of adapter `name`, by the ending of its key in PEFT's file."""
        raise NotImplementedError

    def stored(self, name: str) -> dict[str, Tensor]:
        """The same, and what else a file gives values to: the buffers of a module that is trained
        whole.
        """
        return self.tensors(name)

    def saved(self, name: str) -> dict[str, Tensor]:
        """What is `stored`, as it is written."""
        return self.stored(name)

    @torch.no_grad()
    def restore(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give adapter `name` the values that `saved` gave, of the same shapes."""
        for ending, tensor in self.stored(name).items():
            tensor.copy_(values[ending])

    def joined(self, weight: Tensor | None) -> nn.Module:
        """The module with the selected adapter in its weights; `weight` in place of the base's."""
        raise NotImplementedError

    @property
    def plain(self) -> nn.Module:
        """The module that was replaced."""
        return self.base

    def update(self):
        """The low-rank update, kernels.LoraWeights, where the kind has one and it is selected."""
        return None

    def adapted(self):
        """The same, if the fused kernels may compute base and update in one."""
        return None

    # ---- the same for all ----

    def forward(self, *args, **options):
        (adapter,) = self.using
        if adapter is None:
            return self.without(*args, **options)
        return self.compute(adapter, *args, **options)

    def without(self, *args, **options):
        """Where no one adapter is used for all rows: the base, the merged module, or row by row."""
        if self.rows is not None and self.enabled:
            return self._by_rows(*args, **options)
        return self.current()(*args, **options)

    def current(self) -> nn.Module:
        """What computes where no adapter is added to it: the base, or the merged module."""
        return self.merged if self.merged is not None and self.enabled else self.plain

    def _by_rows(self, *args, **options) -> Tensor:
        if not args:
            raise LorakitError(
                f"adapter_rows: a {type(self.base).__name__} is called with keywords alone: which "
                "of them holds the rows is not known"
            )
        x, *args = args
        count = sum(len(index) for _, index in self.rows)
        if len(x) != count:
            raise LorakitError(
                f"adapter_rows: {count} adapters for a batch of {len(x)} rows"
                + (" (experts, and packed documents, mix rows)" if len(x) > count else "")
            )
        found = []
        for name, index in self.rows:
            part = x[index.to(x.device)]
            if name in self.adapters:
                found.append(self.compute(self.adapters[name], part, *args, **options))
            else:
                found.append(self.plain(part, *args, **options))
        order = torch.cat([index for _, index in self.rows]).argsort()
        return torch.cat(found)[order.to(x.device)]

    def alone(self) -> nn.Module | None:
        """The one module that computes, None if an adapter is added to it or rows differ."""
        whole = self.using[0] is None and (self.rows is None or not self.enabled)
        return self.current() if whole else None

    def in_use(self) -> bool:
        """Whether any adapter has a part in it."""
        return len(self.adapters) > 0

    def put(self, name: str, adapter: nn.Module) -> None:
        self.adapters[name] = adapter.train(self.training)

    def select(self, name: str | None) -> None:
        self.selected = name if name in self.adapters else None
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)
        self.refresh()

    def refresh(self) -> None:
        """After a change of what decides: which adapter `forward` adds."""
        whole = self.enabled and self.merged is None and self.rows is None
        chosen = whole and self.selected is not None
        self.using = (self.adapters[self.selected] if chosen else None,)


class Plan:
    """What an adapter is going to be: wrappers by place, and what it adds to each. A plan is made
    whole, with everything refused that has to be, before `attach` carries it out.
    """

    def __init__(self) -> None:
        self.places: dict[str, Attached] = {}
        self.parts: list[tuple[Attached, nn.Module]] = []
        self.made: dict[int, Attached] = {}  # of each module its wrapper: it may have two places

    def wrap(
        self, place: str, module: nn.Module, kind: type[Attached], make: Callable[[], Attached]
    ) -> Attached | None:
        """The wrapper of `module`, or None if it is known already."""
        if isinstance(module, Attached):
            if type(module) is not kind:
                raise LorakitError(
                    f"attach: {place} is a {type(module).__name__} of another adapter, and cannot "
                    f"be a {kind.__name__} too; leave it out (exclude_modules), or detach that one"
                )
            known = id(module) in self.made
            self.made[id(module)] = module
            return None if known else module
        known = id(module) in self.made
        if not known:
            self.made[id(module)] = make()
        self.places[place] = self.made[id(module)]
        return None if known else self.places[place]


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
