"""Causal attention with grouped queries, sliding windows, a soft cap and packed documents.

    s_ij = scale q_i . k_j          s = c tanh(s / c) where there is a soft cap c (arXiv:2408.00118)
    p_i  = softmax over the j that i may see        o_i = sum_j p_ij v_j

Heads may have sinks, scores of their own without a value, which the softmax goes over too
(arXiv:2309.17453, learned in gpt-oss). They scale what attention without them gives (sinks.py).

Query head h reads key head h // (Hq / Hk). `mask` says which query may see which key; without one
attention is plainly causal. Packed documents (`lengths`) are taken one by one: none computes a
product with another's keys, so that no bit of one depends on another, and the work is sum(T_i^2),
not (sum T_i)^2.

On a CPU one kernel does all of it, forward and backward (cpu.cpp): blocks of queries meet blocks of
keys in the cache, with a running maximum and sum per query (arXiv:2205.14135). So no T x S scores
exist, and blocks that no query sees cost nothing. For backward it keeps y and one fp32 per query,
ln sum_j e^s_ij, and computes p again.

On a GPU the kernels of triton.py do the same for packed documents, soft caps and windows. Their
grid comes from a table of tiles (documents.py), so that any number of documents is one launch.
Dense rows in 16 bits go to torch's FlashAttention where that is faster (flash.py says where), and
masks to its scaled_dot_product_attention. With a mask and a soft cap, the scores of CHUNK query
rows at a time exist; in training each chunk's are computed again for backward, so that memory holds
one chunk's.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch, pretend
from . import cpu, flash


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
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend causally, with grouped queries, and with a mask or packed documents.

    Differentiable in q, k, v and sinks. The maths is that of arXiv:1706.03762, section 3.2.1,
    blockwise as in arXiv:2205.14135.

    Args:
        q: the queries [B, T, Hq, D], any floating-point dtype.
        k: the keys [B, S, Hk, D]; Hq is a multiple of Hk.
        v: the values [B, S, Hk, D].
        mask: bool [T, S] or [B, 1, T, S], true where a query may look. None: the last query is
            beside the last key, and each sees all keys up to its own (T == S or T == 1).
        scale: what the scores are multiplied by; None for D^-0.5.
        softcap: c; the scores s become c tanh(s / c) (arXiv:2408.00118). None for no cap.
        window: how many positions a query may look back, its own included. It counts where T == S
            and there is no mask.
        lengths: the tokens of each document packed along T == S, B == 1. Each is causal by itself;
            a mask is ignored then. As `Documents` they keep what the layers of a model share, as
            `PaddedDocuments` where a CUDA graph finds it.
        sinks: a score of each head that stands beside those of the keys and has no value, [Hq] of
            any floating-point dtype; the softmax goes over it too (sinks.py). None for none.

    Returns:
        The weighted sums of the values, [B, T, Hq, D] in q's dtype.

    Raises:
        ValueError: the lengths do not add up to T; a RuntimeError where torch does the work.
    """
    T, S = q.shape[1], k.shape[1]
    if lengths is not None:
        mask = None
        if sum(lengths) != T or min(lengths, default=0) < 0:
            raise ValueError(f"the lengths {list(lengths)} do not add up to the {T} tokens")
    if mask is not None or T != S:
        window = None
    if dispatch.traces():
        return dispatch.traced().attention(q, k, v, mask, scale, softcap, window, lengths, sinks)
    more = softcap is not None or sinks is not None
    module = _module(q, k, v, mask, scale, more, window, lengths is not None)
    if module is flash:
        return flash.attention(q, k, v, scale)
    return module.attention(q, k, v, mask, scale, softcap, window, lengths, sinks)


def attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    packed: bool = False,
    sinks: bool = False,
) -> str:
    """Name what `attention` runs on such tensors without a mask; nothing is computed.

    Args:
        q: queries [B, T, Hq, D]; their values do not matter.
        k: keys [B, S, Hk, D].
        v: values [B, S, Hk, D].
        scale: what the scores are multiplied by; None for D^-0.5.
        softcap: the soft cap of the scores; None for none.
        window: how many positions a query may look back; None for all.
        packed: whether documents are packed along T.
        sinks: whether the heads have sinks.

    Returns:
        "cpu", "triton", "reference", or "flash" for torch's FlashAttention.
    """
    module = _module(q, k, v, None, scale, softcap is not None or sinks, window, packed)
    return module.__name__.rpartition(".")[2]


def _module(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    more: bool,
    window: int | None,
    packed: bool,
) -> ModuleType:
    """Return the module of this folder that attends; `more`: with a soft cap or sinks."""
    whole = window is None or window >= k.shape[1]  # no query is further back
    dense = mask is None and not packed and not more and whole
    if dense and flash.takes(q, k, v):
        return flash
    return dispatch.backend(
        __package__,
        q.device,
        cpu=cpu.fits(q, k, v, mask, scale),
        triton=mask is None and _walks_documents(q, k, v, dense),
    )


def _walks_documents(q: Tensor, k: Tensor, v: Tensor, dense: bool) -> bool:
    """Return whether the kernels of triton.py take the operands, and torch has no better ones.

    Triton's products need sm_80. Tiles of wide heads in fp32 do not fit in every GPU's memory.
    """
    if dense and pretend.kind_of(q.device) == "cpu":
        return False
    same = q.dtype == k.dtype == v.dtype and q.dtype in dispatch.FLOATS and k.shape == v.shape
    fits = same and q.shape[:2] == k.shape[:2] and q.shape[2] % k.shape[2] == 0
    widest = 128 if q.dtype == torch.float32 else 512
    if not fits or q.shape[3] != k.shape[3] or q.shape[3] > widest or not q.numel():
        return False
    return dispatch.compiles_to() == "amdgcn" or dispatch.capability(q.device) >= (8, 0)
