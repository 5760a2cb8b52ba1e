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


def check_slots(
    plan: DecodePlan,
    B: int,
    T: int,
    cache: DecodeCache,
    slots: Sequence[tuple[int, int]],
    visible: Sequence[Tensor | None] | None,
) -> array:
    """Write slots and masks into the cache's contexts, `Context[layers]` of cpu.cpp; return these.

    Raises ValueError unless they fit. At the start of a step the weights have driven Python's own
    data out of the caches of the processor, so that every object it touches counts: this loop
    writes numbers into one array.
    """
    depth, contexts = len(plan.layers), cache.contexts
    if len(slots) != depth or (visible is not None and len(visible) != depth):
        raise ValueError(f"slots and visible need an entry for each of {depth} layers")
    if cache.rows != B and depth:
        raise ValueError(f"ids hold {B} rows, the cache {cache.rows}")
    for i, (slot, count) in enumerate(slots):
        at = 7 * i
        if not 0 <= slot < count <= contexts[at + 2] or (T > 1 and count != slot + T):
            raise ValueError(
                f"slots[{i}] are slot {slot}, count {count}, of a capacity of {contexts[at + 2]}"
            )
        contexts[at + 3], contexts[at + 4] = slot, count
        mask = None if visible is None else visible[i]
        if mask is None:
            contexts[at + 5] = 0
        else:
            contexts[at + 5], contexts[at + 6] = _check_mask(B, i, mask, count)
    return contexts


def _check_mask(B: int, i: int, mask: Tensor, count: int) -> tuple[int, int]:
    """Return address and width of a layer's mask; raise ValueError unless it fits."""
    if mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != B:
        raise ValueError(
            f"visible[{i}] is {mask.dtype} {list(mask.shape)}, expected bool [{B}, {count}]"
        )
    if mask.shape[1] < count or not mask.is_contiguous() or not mask.is_cpu:
        raise ValueError(f"visible[{i}] must be contiguous, in host memory and {count} wide")
    return mask.data_ptr(), mask.shape[1]
