"""Causal attention with grouped queries, sliding windows, a soft cap and packed documents.

    s_ij = scale q_i . k_j          s = c tanh(s / c) where there is a soft cap c (arXiv:2408.00118)
    p_i  = softmax over the j that i may see        o_i = sum_j p_ij v_j

Query head h reads key head h // (Hq / Hk). `mask` says which query may see which key; without one
attention is plainly causal. Packed documents (`lengths`) are taken one by one: none computes a
product with another's keys, so that no bit of one depends on another, and the work is sum(T_i^2),
not (sum T_i)^2.

On a CPU one kernel does all of it, forward and backward (cpu.cpp): blocks of queries meet blocks of
keys in the cache, with a running maximum and sum per query (arXiv:2205.14135). So no T x S scores
exist, and blocks that no query sees cost nothing. For backward it keeps y and one fp32 per query,
ln sum_j e^s_ij, and computes p again.

Elsewhere torch's scaled_dot_product_attention does the work. It keeps no scores either, but has no
soft cap: with one, the scores of CHUNK query rows at a time exist. In training each chunk's are
computed again for backward, so that memory holds one chunk's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Attend causally, with grouped queries, and with a mask or packed documents.

    Differentiable in q, k and v. The maths is that of arXiv:1706.03762, section 3.2.1, blockwise as
    in arXiv:2205.14135.

    Args:
        q: the queries [B, T, Hq, D], any floating-point dtype.
        k: the keys [B, S, Hk, D]; Hq is a multiple of Hk.
        v: the values [B, S, Hk, D].
        mask: bool [T, S] or [B, 1, T, S], true where a query may look. None: the last query is
            beside the last key, and each sees all keys up to its own (T == S or T == 1).
        scale: what the scores are multiplied by; None for D^-0.5.
        softcap: c; the scores s become c tanh(s / c) (arXiv:2408.00118). None for no cap.
        window: with `lengths`, how many positions a query may look back, its own included.
        lengths: the tokens of each document packed along T == S, B == 1. Each is causal by itself;
            a mask is ignored then.

    Returns:
        The weighted sums of the values, [B, T, Hq, D] in q's dtype.

    Raises:
        ValueError: the lengths do not add up to T; a RuntimeError where torch does the work.
    """
    if lengths is None:
        window = None
    else:
        mask = None
    if cpu.fits(q, k, v, mask, scale) and dispatch.pick(q.device, "cpu") == "cpu":
        return cpu.attention(q, k, v, mask, scale, softcap, window, lengths)
    dtype, wide = q.dtype, dispatch.product_dtype(q)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if lengths is None:
        return reference.attention(q, k, v, mask, scale, softcap).to(dtype)
    documents = zip(*(x.split(list(lengths), dim=1) for x in (q, k, v)), strict=True)
    parts = [
        reference.attention(q, k, v, _window_mask(q, window), scale, softcap)
        for q, k, v in documents
    ]
    return torch.cat(parts, dim=1).to(dtype)


def _window_mask(q: Tensor, window: int | None) -> Tensor | None:
    """Return the mask of one document, bool [T, T]; None where it is plainly causal."""
    T = q.shape[1]
    if window is None or window >= T:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
