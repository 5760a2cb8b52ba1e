"""Carried out of lorakit/model.py."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.models.rope import RopeConfig, rope_tables


class View(NamedTuple):
    """What layers of one kind, sliding or not, see in this call."""

    tables: tuple[Tensor, Tensor]  # cos and sin, fp32 [B or 1, T, D/2]
    mask: Tensor | None  # as kernels.attention takes it
    window: int | None
    lengths: list[int] | None  # of packed documents
    again: bool  # whether the blocks run a second time, right before their backward


def key_mask(positions: Tensor, seen: Tensor, window: int | None, real: Tensor | None):
    """Which of the keys at `seen` [S] each of `positions` [T] may look at: bool [T, S], or with
    padding [B, 1, T, S].

    Not the future, nothing `window` or more positions back, no padding (`real` [B, S] is false
    there); but always itself, so that no row is empty. None where plain causal attention says all.
    """
    T, S = len(positions), len(seen)
    slides = window is not None and window < S
    if real is None and (T == 1 or (T == S and not slides)):
        return None
    mask = seen <= positions[:, None]
    if slides:
        mask &= seen > positions[:, None] - window
    if real is None:
        return mask
    return ((mask & real[:, None, seen]) | (seen == positions[:, None]))[:, None]


def document_lengths(cu_seqlens: Tensor, input_ids: Tensor) -> list[int]:
    """Of the documents packed into the one row of input_ids."""
    B, T = input_ids.shape
    whole = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1
    if not whole or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise LorakitError(
            f"cu_seqlens must be a tensor of whole numbers [n + 1], not {cu_seqlens!r}"
        )
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if B != 1 or not lengths or bounds[0] != 0 or bounds[-1] != T or min(lengths) < 1:
        raise LorakitError(
            f"cu_seqlens must rise from 0 to the length of the one packed row, {T}; it is {bounds} "
            f"for {B} rows"
        )
    return lengths


def rotary_tables(rope: RopeConfig, head_dim: int, position_ids: Tensor, lengths: list[int] | None):
    """Rotary tables; where they depend on the sequence's length, each document has its own."""
    if lengths is None or not rope.by_length:
        return rope_tables(rope, head_dim, position_ids)
    parts = [rope_tables(rope, head_dim, part) for part in position_ids.split(lengths, dim=1)]
    return tuple(torch.cat(tables, dim=1) for tables in zip(*parts, strict=True))
