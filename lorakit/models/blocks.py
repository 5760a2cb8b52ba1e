"""One block of the decoder, and its parts: norms and attention; mlp.py has the rest.

    x += attention(norm(x))
    x += mlp(norm(x))

Some layers have linear attention in attention's place; linear_attention.py has it.

Families differ in where the norms stand. "pre" is the above. "post" (OLMo 2) has them on what is
added, x += norm(attention(x)), and "sandwich" (Gemma 2) on both sides. Gemma 4 adds experts to
the MLP's output, reads a second embedding at the end of a block (per_layer.py), and multiplies what
a block returns by a number.

Parameter names are those of the published files (`self_attn.q_proj.weight`), so that loading is an
assignment. Layers that a family publishes as one (`qkv_proj`) stay one: it is quantized and takes
adapters as such.

Layers that carry adapters and read one input (q, k and v; the whole MLP) are computed by one fused
kernel, unless one of them has to be called as it is.

Shapes: B rows, T positions of this call, S positions with those in the cache, Hq heads of queries,
Hk heads of keys and values, D numbers a head, H hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.kernels import pretend
from lorakit.models.adapted_layer import AdaptedLayer, fused_weights
from lorakit.models.cache import SharedKeys, Storage
from lorakit.models.config import ModelConfig
from lorakit.models.linear_attention import LinearAttention
from lorakit.models.mlp import MLP, Adapted, Experts, MoE, Recipe, Router
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
    """Causal attention; several query heads may share one head of keys and values.

    Some layers have no v_proj: their values are made of what k_proj returns. Some have neither, and
    see the keys and values of an earlier layer.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.layer_head_dim(layer)
        self.source = config.kv_source(layer)
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        hidden, bias = config.hidden_size, config.qkv_bias
        queries = config.num_attention_heads * self.head_dim
        keys = config.layer_kv_heads(layer) * self.head_dim
        own_keys = self.source is None
        own_values = own_keys and config.has_values(layer)
        self.widths, self.qkv_proj = [queries, keys, keys], None
        self.gated = config.attention_gate
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=bias)
        else:
            width = queries * (2 if self.gated else 1)
            self.q_proj = nn.Linear(hidden, width, bias=bias)
            self.k_proj = nn.Linear(hidden, keys, bias=bias) if own_keys else None
            self.v_proj = nn.Linear(hidden, keys, bias=bias) if own_values else None
        self.o_proj = nn.Linear(queries, hidden, bias=config.o_bias)
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.qk_norm, self.eps = config.qk_norm, config.rms_norm_eps
        self.v_norm = config.v_norm
        self.q_norm = self.k_norm = None
        if self.qk_norm != "none":
            whole = self.qk_norm == "whole"
            self.q_norm = RMSNorm(queries if whole else self.head_dim, config)
            if own_keys:
                self.k_norm = RMSNorm(keys if whole else self.head_dim, config)

    def adapted(self) -> Adapted:
        """Return q, k and v as the fused kernels take them, or None."""
        return None if self.qkv_proj is not None else fused_weights(*self._layers())

    def _layers(self) -> list[nn.Module]:
        """Return those of q_proj, k_proj and v_proj that there are."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [layer for layer in layers if layer is not None]

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
        q, *own = (
            y.view(B, T, y.shape[-1] // self.head_dim, self.head_dim)  # [B, T, Hq or Hk, D]
            for y in self._project(x, adapted, room, recipe)
        )
        gate = None
        if self.gated:  # each head's queries, then its gate
            q, gate = q[:, :, ::2], q[:, :, 1::2]
        if not own:
            assert isinstance(cache, SharedKeys)  # the decoder makes one for such a model
            assert self.source is not None
            q, _ = self._rotate(q, q[:, :, :0], view, inplace=room > 0)
            k, v = cache.of(self.source)  # [B, S, Hk, D]
        else:
            k, v = own[0], own[-1]
            if self.v_norm:
                v = F.rms_norm(v, (self.head_dim,), eps=self.eps)
            q, k = self._rotate(q, k, view, inplace=room > 0)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)  # [B, S, Hk, D]
        if view.query_scale is not None:
            q = q * view.query_scale.to(q.dtype)
        attended = kernels.attention(
            q,
            k,
            v,
            mask=view.mask,
            scale=self.scale,
            softcap=self.softcap,
            window=view.window,
            lengths=view.lengths,
            sinks=self.sinks,
        )
        if gate is not None:
            attended = attended * gate.sigmoid()
        return self.o_proj(attended.reshape(B, T, -1))

    def _project(
        self, x: Tensor, adapted: Adapted, room: int, recipe: Recipe | None
    ) -> Sequence[Tensor]:
        """Return queries [B, T, Hq D], keys and values [B, T, Hk D], as far as there are layers."""
        made: Sequence[Tensor]
        if self.qkv_proj is not None:
            made = self.qkv_proj(x).split(self.widths, dim=-1)
        elif adapted is None:
            made = [layer(x) for layer in self._layers()]
        else:
            made = kernels.lora_qkv(x, adapted, again=recipe, room=room)
        if self.qk_norm == "whole":
            assert self.q_norm is not None
            assert self.k_norm is not None
            q, k, v = made
            made = self.q_norm(q), self.k_norm(k), v
        return made

    def _rotate(
        self, q: Tensor, k: Tensor, view: AttentionView, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions; some families normalize them first.

        In place where they share their memory with v, which keeps it in any case. Where a layer has
        no keys, k has no heads.
        """
        if self.qk_norm != "head":
            return kernels.rope(q, k, *view.tables, inplace=inplace)
        assert self.q_norm is not None
        k_norm = self.q_norm if self.k_norm is None else self.k_norm
        for norm in (self.q_norm, k_norm):
            if isinstance(norm, AdaptedLayer) and norm.only_module() is None:
                # each row of the batch has weights of its own
                return kernels.rope(self.q_norm(q), k_norm(k), *view.tables)
        return kernels.norm_rope(
            q,
            k,
            self.q_norm.weight,
            k_norm.weight,
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
        self.self_attn: Attention | None = None
        self.linear_attn: LinearAttention | None = None
        if config.is_linear(layer):
            self.linear_attn = LinearAttention(config, layer)
        else:
            self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if placement == "sandwich":
            self.pre_feedforward_layernorm = RMSNorm(hidden, config)
        if placement != "pre":
            self.post_feedforward_layernorm = RMSNorm(hidden, config)
        self.moe_name: str | None = None
        self.router: Router | None = None
        if config.has_experts(layer) and not config.moe_beside_mlp:
            self.moe_name = config.moe_names[0]
            self.add_module(self.moe_name, MoE(config))
        else:
            self.mlp = MLP(config, config.mlp_width(layer))
        if config.has_experts(layer) and config.moe_beside_mlp:
            self.router, self.experts = Router(config), Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, config)
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, config)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, config)
        self.hidden_act, inner = config.hidden_act, config.hidden_size_per_layer_input
        if inner:
            self.per_layer_input_gate = nn.Linear(hidden, inner, bias=False)
            self.per_layer_projection = nn.Linear(inner, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, config)
        self.layer_scalar: nn.Parameter | None = None
        if config.layer_scalar:  # the families that have it do not train it
            self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)

    @property
    def mixer(self) -> Attention | LinearAttention:
        """The part that lets positions see one another."""
        mixer = self.self_attn or self.linear_attn
        assert mixer is not None
        return mixer

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        view: AttentionView,
        cache: Storage | None,
        per_layer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return x [B, T, H] with attention's output added, and the MLP's output.

        The caller adds the two, or lets the next norm do it, which reads them in any case. None
        stands for no output that is still to be added.

        Args:
            x: [B, T, H].
            added: What is to be added to x here, if there is anything.
            view: What the positions see.
            cache: The keys and values of earlier calls, if there are any.
            per_layer: The layer's part of the second embedding [B, T, P], if the model has one.
        """
        if self.input_layernorm is None:
            return self._norms_after(x if added is None else x + added, view, cache)
        mixer = self.mixer
        adapted = mixer.adapted()
        room = _room(x, adapted)
        if added is None:
            normalized = self.input_layernorm(x, room=room)
        else:
            normalized, x = self.input_layernorm(added, x, room)
        # The linear layers read norms of tensors that backward keeps in any case. On a CPU a norm
        # is cheap to compute again, so it is not kept. A block that runs again right before its
        # backward keeps nothing for long, and may keep the norms as well.
        again = pretend.kind_of(x.device) == "cpu" and not view.recomputed
        recipe = (self.input_layernorm, x) if again else None
        attended = mixer(normalized, view, cache, adapted, room, recipe)
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
        if self.router is not None:
            added = self.post_feedforward_layernorm_1(added) + self._routed(x, view)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        return self._end(x, self._scaled(added), per_layer)

    def _routed(self, x: Tensor, view: AttentionView) -> Tensor:
        """Return the normalized output of the experts beside the MLP, for x [B, T, H]."""
        assert self.router is not None
        picked, weights = self.router(x.flatten(0, -2))
        tokens = self.pre_feedforward_layernorm_2(x).flatten(0, -2)
        options = view.lengths is not None, view.keeps, view.recomputed
        found = self.experts(tokens, picked, weights, *options)
        return self.post_feedforward_layernorm_2(found.view_as(x))

    def _end(
        self, x: Tensor, added: Tensor, per_layer: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `forward` does, after what Gemma 4 has at the end of a block."""
        if per_layer is not None:
            x = x + added
            read = kernels.gated(self.per_layer_input_gate(x), per_layer, self.hidden_act)
            added = self.post_per_layer_input_norm(self.per_layer_projection(read))
        if self.layer_scalar is None:
            return x, added
        return (x + added) * self.layer_scalar, None

    def _norms_after(
        self, x: Tensor, view: AttentionView, cache: Storage | None
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, for a block that normalizes outputs alone."""
        attended = self.mixer(x, view, cache, self.mixer.adapted(), 0, None)
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
            return self.mlp(x, view.keeps, adapted, room, recipe, view.recomputed)
        options = view.lengths is not None, view.keeps, view.recomputed
        return self.get_submodule(self.moe_name)(x, *options)

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.residual_multiplier == 1 else added * self.residual_multiplier


def _room(x: Tensor, adapted: Adapted) -> int:
    """Return the room that layers want beside the rows of a norm of x [B, T, H]."""
    return 0 if adapted is None else kernels.lora_room(x, adapted)
