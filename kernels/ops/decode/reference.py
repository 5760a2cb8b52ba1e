"""The decoding step in plain torch: the formulas of `__init__.py`, one after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frozen_linear.dense import dequantize, dequantize_rows
from ..swiglu.reference import activate
from .plan import DecodeCache, DecodePlace, DecodePlan


@torch.no_grad()
def decode_tokens(
    plan: DecodePlan,
    ids: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    cache: DecodeCache,
    places: Sequence[DecodePlace],
    adapters: Sequence[int | None] | None,
) -> Tensor:
    """Take ids [B, T] through the decoder, one token after another: the logits after the last."""
    (B, T), D = ids.shape, plan.head_dim
    tables = [(cos.view(B, T, D // 2), sin.view(B, T, D // 2)) for cos, sin in tables]
    for t in range(T):
        at = [(cos[:, t], sin[:, t]) for cos, sin in tables]
        now = [DecodePlace(position + t, pages) for position, pages in places]
        logits = decode_step(plan, ids[:, t], at, cache, now, adapters)
    return logits


def decode_step(
    plan: DecodePlan,
    ids: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    cache: DecodeCache,
    places: Sequence[DecodePlace],
    adapters: Sequence[int | None] | None = None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """Take ids [B] through the decoder: the logits [B, V] in `wide`.

    Everything but weights and cache is computed in the dtype `wide`.
    """

    def norm(x, weight):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + plan.eps)
        return x * scale * (weight.to(wide) + plan.norm_weight_offset)

    def linear(x, weight, bias=None):
        dense = weight if isinstance(weight, Tensor) else dequantize(weight, torch.float32)
        return F.linear(x, dense.to(wide), None if bias is None else bias.to(wide))

    def adapted(x, i, name):
        layer = plan.layers[i]._asdict()
        y = linear(x, layer[name], layer[f"{name}_bias"])
        for b, adapter in enumerate(adapters or ()):
            update = None if adapter is None else plan.adapters[adapter][i].get(name)
            if update is not None:
                y[b] += update.scale * (update.B.to(wide) @ (update.A.to(wide) @ x[b]))
        return y

    B = len(ids)
    x = _embedded(plan, ids).to(wide) * plan.embedding_scale
    for i, layer in enumerate(plan.layers):
        normed = norm(x, layer.input_norm)
        q = adapted(normed, i, "q").view(B, plan.num_heads, plan.head_dim)
        k = adapted(normed, i, "k").view(B, plan.num_kv_heads, plan.head_dim)
        v = adapted(normed, i, "v").view(B, plan.num_kv_heads, plan.head_dim)
        if layer.q_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        cos, sin = (table.to(wide)[:, None] for table in tables[layer.rope])  # [B, 1, D/2]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        keys, values, kind = cache.keys[i], cache.values[i], cache.kind_of[i]
        attended = torch.empty_like(q)
        for b, (position, pages) in enumerate(places):
            window = cache.reach[kind]
            first = 0 if window is None else max(0, position + 1 - window)
            seen = torch.arange(first, position + 1)
            page, slot = torch.tensor(pages[kind])[seen // cache.size], seen % cache.size
            keys[page[-1], slot[-1]] = k[b].to(keys.dtype)
            values[page[-1], slot[-1]] = v[b].to(values.dtype)
            attended[b] = _attention(plan, q[b], keys[page, slot], values[page, slot])
        delta = adapted(attended.flatten(1), i, "o")
        sandwich = layer.pre_feedforward_norm is not None
        x = x + (norm(delta, layer.post_attention_norm) if sandwich else delta)
        normed = norm(x, layer.pre_feedforward_norm if sandwich else layer.post_attention_norm)
        gate = activate(adapted(normed, i, "gate"), plan.activation)
        delta = adapted(gate * adapted(normed, i, "up"), i, "down")
        x = x + (norm(delta, layer.post_feedforward_norm) if sandwich else delta)
    return _capped(linear(norm(x, plan.norm), plan.head), plan.final_softcap)


def _embedded(plan: DecodePlan, ids: Tensor) -> Tensor:
    if isinstance(plan.embedding, Tensor):
        return plan.embedding[ids]
    return dequantize_rows(plan.embedding, ids, torch.float32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def _attention(plan: DecodePlan, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with q [Hq, D] to keys and values [S, Hk, D]: [Hq, D]."""
    _, Hk, D = keys.shape
    q = q.view(Hk, -1, D)  # heads that share a key are neighbours
    scores = torch.einsum("hgd,shd->hgs", q, keys.to(q.dtype)) * plan.attention_scale
    scores = _capped(scores, plan.attn_softcap)
    return torch.einsum("hgs,shd->hgd", scores.softmax(-1), values.to(q.dtype)).reshape(-1, D)
