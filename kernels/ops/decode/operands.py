"""The operands of a step, checked, as the kernel reads them; cpu.cpp has the layouts."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import address
from .plan import MOST_KINDS, DecodeCache, DecodePlace, DecodePlan, in_host_memory


def check_inputs(plan: DecodePlan, ids: Tensor, tables: Sequence[tuple[Tensor, Tensor]]) -> array:
    """Return the addresses of the tables, `Table[ropes]` of cpu.cpp.

    Raises ValueError unless ids and tables fit the plan.
    """
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(
            f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [B] or [B, T], none of them 0"
        )
    if not in_host_memory(ids):
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
            if not in_host_memory(table):
                raise ValueError(f"tables[{i}] {name} must be contiguous and in host memory")
            rotations.append(address(table))
    return rotations


def check_places(
    plan: DecodePlan,
    B: int,
    T: int,
    cache: DecodeCache,
    places: Sequence[DecodePlace],
    adapters: Sequence[int | None] | None,
) -> array:
    """Return the places as the kernel reads them, `Place[B]` of cpu.cpp.

    Raises ValueError unless they fit the cache.
    """
    if len(places) != B:
        raise ValueError(f"places are {len(places)}, expected {B}")
    if len(cache.keys) != len(plan.layers):
        raise ValueError(f"the cache has {len(cache.keys)} layers, the plan {len(plan.layers)}")
    known = len(plan.adapters)
    if adapters is None:
        adapters = [None] * B
    if len(adapters) != B or not all(a is None or 0 <= a < known for a in adapters):
        raise ValueError(
            f"adapters are {list(adapters)}, expected {B} numbers below {known}, or None"
        )
    numbers, written = array("q"), [0] * cache.kinds
    for place, adapter in zip(places, adapters, strict=True):
        numbers.extend((place.position, -1 if adapter is None else adapter))
        if place.position < 0 or len(place.pages) != cache.kinds:
            raise ValueError(
                f"a place is at position {place.position} with {len(place.pages)} tables of pages; "
                f"the cache needs {cache.kinds}"
            )
        for kind, pages in enumerate(place.pages):
            new = _check_pages(cache, kind, pages, place.position, T)
            written[kind] += new
            numbers.append(pages.buffer_info()[0])
        numbers.extend([0] * (MOST_KINDS - cache.kinds))
    for kind, count in enumerate(written):
        _check_owners(cache, kind, places, T, count)
    return numbers


def _check_pages(cache: DecodeCache, kind: int, pages: array, position: int, T: int) -> int:
    """Return how many pages T tokens are written to; raise ValueError if the table has none there.

    Pages before the first that a token looks at are not looked at here either.
    """
    window, size = cache.reach[kind], cache.size
    first = 0 if window is None else max(0, position + 1 - window) // size
    last = (position + T - 1) // size
    seen = pages[first : last + 1]
    if len(pages) <= last or min(seen) < 0 or max(seen) >= cache.pages[kind]:
        raise ValueError(
            f"positions up to {position + T} need pages {first} to {last} of {size} positions, "
            f"each one of {cache.pages[kind]}; the table has {list(pages)}"
        )
    return last - position // size + 1


def _check_owners(
    cache: DecodeCache, kind: int, places: Sequence[DecodePlace], T: int, count: int
) -> None:
    """Raise ValueError if two tokens of different rows, `count` pages in all, share a page."""
    size, found = cache.size, set[int]()
    for place in places:
        found.update(
            place.pages[kind][place.position // size : (place.position + T - 1) // size + 1]
        )
    if len(found) != count:
        raise ValueError("two rows write to one page")
