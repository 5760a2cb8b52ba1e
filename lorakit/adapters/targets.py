"""Choose the layers of a module that an adapter goes on, by PEFT's rules.

    target_modules      a list: each entry is a layer's whole name, or its end after a dot.
                        a string: a regex that matches the whole name. "all-linear" means every
                        linear layer but the output head and the small ones that decide: routers
                        of experts, and decay and learning rate of linear attention
    exclude_modules     leaves out what it matches by the same rules, and wins
    layers_to_transform keeps only the layers with one of these numbers. A layer's number is the
                        first one in its name that stands between dots, after another name or
                        after `layers_pattern`. A layer that target_modules lists by its whole
                        name stays whatever its number is
    modules_to_save     names modules that are trained whole; a layer in one of them takes no
                        adapter

PEFT skips an entry that matches nothing. Here it raises an error: a slip in a name would otherwise
train less than the user thinks.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lorakit.adapters.manage import outer_modules
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import endings, lies_in, valid_regex
from lorakit.config.quantization import DECIDING_LAYERS

_BY_NAME_ALONE = ("lm_head", *DECIDING_LAYERS)
"""Linear layers that "all-linear" leaves out, or the modules that hold them."""


def ends_with(name: str, entry: str) -> bool:
    """Return whether `entry` is the whole name or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def is_target(name: str, targets: str | Collection[str]) -> bool:
    """Return whether a regex matches the whole name, or a list has the name or an end of it.

    A set of many targets is looked up by the few ends of the name.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return not {name, *endings([name])}.isdisjoint(targets)


def match_targets(
    names: Sequence[str], targets: str | list[str], what: str = "target_modules"
) -> list[str]:
    """Return the `names` that `targets` selects, in their order.

    Raises LorakitError, which names the setting `what` and the nearest name, for a string or a list
    entry that matches nothing.
    """
    leaves = sorted({_leaf(name) for name in names})
    if targets == "all-linear":
        found = [name for name in names if not any(lies_in(name, each) for each in _BY_NAME_ALONE)]
        if not found:
            raise LorakitError(f"{what} 'all-linear': the module holds no linear layer")
        return found
    if isinstance(targets, str):
        if not valid_regex(targets):
            raise LorakitError(f"{what} {targets!r} is no valid regex")
        found = [name for name in names if is_target(name, targets)]
        if not found:
            raise LorakitError(
                f"{what}: the regex {targets!r} matches no layer{nearest(targets, leaves)}; a "
                "string is matched against whole names, a list against their ends"
            )
        return found
    by_end: dict[str, list[str]] = {}  # a large mixture has as many targets as names, 30,000
    for name in names:
        for end in {name, *endings([name])}:
            by_end.setdefault(end, []).append(name)
    matched = {target: by_end.get(target, []) for target in targets}
    for target, hits in matched.items():
        if not hits:
            raise LorakitError(
                f"{what}: {target!r} matches no layer{nearest(target, [*leaves, *names])}; "
                f"there are {', '.join(leaves)}"
            )
    wanted = {name for hits in matched.values() for name in hits}
    return [name for name in names if name in wanted]


def select_layers(
    linear: Sequence[str], embeddings: Sequence[str], config: TargetConfig
) -> list[str]:
    """Return the layers that `config` selects, in their order.

    `linear` and `embeddings` are the names of the layers that the module has. "all-linear" selects
    among the linear ones alone.

    Raises LorakitError if an entry of target_modules, exclude_modules or layers_to_transform
    matches nothing, or nothing is left.
    """
    targets, every = config.target_modules, [*linear, *embeddings]
    found = match_targets(linear if targets == "all-linear" else every, targets)
    found = [name for name in found if not is_saved_whole(name, config)]
    if config.exclude_modules:
        excluded = match_targets(every, config.exclude_modules, "exclude_modules")
        found = [name for name in found if name not in set(excluded)]
    wanted = config.layers_to_transform
    if wanted is not None and wanted != []:
        found = _in_numbered_layers(found, [wanted] if isinstance(wanted, int) else wanted, config)
    if not found:
        raise LorakitError("target_modules: every layer it matches is excluded")
    return found


def is_saved_whole(name: str, config: TargetConfig) -> bool:
    """Return whether the module `name` lies in one that `config` trains whole."""
    return any(lies_in(name, entry) for entry in config.modules_to_save or [])


def targets_for(places: Sequence[str], module: nn.Module) -> str | list[str]:
    """Return a target_modules that selects the layers `places` of `module` and no others.

    It is the list of `short_names`. Where the name of another layer ends in one of `places`, a list
    would mean that one too, so it is a regex of the whole names.
    """
    others = {name for name, _ in outer_modules(module)}.difference(places)
    if not endings(others).isdisjoint(places):
        return "|".join(re.escape(place) for place in places)
    return short_names(places, others)


def short_names(places: Sequence[str], others: Collection[str]) -> list[str]:
    """Return the shortest list that selects `places` among the modules `places` and `others`.

    A layer stands in it by the last part of its name, such as q_proj, unless another module has the
    same one. Then it stands there by its whole name. Some servers know no other forms.
    """
    unclear = {_leaf(name) for name in others}
    short = [place if _leaf(place) in unclear else _leaf(place) for place in places]
    return list(dict.fromkeys(short))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _in_numbered_layers(names: list[str], wanted: list[int], config: TargetConfig) -> list[str]:
    """Return the `names` whose layer has a `wanted` number, or that target_modules lists whole.

    Raises LorakitError for a number that no layer has.
    """
    targets, patterns = config.target_modules, config.layers_pattern or []
    whole = set() if isinstance(targets, str) else set(targets)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = {name: layer_number(name, patterns) for name in names}
    for number in wanted:
        if number not in numbers.values():
            there = sorted({n for n in numbers.values() if n is not None})
            between = f"{there[0]} to {there[-1]}" if there else "none"
            raise LorakitError(
                f"layers_to_transform: no adapted layer has the number {number}; there are "
                f"{between}"
            )
    return [name for name in names if name in whole or numbers[name] in wanted]


def layer_number(name: str, patterns: Iterable[str]) -> int | None:
    """Return the number of the layer that `name` lies in; None if it lies in no numbered one."""
    beginnings = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    for beginning in beginnings:
        if (match := re.match(rf"{beginning}\.(\d+)\.", name)) is not None:
            return int(match.group(1))
    return None
