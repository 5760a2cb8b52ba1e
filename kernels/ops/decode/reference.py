"""The decoding step in plain torch: the formulas of `__init__.py`, one after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..swiglu.reference import activate
from .plan import DecodeCache, DecodePlan


@torch.no_grad()
def decode_tokens(
    plan: DecodePlan,
    ids: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    cache: DecodeCache,
    slots: Sequence[tuple[int, int]],
    visible: Sequence[Tensor | None] | None,
) -> Tensor:
    """Take ids [B, T] through the decoder, one token after another: the logits after the last."""
    (B, T), D = ids.shape, plan.head_dim
    tables = [(cos.view(B, T, D // 2), sin.view(B, T, D // 2)) for cos, sin in tables]
    for t in range(T):
        at = [(cos[:, t], sin[:, t]) for cos, sin in tables]
        layers = [
            (keys, values, slot + t, count - T + 1 + t)
            for keys, values, (slot, count) in zip(cache.keys, cache.values, slots, strict=True)
        ]
        logits = decode_step(plan, ids[:, t], at, layers, visible)
    return logits


def decode_step(
    plan: DecodePlan,
    ids: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    cache: Sequence[tuple[Tensor, Tensor, int, int]],
    visible: Sequence[Tensor | None] | None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """Take ids [B] through the decoder: the logits [B, V] in `wide`.

    `cache` has keys, values, slot and count of each layer. Everything but weights and cache is
    computed in the dtype `wide`.
    """

    def norm(x, weight):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + plan.eps)
        return x * scale * (weight.to(wide) + plan.norm_weight_offset)

    def linear(x, weight, bias=None):
        return F.linear(x, weight.to(wide), None if bias is None else bias.to(wide))

    B = len(ids)
    x = plan.embedding[ids].to(wide) * plan.embedding_scale
    for i, layer in enumerate(plan.layers):
        normed = norm(x, layer.input_norm)
        q = linear(normed, layer.q, layer.q_bias).view(B, plan.num_heads, plan.head_dim)
        k = linear(normed, layer.k, layer.k_bias).view(B, plan.num_kv_heads, plan.head_dim)
        v = linear(normed, layer.v, layer.v_bias).view(B, plan.num_kv_heads, plan.head_dim)
        if layer.q_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        cos, sin = (table.to(wide)[:, None] for table in tables[layer.rope])  # [B, 1, D/2]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        keys, values, slot, count = cache[i]
        keys[:, slot], values[:, slot] = k.to(keys.dtype), v.to(values.dtype)
        mask = None if visible is None else visible[i]
        attended = _attention(plan, q, keys[:, :count], values[:, :count], slot, mask)
        delta = linear(attended.flatten(1), layer.o, layer.o_bias)
        sandwich = layer.pre_feedforward_norm is not None
        x = x + (norm(delta, layer.post_attention_norm) if sandwich else delta)
        normed = norm(x, layer.pre_feedforward_norm if sandwich else layer.post_attention_norm)
        gate = activate(linear(normed, layer.gate, layer.gate_bias), plan.activation)
        delta = linear(gate * linear(normed, layer.up, layer.up_bias), layer.down, layer.down_bias)
        x = x + (norm(delta, layer.post_feedforward_norm) if sandwich else delta)
    return _capped(linear(norm(x, plan.norm), plan.head), plan.final_softcap)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def _attention(
    plan: DecodePlan, q: Tensor, keys: Tensor, values: Tensor, slot: int, mask: Tensor | None
) -> Tensor:
    """Attend with q [B, Hq, D] to keys and values [B, S, Hk, D] that mask [B, S or more] shows."""
    B, S, Hk, D = keys.shape
    if mask is not None:
        hidden = ~mask[:, :S]
        hidden[:, slot] = False
        # what is in a hidden slot, even NaN, must not get out through 0 * NaN
        keys = keys.masked_fill(hidden[:, :, None, None], 0)
        values = values.masked_fill(hidden[:, :, None, None], 0)
    q = q.view(B, Hk, -1, D)  # heads that share a key are neighbours
    scores = torch.einsum("bhgd,bshd->bhgs", q, keys.to(q.dtype)) * plan.attention_scale
    scores = _capped(scores, plan.attn_softcap)
    if mask is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return torch.einsum("bhgs,bshd->bhgd", scores.softmax(-1), values.to(q.dtype))
