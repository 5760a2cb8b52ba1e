"""A forecast of all layers from a few: bytes are linear in the number of layers of each kind.

Layers that differ in nothing but their number are of one kind. A base of few layers, FEW of each
kind, is forecast, and once more for each kind with a layer more of it. What that layer adds stands
for all those that are left out. It is added to what is held at the peak of each moment by itself:
which moment has the highest peak may change with the number of layers, as checkpoints are given
back while gradients grow.

The layers of the base are the last ones of each kind, and one that is its first, or two where
weights are divided. The highest peaks are at the ends: bytes rise or fall from layer to layer. What
is said of a layer between, before the one that is added, is too little, which no peak is told by.

What the allocator reserves is no such sum. It is taken to be the same share above the peak as in
the base. Where weights are divided or wait in host memory, the units that come and go leave gaps
whose size hardly depends on the number of layers: there it is as many bytes above the peak, of
those forecasts the most.

Rows of one length add the same bytes each, too, where they are more than a chunk of the loss. On a
processor, whose loss goes through many small chunks, two forecasts tell of many rows: of few, and
of twice as many. Those few are as many as make chunks of the same size in both, since a chunk that
grew would be taken for what rows add. Under gradient checkpointing the tiles of an MLP would grow
so, and all rows are forecast.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from lorakit.kernels.ops.cross_entropy.linear import chunk_rows
from lorakit.models.config import ModelConfig
from lorakit.training.memory_plan.forecast import Forecast, Setting, plain
from lorakit.training.memory_plan.ledger import Kind
from lorakit.training.memory_plan.watch import Mark

FEW = 3
TOKENS = 2048  # that few rows have at least
_NUMBER = re.compile(r"[0-9]|\\[dw]")  # what names or patterns have that tell layers apart
K = TypeVar("K", bound=Hashable)


def forecast_by_layers(setting: Setting, forecast: Callable[[Setting], Forecast]) -> Forecast:
    """Return the forecast of all layers of a setting; `forecast` is called for some of them."""
    kinds = kinds_of(setting)
    if not is_regular(setting):
        return forecast(setting)
    left = Counter(kinds)
    base: set[int] = set()
    more: dict[Hashable, int] = {}
    for kind in left:
        of_kind = [i for i, each in enumerate(kinds) if each == kind]
        # where weights are divided, no layer is gathered while the very first one goes backward
        first = 2 if setting.divided else 1
        chosen = {*of_kind[:first], *of_kind[1 - FEW :]}
        base |= chosen
        left[kind] -= len(chosen)
        if left[kind]:
            more[kind] = max(set(of_kind) - chosen)
    whole_layers = len(base) + len(more) * (len(base) + 1)
    if whole_layers >= len(kinds):
        return forecast(setting)
    found = forecast(with_layers(setting, sorted(base)))
    steps = {
        kind: (left[kind], forecast(with_layers(setting, sorted({*base, layer}))))
        for kind, layer in more.items()
    }
    return extended(found, list(steps.values()), setting.is_elsewhere)


def forecast_by_rows(setting: Setting, forecast: Callable[[Setting], Forecast]) -> Forecast:
    """Return the forecast of all rows of a setting; `forecast` is called for some of them."""
    rows, longest = len(setting.rows), max(setting.rows)
    all_equal = min(setting.rows) == longest and not setting.train.gradient_checkpointing
    if setting.device == "cuda" or setting.new_tokens is not None or not all_equal:
        return forecast(setting)
    words = max(setting.config.vocab_size, setting.vocabulary)
    labels = min(longest - 1, max(1, round(longest * setting.label_share)))
    like = torch.empty((), dtype=setting.dtype, device="cpu")

    def chunk(number: int) -> int:
        return chunk_rows(number * labels, words, like)

    for few in range(-(-max(TOKENS, 2 * chunk(rows)) // longest), rows // 4 + 1):
        if chunk(few) == chunk(2 * few):
            found, more = (forecast(replace(setting, rows=(longest,) * n)) for n in (few, 2 * few))
            return extended(found, [(rows / few - 1, more)])
    return forecast(setting)


def kinds_of(setting: Setting) -> list[Hashable]:
    """Return what the layers of a model are, by number; equal ones take the same memory."""
    config = setting.config
    return [
        (
            config.is_linear(i),
            config.slides(i),
            config.rope_number(i),
            config.has_experts(i),
            config.kv_source(i) is None,
            i < setting.kept_layers,
        )
        for i in range(config.num_hidden_layers)
    ]


def is_regular(setting: Setting) -> bool:
    """Return whether no setting names single layers of the model."""
    names: list[object] = [*setting.train.freeze]
    names += () if setting.quantize is None else setting.quantize.skip_modules
    adapter = {} if setting.lora is None else dict(vars(plain(setting.lora)))
    adapter.pop("trainable_token_indices", None)  # numbers of tokens
    for value in adapter.values():
        names += [value] if isinstance(value, str) else ()
        names += value if isinstance(value, (list, dict)) else ()
    if adapter.get("quantize_aware") not in (None, "nf4"):  # its formats follow the layer's number
        return False
    layers = adapter.get("layers_to_transform")
    return layers is None and not any(_NUMBER.search(str(name)) for name in names)


def with_layers(setting: Setting, layers: Sequence[int]) -> Setting:
    """Return a setting with these layers of the model alone, in their order."""
    config = setting.config
    chosen: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for each in fields(ModelConfig):
        values = vars(config)[each.name]
        if each.name.endswith("_layers") and isinstance(values, list) and values:
            chosen[each.name] = [values[i] for i in layers]
    shared = sum(config.kv_source(i) is not None for i in layers)
    few = replace(config, **chosen, num_kv_shared_layers=shared)
    kept = sum(i < setting.kept_layers for i in layers)
    return replace(
        setting, config=few, numbers=[setting.numbers[i] for i in layers], kept_layers=kept
    )


def extended(
    base: Forecast, steps: Sequence[tuple[float, Forecast]], units_come: bool = False
) -> Forecast:
    """Return a forecast with more layers, or rows.

    Args:
        base: The forecast of few.
        steps: How many layers of a kind are left out, and the forecast with one of them; or how
            many times the rows of base, and the forecast with twice as many.
        units_come: Whether a layer's weights are there only while it computes.
    """
    peaks = {
        mark: _added(kinds, [(n, each.peaks[mark]) for n, each in steps])
        for mark, kinds in base.peaks.items()
    }
    most = _highest(peaks)
    reserved = base.reserved * most / _highest(base.peaks)
    if units_come:
        made = [base, *(each for _, each in steps)]
        reserved = most + max(each.reserved - _highest(each.peaks) for each in made)
    return Forecast(
        resident=_added(base.resident, [(n, each.resident) for n, each in steps]),
        peaks=peaks,
        reserved=reserved,
        host=base.host + sum(n * (each.host - base.host) for n, each in steps),
    )


def _highest(peaks: Mapping[Mark, Mapping[Kind, float]]) -> float:
    """Return the most bytes of all moments."""
    return max(sum(kinds.values()) for kinds in peaks.values())


def _added(
    base: Mapping[K, float], steps: Sequence[tuple[float, Mapping[K, float]]]
) -> dict[K, float]:
    names = dict.fromkeys([*base, *(name for _, each in steps for name in each)])
    return {
        name: base.get(name, 0)
        + sum(n * (each.get(name, 0) - base.get(name, 0)) for n, each in steps)
        for name in names
    }
