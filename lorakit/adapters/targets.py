"""Which layers of a module an adapter goes on: PEFT's rules, and an error for what matches nothing.

    a list         each entry is a layer's whole name, or its end after a dot
    a string       a regex that matches the whole name; "all-linear": every linear layer but the
                   output head
    exclude_modules     the same rules, and wins
    layers_to_transform of these, the layers with such a number: the first one in the name that
                   follows a name (or `layers_pattern`) and a dot; a whole name in the list stays
    modules_to_save     what lies in one of these is trained whole and takes no adapter

Nothing is selected by accident and nothing silently not: every entry has to match something.
"""

import re
from collections.abc import Iterable

from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import in_pattern, lies_in, valid_regex


def ends_with(name: str, entry: str) -> bool:
    """Whether `entry` is the whole name or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def match_targets(
    names: list[str], targets: str | list[str], what: str = "target_modules"
) -> list[str]:
    """The `names` that `targets` selects, in their order.

    Raises LorakitError for a string or a list entry that matches nothing, with the nearest name.
    """
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if targets == "all-linear":
        found = [name for name in names if name.rpartition(".")[2] != "lm_head"]
        if not found:
            raise LorakitError(f"{what} 'all-linear': the module holds no linear layer")
        return found
    if isinstance(targets, str):
        if not valid_regex(targets):
            raise LorakitError(f"{what} {targets!r} is no valid regex")
        found = [name for name in names if re.fullmatch(targets, name)]
        if not found:
            raise LorakitError(
                f"{what}: the regex {targets!r} matches no layer{nearest(targets, leaves)}; a "
                "string is matched against whole names, a list against their ends"
            )
        return found
    matched = {target: [n for n in names if ends_with(n, target)] for target in targets}
    for target, hits in matched.items():
        if not hits:
            raise LorakitError(
                f"{what}: {target!r} matches no layer{nearest(target, [*leaves, *names])}; "
                f"there are {', '.join(leaves)}"
            )
    wanted = {name for hits in matched.values() for name in hits}
    return [name for name in names if name in wanted]


def select(linear: list[str], embeddings: list[str], config: TargetConfig) -> list[str]:
    """Which of the layers, given by name and in order, `config` selects.

    Raises LorakitError where an entry of target_modules, exclude_modules, layers_to_transform,
    rank_pattern or alpha_pattern matches nothing, or nothing is left.
    """
    targets, every = config.target_modules, linear + embeddings
    found = match_targets(linear if targets == "all-linear" else every, targets)
    if config.modules_to_save:
        found = [n for n in found if not any(lies_in(n, m) for m in config.modules_to_save)]
    if config.exclude_modules:
        excluded = match_targets(every, config.exclude_modules, "exclude_modules")
        found = [name for name in found if name not in set(excluded)]
    if config.layers_to_transform not in (None, []):
        found = _in_layers(found, config)
    if not found:
        raise LorakitError("target_modules: every layer it matches is excluded")
    for what in ("rank_pattern", "alpha_pattern") if isinstance(config, LoraConfig) else ():
        for key in getattr(config, what):
            if not any(in_pattern(key, name) for name in found):
                hint = nearest(key, [n.rpartition(".")[2] for n in found])
                raise LorakitError(f"{what}: {key!r} matches no adapted layer{hint}")
    return found


def _in_layers(names: list[str], config: TargetConfig) -> list[str]:
    targets = config.target_modules
    whole = set() if isinstance(targets, str) else set(targets)
    wanted, patterns = config.layers_to_transform, config.layers_pattern or []
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = {name: _number(name, patterns) for name in names}
    for number in wanted:
        if number not in numbers.values():
            there = sorted({n for n in numbers.values() if n is not None})
            there = f"{there[0]} to {there[-1]}" if there else "none"
            raise LorakitError(
                f"layers_to_transform: no adapted layer has the number {number}; there are {there}"
            )
    return [name for name in names if name in whole or numbers[name] in wanted]


def _number(name: str, patterns: Iterable[str]) -> int | None:
    """The number of the layer that `name` lies in."""
    beginnings = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    for beginning in beginnings:
        if (match := re.match(rf"{beginning}\.(\d+)\.", name)) is not None:
            return int(match.group(1))
    return None
