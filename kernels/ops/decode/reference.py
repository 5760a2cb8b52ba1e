"""The decoding step in plain torch: the formulas of the package, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..swiglu.reference import activate


def decode_step(plan, ids, tables, cache, visible, wide=torch.float32) -> Tensor:
    """Logits [B, V] in `wide`, the dtype that everything but weights and cache is computed in."""

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


def _attention(plan, q, keys, values, slot, mask) -> Tensor:
    """q [B, Hq, D] over keys, values [B, S, Hk, D], without what mask [B, S or more] hides."""
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
