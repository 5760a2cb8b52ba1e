"""Causal attention with grouped queries, sliding windows, a soft cap and packed documents.

    s_ij = scale q_i . k_j          s = c tanh(s / c) where there is a soft cap c (arXiv:2408.00118)
    p_i  = softmax over the j that i may see        o_i = sum_j p_ij v_j

Query head h reads key head h // (Hq / Hk). Who may see whom is said by `mask`, or, without one, by
plain causality. Packed documents (`lengths`) are walked one by one: none computes a product with
another's keys, so no bit of one depends on another, and the work is sum(T_i^2), not (sum T_i)^2.

On a CPU one kernel does all of it, forward and backward (cpu.cpp): blocks of queries meet blocks of
keys in the cache, with a running maximum and sum per query (arXiv:2205.14135), so that no T x S
scores exist and blocks that nobody sees cost nothing. For backward it keeps y and one fp32 per
query, ln sum_j e^s_ij, and computes p again.

Elsewhere torch's scaled_dot_product_attention does the work, which keeps no scores either, but has
no soft cap: that one's scores exist, for CHUNK query rows at a time, and in training each chunk's
are computed again for backward, so that memory holds one chunk's.
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
    """q [B, T, Hq, D], k and v [B, S, Hk, D], Hq a multiple of Hk -> [B, T, Hq, D] in q's dtype.

    mask: bool [T, S] or [B, 1, T, S], true where a query may look; None: the last query is beside
        the last key and sees all up to itself (T == S or T == 1).
    scale: of the scores; default D^-0.5. softcap: c above.
    lengths: of the documents packed along T == S, B == 1, each causal by itself, with `window` the
        positions it may look back, its own included; needs mask None.
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
    return torch.cat(
        [
            reference.attention(*part, _window_mask(part[0], window), scale, softcap)
            for part in documents
        ],
        dim=1,
    ).to(dtype)


def _window_mask(q: Tensor, window: int | None) -> Tensor | None:
    """Of one document's queries [1, T, Hq, D]: bool [T, T], None where it is plainly causal."""
    T = q.shape[1]
    if window is None or window >= T:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
