"""What the positions of one call see: rotary tables, masks, and packed documents.

A call to the decoder brings rows of tokens in one of three forms:

    plain      each position sees itself and all positions before it; a cache may hold some of them
    padded     attention_mask [B, S] tells real tokens from padding, on either side; positions count
               real tokens, and nothing but padding itself sees padding; a row is as long as its
               real tokens are
    packed     cu_seqlens [n + 1] cuts one row into documents; each starts at position 0 and sees
               none of the others

In a layer with a sliding window a position sees only the last `window` of these, itself included,
and the layer may have a rotary embedding of its own. So layers of one kind share a view.
They are made once and shared by the layers.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.models.cache import Cache
from lorakit.models.config import ModelConfig
from lorakit.models.rope import query_scale, rope_tables


class PackedRow(NamedTuple):
    """A packed row, as tensors on the device: what a CUDA graph finds there when it runs."""

    input_ids: Tensor
    """Tokens of the documents, one after the other: int64 [1, T]."""
    positions: Tensor
    """Position of each token in its document: int64 [T]."""
    documents: kernels.Documents
    """Documents of the row."""
    label_rows: Tensor
    """Places of the tokens that predict a label, and of any others: int64 [n], all different."""
    targets: Tensor
    """Token that each of them predicts, or -100: int64 [n]."""


class AttentionView(NamedTuple):
    """What a layer needs to know about one call: what its positions see, and how it is run."""

    tables: tuple[Tensor, Tensor]
    """Rotary tables, cos and sin: fp32 [B or 1, T, R / 2]."""
    mask: Tensor | None
    """True where a query may look: bool [T, S] or [B, 1, T, S]; None: causal attention."""
    window: int | None
    """Number of positions that each position sees, itself included; None: all before it."""
    lengths: kernels.Documents | None
    """Lengths of the packed documents, if the row is packed."""
    recomputed: bool
    """Whether the block runs a second time right before its backward (gradient checkpointing)."""
    keeps: bool
    """Whether the MLP keeps gate and up for backward, which otherwise computes them again."""
    query_scale: Tensor | None = None
    """Factors of the queries after their rotation: fp32 [B or 1, T, 1, 1]; None: all are 1."""
    real: Tensor | None = None
    """False at padding, for linear attention: bool [B, T]; None: there is none."""


def attention_views(
    config: ModelConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
    *,
    packed: PackedRow | None = None,
    recomputed: bool,
    kept_layers: int,
) -> list[AttentionView]:
    """Return the view of every layer, for input_ids int64 [B, T] in one of the three forms.

    A packed row comes as cu_seqlens, or as `packed` where no frequency depends on a length.

    Raises:
        LorakitError: If cu_seqlens do not cut the row into documents, or come together with a mask
            or a cache.
    """
    T, device = input_ids.shape[1], input_ids.device
    past = 0 if cache is None else cache.length
    real, lengths, own = None, None, None
    if cu_seqlens is not None:
        if attention_mask is not None or cache is not None:
            raise LorakitError("packed documents take neither a padding mask nor a cache")
        lengths = kernels.Documents(document_lengths(cu_seqlens, input_ids))
        numbers = torch.cat([torch.arange(n, device="cpu") for n in lengths])
        positions = kernels.dispatch.sent(numbers, device)
        if config.by_length:
            own = torch.tensor(lengths, device=device)
            own = own.repeat_interleave(own, output_size=T)[None]
    elif packed is not None:
        lengths, positions = packed.documents, packed.positions
    else:
        positions = torch.arange(past, past + T, device=device)
    position_ids = positions[None]
    if attention_mask is not None:
        real = attention_mask.bool()
        position_ids = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
    tables = tables_of(config, position_ids, own)
    scale = query_scale(config.rope, position_ids, past + T)

    def view(linear: bool, slides: bool, rope: int, keeps: bool) -> AttentionView:
        window, mask = config.sliding_window if slides else None, None
        if linear:
            now = None if real is None else real[:, past:]
            return AttentionView(tables[rope], None, None, lengths, recomputed, keeps, None, now)
        if lengths is None:
            seen = positions if cache is None else cache.positions(T, window)
            mask = key_mask(positions, seen, window, real)
        return AttentionView(tables[rope], mask, window, lengths, recomputed, keeps, scale)

    # what a block keeps that runs again right before its backward lives for that block only
    kinds = [
        (*_kind(config, i), recomputed or i < kept_layers) for i in range(config.num_hidden_layers)
    ]
    views = {kind: view(*kind) for kind in set(kinds)}
    return [views[kind] for kind in kinds]


def tables_of(
    config: ModelConfig, position_ids: Tensor, lengths: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return the tables of each of the model's rotary embeddings; see `rope_tables`."""
    ropes = zip(config.ropes, config.rope_head_dims, strict=True)
    return [rope_tables(rope, size, position_ids, lengths) for rope, size in ropes]


def _kind(config: ModelConfig, layer: int) -> tuple[bool, bool, int]:
    """Return whether a layer is linear, whether it slides, and the number of its embedding."""
    return config.is_linear(layer), config.slides(layer), config.rope_number(layer)


def key_mask(
    positions: Tensor, seen: Tensor, window: int | None, real: Tensor | None
) -> Tensor | None:
    """Return which of the keys at positions `seen` [S] the queries at `positions` [T] look at.

    They look at no key in the future, at none that lies `window` or more positions back, and at no
    padding: `real` [B, S] is false there. Each looks at itself, so that no row is empty.

    Returns:
        bool [T, S], or with padding [B, 1, T, S]; None where causal attention with the window says
        the same: for one query, and where the keys are those of the queries.
    """
    T, S = positions.shape[0], seen.shape[0]  # len() would fix them in an exported graph
    if real is None and (T in (1, S)):
        return None
    mask = seen <= positions[:, None]
    if window is not None:
        mask &= seen > positions[:, None] - window
    if real is None:
        return mask
    return ((mask & real[:, None, seen]) | (seen == positions[:, None]))[:, None]


def document_lengths(cu_seqlens: Tensor, input_ids: Tensor) -> list[int]:
    """Return the lengths of the documents that are packed into the one row of input_ids.

    Raises:
        LorakitError: Unless cu_seqlens rises from 0 to the row's length.
    """
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
