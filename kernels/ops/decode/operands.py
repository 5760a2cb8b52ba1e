"""The operands of a step, checked, as the kernel reads them; cpu.cpp has the layouts."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import DecodeCache, DecodePlan


def check_inputs(plan: DecodePlan, ids: Tensor, tables: Sequence[tuple[Tensor, Tensor]]) -> array:
    """Return the addresses of the tables, `Table[ropes]` of cpu.cpp.

    Raises ValueError unless ids and tables fit the plan.
    """
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(
            f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [B] or [B, T], none of them 0"
        )
    if not ids.is_contiguous() or not ids.is_cpu:
        raise ValueError("ids must be contiguous and in host memory")
    if not all(0 <= i < plan.vocab_size for i in ids.flatten().tolist()):
        raise ValueError(f"ids hold a token outside of [0, {plan.vocab_size})")
    if len(tables) < plan.ropes:
        raise ValueError(f"tables are {len(tables)}, the layers use {plan.ropes}")
    shape, rotations = (*ids.shape, plan.head_dim // 2), array("q")
    for i, pair in enumerate(tables):
        for name, table in zip(("cos", "sin"), pair, strict=True):
            if table.shape != shape or table.dtype != torch.float32:
                raise ValueError(
                    f"tables[{i}] {name} is {table.dtype} {list(table.shape)}, "
                    f"expected float32 {list(shape)}"
                )
            if not table.is_contiguous() or not table.is_cpu:
                raise ValueError(f"tables[{i}] {name} must be contiguous and in host memory")
            rotations.append(table.data_ptr())
    return rotations


def check_places(
    plan: DecodePlan,
    B: int,
    T: int,
    cache: DecodeCache,
    places: Sequence[tuple[int, int]],
    adapters: Sequence[int | None] | None,
) -> array:
    """Return the places as the kernel reads them, `Place[B]` of cpu.cpp.

    Raises ValueError unless they fit the cache.
    """
    if len(places) != B or len({line for line, _ in places}) != B:
        raise ValueError(f"places are {list(places)}, expected {B} with lines of their own")
    if len(cache.keys) != len(plan.layers):
        raise ValueError(f"the cache has {len(cache.keys)} layers, the plan {len(plan.layers)}")
    known = len(plan.adapters)
    if adapters is None:
        adapters = [None] * B
    if len(adapters) != B or not all(a is None or 0 <= a < known for a in adapters):
        raise ValueError(
            f"adapters are {list(adapters)}, expected {B} numbers below {known}, or None"
        )
    furthest, numbers = 0, array("q")
    for (line, position), adapter in zip(places, adapters, strict=True):
        if not 0 <= line < cache.lines or position < 0:
            raise ValueError(
                f"there is no line {line} or position {position} in a cache of {cache.lines} lines"
            )
        furthest = max(furthest, position + T)
        numbers.extend((line, position, -1 if adapter is None else adapter))
    if cache.capacity < furthest or cache.longest < T:
        raise ValueError(
            f"{T} tokens up to position {furthest} exceed the cache, which takes {cache.longest} "
            f"at a time and positions below {cache.capacity}"
        )
    return numbers
