"""Attention in plain torch; with a soft cap or sinks the scores are spelled out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import dispatch, pretend
from .documents import PaddedDocuments

CHUNK = 512  # query rows whose scores exist at a time
# Keys up to which torch may take what is plainly causal only with a mask. Without one its kernel
# for CPUs finds the largest score of less than a vector by comparisons, which are false for NaN:
# a query whose scores are all NaN then counts as one that sees nothing, and gets 0.
SHORT = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with q [B, T, Hq, D] to k and v [B, S, Hk, D], document by document: [B, T, Hq, D]."""
    dtype, wide = q.dtype, dispatch.product_dtype(q)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if isinstance(lengths, PaddedDocuments):
        mask = _mask_from(lengths.starts(q.device), window)
    if mask is not None:
        return _attend(q, k, v, mask, scale, softcap, sinks).to(dtype)
    lengths = [q.shape[1]] if lengths is None else list(lengths)
    if len(lengths) == 1:
        return _attend(q, k, v, _window_mask(q, k, window), scale, softcap, sinks).to(dtype)
    documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    parts = [
        _attend(q, k, v, _window_mask(q, k, window), scale, softcap, sinks) for q, k, v in documents
    ]
    return torch.cat(parts, dim=1).to(dtype)


def _window_mask(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """Return the mask of one document, bool [T, S]; None where it is plainly causal."""
    T, S = q.shape[1], k.shape[1]
    whole = window is None or window >= T
    if whole and (S > SHORT or pretend.kind_of(q.device) != "cpu"):
        return None
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return mask if whole or window is None else mask.triu(1 - window)


def _mask_from(starts: Tensor, window: int | None) -> Tensor:
    """Return the mask of documents that begin at `starts` [T], for each token: bool [T, T]."""
    keys = torch.arange(len(starts), device=starts.device)
    rows = keys[:, None]
    seen = (keys <= rows) & (keys >= starts[:, None])
    return seen if window is None else seen & (keys > rows - window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with q [B, T, Hq, D] to k and v [B, S, Hk, D]: [B, T, Hq, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T or S, D]
    if softcap is not None or sinks is not None:
        return _spelled_out(q, k, v, mask, scale, softcap, sinks).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with scores that exist, CHUNK query rows at a time; q, k, v are [B, H, T or S, D]."""
    B, Hq, T, D = q.shape
    Hk, S = k.shape[1], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    mask = mask.expand(B, 1, T, S)[:, :, None]
    q = q.reshape(B, Hk, Hq // Hk, T, D) * (D**-0.5 if scale is None else scale)

    def rows(q, k, v, mask, sinks):
        scores = q @ k[:, :, None].transpose(-1, -2)  # [B, Hk, G, t, S]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(Hk, Hq // Hk, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., :S]
        return weights.to(v.dtype) @ v[:, :, None]

    chunks = list(zip(q.split(CHUNK, dim=3), mask.split(CHUNK, dim=3), strict=True))
    again = len(chunks) > 1 and torch.is_grad_enabled()
    out = [
        checkpoint(rows, part, k, v, seen, sinks, use_reentrant=False)
        if again
        else rows(part, k, v, seen, sinks)
        for part, seen in chunks
    ]
    return torch.cat(out, dim=3).reshape(B, Hq, T, D)
