"""Select, switch off, delete and detach adapters, and walk over the modules that carry them.

Attaching is in attach.py, merging in merge.py. The wrappers that all this works on are in
layers/wrapper.py.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.config.errors import LorakitError, nearest
from lorakit.models.decoder import Decoder
from lorakit.models.mlp import Experts

# ---- walks ----


def outer_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name, in the order of the tree, but none that lies inside a wrapper.

    A module that is held in several places comes under each of its names.
    """
    yield name, module
    if not isinstance(module, Attached):
        for leaf, child in module._modules.items():  # named_children leaves out the second place
            if child is not None:
                yield from outer_modules(child, f"{name}.{leaf}" if name else leaf)


def attached(module: nn.Module) -> dict[str, Attached]:
    """Return every wrapper inside `module` by name, in the order of `named_modules`.

    An engine asks often, and the nested generators of `named_modules` take twice as long. No
    wrapper lies in a part of an adapter.
    """
    found: dict[str, Attached] = {}
    seen, left = set[int](), [("", module)]
    while left:
        name, each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Attached):
            found[name] = each
        before, wraps = f"{name}." if name else "", isinstance(each, Attached)
        children = reversed(each._modules.items())
        left += [
            (before + leaf, child)
            for leaf, child in children
            if child is not None and not (wraps and leaf == "adapters")
        ]
    return found


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of the adapters attached to a module.

    Args:
        module: Any module.

    Returns:
        The names, sorted; an empty list if no adapter is attached.
    """
    return sorted({name for each in attached(module).values() for name in each.adapters})


def selected_adapter(module: nn.Module) -> str | None:
    """Return the adapter that `module` computes with, and trains; None if none is selected."""
    return next((m.selected for m in attached(module).values() if m.selected is not None), None)


def adapter_config(module: nn.Module, name: str) -> Any:
    """Return the config that adapter `name` was attached with."""
    parts = (each.adapters[name] for each in attached(module).values() if name in each.adapters)
    return next(part.config for part in parts if isinstance(part, Part))


def parameters_of_others(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of adapters that are not selected, but for those that it shares."""
    own, others = dict[int, nn.Parameter](), dict[int, nn.Parameter]()
    for each in attached(module).values():
        for name, part in each.adapters.items():
            found = own if name == each.selected else others
            found.update((id(p), p) for p in part.parameters())
    return [p for key, p in others.items() if key not in own]


# ---- what must hold before something changes; `caller` names who asks ----


def require_attached(module: nn.Module, caller: str) -> dict[str, Attached]:
    """Return every wrapper inside `module` by name; raise LorakitError if there is none."""
    found = attached(module)
    if not found:
        raise LorakitError(f"{caller}: no adapter is attached")
    return found


def require_selected(module: nn.Module, caller: str) -> str:
    """Return the selected adapter; raise LorakitError if none is attached, or none selected."""
    require_attached(module, caller)
    name = selected_adapter(module)
    if name is None:
        raise LorakitError(f"{caller}: no adapter is selected")
    return name


def check_unmerged(module: nn.Module, caller: str) -> None:
    """Raise LorakitError if an adapter is merged into the weights."""
    _check_unmerged(attached(module).values(), caller)


def _check_unmerged(wrappers: Iterable[Attached], caller: str) -> None:
    if any(each.merged is not None for each in wrappers):
        raise LorakitError(f"{caller}: an adapter is merged; unmerge it first")


def check_no_block(module: nn.Module, caller: str) -> None:
    """Raise LorakitError inside `disable_adapters` and `adapter_rows`."""
    if any(not each.enabled or each.row_groups is not None for each in attached(module).values()):
        raise LorakitError(
            f"{caller}: the adapters are disabled, or differ by row; leave that block, or enable "
            "them"
        )


def check_new_name(module: nn.Module, name: str, caller: str) -> None:
    """Raise LorakitError unless an adapter may be attached as `name`."""
    names = adapter_names(module)
    if name in names:
        raise LorakitError(
            f"{caller}: an adapter {name!r} is attached already; detach it first, or choose "
            "another name"
        )
    taken = {*dir(nn.ModuleDict()), ""}  # torch registers it among these
    if not isinstance(name, str) or "." in name or name in taken:
        raise LorakitError(
            f"{caller}: {name!r} is no name for an adapter: it must hold no dot, and be no method "
            "of torch's ModuleDict"
        )


def check_adapter(module: nn.Module, name: str, caller: str) -> None:
    """Raise LorakitError unless adapter `name` is attached to `module`."""
    names = adapter_names(module)
    if not names:
        raise LorakitError(f"{caller}: no adapter is attached")
    if name not in names:
        raise LorakitError(
            f"{caller}: there is no adapter {name!r}{nearest(name, names)}; attached: "
            + ", ".join(names)
        )


# ---- select, delete, detach ----


def set_adapter(module: nn.Module, name: str) -> nn.Module:
    """Compute with an adapter from now on, and train it alone.

    Args:
        module: A module with adapters.
        name: The name of the adapter to select.

    Returns:
        `module`.

    Raises:
        LorakitError: There is no such adapter, or an adapter is merged.
    """
    wrappers = attached(module).values()  # one walk, as a session comes here in every call
    if not any(name in each.adapters for each in wrappers):
        check_adapter(module, name, "set_adapter")
    _check_unmerged(wrappers, "set_adapter")
    for each in wrappers:
        each.select(name)
    return module


def delete_adapter(module: nn.Module, name: str) -> nn.Module:
    """Forget an adapter.

    If it was selected, the first of the others is selected from now on. With the last adapter
    every module returns to its place, as in `detach`.

    Args:
        module: A module with adapters.
        name: The name of the adapter to forget.

    Returns:
        `module`.

    Raises:
        LorakitError: There is no such adapter, an adapter is merged, or the call stands inside
            `disable_adapters` or `adapter_rows`.
    """
    check_adapter(module, name, "delete_adapter")
    check_no_block(module, "delete_adapter")
    check_unmerged(module, "delete_adapter")
    others = [other for other in adapter_names(module) if other != name]
    selected = selected_adapter(module)
    if selected == name:
        selected = others[0] if others else None
    remove_parts(module, name, list(attached(module)), selected)
    return module


def remove_parts(module: nn.Module, name: str, places: list[str], selected: str | None) -> None:
    """Take adapter `name` from the wrappers at `places`.

    Wrappers that are left without any part make way for their originals. The others compute with
    adapter `selected`.
    """
    wrappers = attached(module)
    found = {place: wrappers[place] for place in places}
    for each in found.values():
        if name in each.adapters:
            del each.adapters[name]
        # `select` also sets what trains, so it is not called where the selection stays.
        if each.selected == name or each.selected != selected:
            each.select(selected)
    put_back(module, {n: each.original for n, each in found.items() if not each.has_parts()})


def detach(module: nn.Module) -> nn.Module:
    """Remove all adapters: the modules they were on return to their places, still frozen.

    Args:
        module: A module with adapters.

    Returns:
        `module`.

    Raises:
        LorakitError: No adapter is attached.
    """
    found = require_attached(module, "detach")
    put_back(module, {name: each.original for name, each in found.items()})
    return module


def put_back(module: nn.Module, plain: Mapping[str, nn.Module]) -> None:
    """Put plain modules in every place of the wrappers that have these names."""
    instead = {id(module.get_submodule(name)): new for name, new in plain.items()}
    places = [(name, m) for name, m in outer_modules(module) if id(m) in instead]
    for name, each in places:
        module.set_submodule(name, instead[id(each)])
    for inner in module.modules():
        if isinstance(inner, Decoder):
            _tie_or_untie(inner)


def _tie_or_untie(model: Decoder) -> None:
    """Take the head from a tied decoder if it is the embedding again; say so if it stays another.

    A tied decoder has a head of its own while an adapter is on that head alone (tied_weights.py).
    """
    head, embedding = model.lm_head, model.model.embed_tokens
    if not model.config.tie_word_embeddings or head is None or isinstance(head, Attached):
        return
    plain = embedding.original if isinstance(embedding, Attached) else embedding
    if head._parameters.get("weight") is plain._parameters.get("weight"):
        model.lm_head = None
    else:
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


# ---- for the length of a `with` block ----


@contextmanager
def _state_restored(wrappers: Iterable[Attached]) -> Iterator[None]:
    """Restore `enabled` and `row_groups` of the wrappers after the `with` block."""
    before = [(each, each.enabled, each.row_groups) for each in wrappers]
    try:
        yield
    finally:
        for each, enabled, row_groups in before:
            each.set_enabled(enabled)
            each.set_row_groups(row_groups)


@contextmanager
def selected(module: nn.Module, name: str) -> Iterator[None]:
    """Compute with adapter `name`, and train it alone, inside the `with` block.

    Raises LorakitError if there is no such adapter, or one is merged.
    """
    before = selected_adapter(module)
    if before == name:
        yield
        return
    set_adapter(module, name)
    try:
        yield
    finally:
        if before is not None:
            set_adapter(module, before)


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Compute without adapters inside the `with` block.

    Args:
        module: A module with adapters, merged or not.

    Yields:
        Nothing. After the block everything computes as before.

    Raises:
        LorakitError: No adapter is attached.
    """
    found = list(require_attached(module, "disable_adapters").values())
    with _state_restored(found):
        for each in found:
            each.set_enabled(False)
        yield


@contextmanager
def adapter_rows(module: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Send each row of every batch through an adapter of its own inside the `with` block.

    The rows of one adapter are computed together. Gradients go through. `backward` belongs inside
    the block too where gradient checkpointing computes the forward pass again.

    Args:
        module: A module with adapters.
        names: Row i of a batch goes through adapter names[i], or, if that is None, through the base
            alone. Every batch must have len(names) rows.

    Yields:
        Nothing. After the block everything computes as before.

    Raises:
        LorakitError: There is no such adapter, or an adapter is merged; or, on the first batch, the
            rows do not reach an adapted module as they are, since packed documents and experts mix
            them.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise LorakitError(f"adapter_rows: names must be a list of names and None, not {names!r}")
    for name in names:
        if name is not None:
            check_adapter(module, name, "adapter_rows")
    found = list(require_attached(module, "adapter_rows").values())
    check_unmerged(module, "adapter_rows")
    rows_of = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    row_groups = [(name, torch.tensor(rows)) for name, rows in rows_of.items()]
    with _state_restored(found):
        for each in found:
            each.set_row_groups(row_groups)
        yield


@contextmanager
def adapter_spans(module: nn.Module, spans: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Send spans of a packed row through adapters of their own, and train all of them.

    Every frozen layer multiplies the whole row at once. `backward` belongs inside the block too
    where gradient checkpointing computes the forward pass again.

    Args:
        module: A model with adapters.
        spans: The adapters in the order of their tokens, and how many tokens each has. The row is
            packed (`cu_seqlens`), and no document of it lies in two spans.

    Yields:
        Nothing. After the block the selected adapter computes, and it alone trains.

    Raises:
        LorakitError: There is no such adapter, or one does more than add low-rank updates to linear
            layers, or is merged.
    """
    check_spans(module, [name for name, _ in spans])
    check_unmerged(module, "adapter_spans")
    check_no_block(module, "adapter_spans")
    ends = list(accumulate(count for _, count in spans))
    places = [(name, end - count, end) for (name, count), end in zip(spans, ends, strict=True)]
    found = list(attached(module).values())
    try:
        for each in found:
            each.set_spans(places)
        yield
    finally:
        for each in found:
            each.set_spans(None)


def check_spans(module: nn.Module, names: Sequence[str]) -> None:
    """Raise LorakitError unless adapters may have spans of a row; see `adapter_spans`."""
    known = adapter_names(module)
    for name in names:
        if name not in known:
            check_adapter(module, name, "adapter_spans")
    experts = tuple(f"{n}." for n, m in module.named_modules() if isinstance(m, Experts))
    for place, each in attached(module).items():
        # experts take the tokens of all documents in another order, and a head some of them
        mixed = place.startswith(experts) or place.endswith("lm_head")
        for name in names:
            if name in each.adapters and (mixed or not each.takes_spans(name)):
                raise LorakitError(
                    f"several adapters in one pass: {name!r} does more at {place} than add a "
                    "low-rank update to a linear layer of a block; train it by itself, or leave "
                    "out DoRA, trained biases, dropout, quantize_aware, embeddings, the head, "
                    "experts and learned prompts"
                )
