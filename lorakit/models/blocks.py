"""One block of the decoder, and its parts: norms and attention; mlp.py has the rest.

    x += attention(norm(x))
    x += mlp(norm(x))

Families differ in where the norms stand. "pre" is the above. "post" (OLMo 2) has them on what is
added, x += norm(attention(x)), and "sandwich" (Gemma 2) on both sides.

Parameter names are those of the published files (`self_attn.q_proj.weight`), so that loading is an
assignment. Layers that a family publishes as one (`qkv_proj`) stay one: it is quantized and takes
adapters as such.

Layers that carry adapters and read one input (q, k and v; the whole MLP) are computed by one fused
kernel, unless one of them has to be called as it is.

Shapes: B rows, T positions of this call, S positions with those in the cache, Hq heads of queries,
Hk heads of keys and values, D numbers a head, H hidden size.
"""

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.adapted_layer import AdaptedLayer, fused_weights
from lorakit.models.cache import Storage
from lorakit.models.config import ModelConfig
from lorakit.models.mlp import MLP, Adapted, MoE, Recipe
from lorakit.models.views import AttentionView


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.weight_offset, self.casting_mode = config.norm_weight_offset, config.norm_casting_mode

    def forward(
        self, x: Tensor, residual: Tensor | None = None, room: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return x normalized; with a residual, return x + residual normalized, and the sum too.

        `room` is that of `kernels.rms_norm`.
        """
        offset, casting = self.weight_offset, self.casting_mode
        if residual is None:
            return kernels.rms_norm(
                x, self.weight, self.eps, weight_offset=offset, casting_mode=casting, room=room
            )
        return kernels.add_rms_norm(
            x,
            residual,
            self.weight,
            self.eps,
            weight_offset=offset,
            casting_mode=casting,
            room=room,
        )


class Attention(nn.Module):
    """Causal attention; several query heads may share one head of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        hidden, bias = config.hidden_size, config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.widths, self.qkv_proj = [queries, keys, keys], None
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=bias)
        else:
            self.q_proj = nn.Linear(hidden, queries, bias=bias)
            self.k_proj = nn.Linear(hidden, keys, bias=bias)
            self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        self.q_norm = self.k_norm = None
        if self.qk_norm != "none":
            whole = self.qk_norm == "whole"
            self.q_norm = RMSNorm(queries if whole else config.head_dim, config)
            self.k_norm = RMSNorm(keys if whole else config.head_dim, config)

    def adapted(self) -> Adapted:
        """Return q, k and v as the fused kernels take them, or None."""
        if self.qkv_proj is not None:
            return None
        return fused_weights(self.q_proj, self.k_proj, self.v_proj)

    def forward(
        self,
        x: Tensor,
        view: AttentionView,
        cache: Storage | None,
        adapted: Adapted,
        room: int,
        recipe: Recipe | None,
    ) -> Tensor:
        """Return attention's output.

        Args:
            x: [B, T, H].
            view: What the positions see.
            cache: The keys and values of earlier calls, if there are any.
            adapted: What the method of that name returned for this pass.
            room: Of `kernels.lora_room`, which x was made with.
            recipe: Computes x again in backward; None: x is kept.
        """
        B, T, _ = x.shape
        q, k, v = (
            y.view(B, T, y.shape[-1] // self.head_dim, self.head_dim)  # [B, T, Hq or Hk, D]
            for y in self._project(x, adapted, room, recipe)
        )
        q, k = self._rotate(q, k, view, inplace=room > 0)
        if view.query_scale is not None:
            q = q * view.query_scale.to(q.dtype)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, S, Hk, D]
        attended = kernels.attention(
            q,
            k,
            v,
            mask=view.mask,
            scale=self.scale,
            softcap=self.softcap,
            window=view.window,
            lengths=view.lengths,
        )
        return self.o_proj(attended.reshape(B, T, -1))

    def _project(
        self, x: Tensor, adapted: Adapted, room: int, recipe: Recipe | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, Hq D], keys and values [B, T, Hk D]."""
        if self.qkv_proj is not None:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        elif adapted is None:
            q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = kernels.lora_qkv(x, adapted, again=recipe, room=room)
        if self.qk_norm == "whole":
            assert self.q_norm is not None
            assert self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rotate(
        self, q: Tensor, k: Tensor, view: AttentionView, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions; some families normalize them first.

        In place where they share their memory with v, which keeps it in any case.
        """
        if self.qk_norm != "head":
            return kernels.rope(q, k, *view.tables, inplace=inplace)
        assert self.q_norm is not None
        assert self.k_norm is not None
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, AdaptedLayer) and norm.only_module() is None:
                # each row of the batch has weights of its own
                return kernels.rope(self.q_norm(q), self.k_norm(k), *view.tables)
        return kernels.norm_rope(
            q,
            k,
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            *view.tables,
            weight_offset=self.q_norm.weight_offset,
            casting_mode=self.q_norm.casting_mode,
        )


class Block(nn.Module):
    """Attention, then the MLP, and the norms where the family has them.

    Gemma 2 and 3 normalize inputs and outputs ("sandwich"). There and in OLMo 2 ("post")
    post_attention_layernorm is the norm of attention's output; in other families it is the norm
    before the MLP. The names are those of the published files.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        hidden, placement = config.hidden_size, config.norm_placement
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = None if placement == "post" else RMSNorm(hidden, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if placement == "sandwich":
            self.pre_feedforward_layernorm = RMSNorm(hidden, config)
        if placement != "pre":
            self.post_feedforward_layernorm = RMSNorm(hidden, config)
        self.moe_name: str | None = None
        if config.has_experts(layer):
            self.moe_name = config.moe_names[0]
            self.add_module(self.moe_name, MoE(config))
        else:
            self.mlp = MLP(config, config.intermediate_size)

    def forward(
        self, x: Tensor, added: Tensor | None, view: AttentionView, cache: Storage | None
    ) -> tuple[Tensor, Tensor]:
        """Return x [B, T, H] with attention's output added, and the MLP's output.

        The caller adds the two, or lets the next norm do it, which reads them in any case. `added`
        is what is to be added to x here.
        """
        if self.input_layernorm is None:
            return self._norms_after(x if added is None else x + added, view, cache)
        adapted = self.self_attn.adapted()
        room = _room(x, adapted)
        if added is None:
            normalized = self.input_layernorm(x, room=room)
        else:
            normalized, x = self.input_layernorm(added, x, room)
        # The linear layers read norms of tensors that backward keeps in any case. On a CPU a norm
        # is cheap to compute again, so it is not kept. A block that runs again right before its
        # backward keeps nothing for long, and may keep the norms as well.
        again = x.device.type == "cpu" and not view.recomputed
        recipe = (self.input_layernorm, x) if again else None
        attended = self.self_attn(normalized, view, cache, adapted, room, recipe)
        norm = self.pre_feedforward_layernorm
        if norm is None:
            norm = self.post_attention_layernorm
        else:
            attended = self.post_attention_layernorm(attended)
        adapted = self.mlp.adapted() if self.moe_name is None else None
        room = _room(x, adapted and adapted[:2])
        # norm(attended + x), and attended + x
        normalized, x = norm(self._scaled(attended), x, room)
        recipe = (norm, x) if again else None
        added = self._feed_forward(normalized, view, adapted, room, recipe)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        return x, self._scaled(added)

    def _norms_after(
        self, x: Tensor, view: AttentionView, cache: Storage | None
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, for a block that normalizes outputs alone."""
        attended = self.self_attn(x, view, cache, self.self_attn.adapted(), 0, None)
        x = x + self._scaled(self.post_attention_layernorm(attended))
        adapted = self.mlp.adapted() if self.moe_name is None else None
        added = self._feed_forward(x, view, adapted, 0, None)
        assert self.post_feedforward_layernorm is not None
        return x, self._scaled(self.post_feedforward_layernorm(added))

    def _feed_forward(
        self, x: Tensor, view: AttentionView, adapted: Adapted, room: int, recipe: Recipe | None
    ) -> Tensor:
        """Return the output of the MLP, or of the experts in its place, for x [B, T, H]."""
        if self.moe_name is None:
            return self.mlp(x, view.keeps, adapted, room, recipe)
        return self.get_submodule(self.moe_name)(x, view.lengths is not None, view.keeps)

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.residual_multiplier == 1 else added * self.residual_multiplier


def _room(x: Tensor, adapted: Adapted) -> int:
    """Return the room that layers want beside the rows of a norm of x [B, T, H]."""
    return 0 if adapted is None else kernels.lora_room(x, adapted)
