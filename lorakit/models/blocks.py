"""One block of the decoder, and its parts: norms, attention, the MLP, experts.

    x += attention(norm(x))
    x += mlp(norm(x))

Parameter names are those of the published files (`self_attn.q_proj.weight`), so that loading is an
assignment. Experts are plain linear layers under their published names, one module each, so that
they are quantized and take adapters like any other.

Layers that carry adapters and read one input (q, k and v; the whole MLP) are computed by one fused
kernel, unless one of them has to be called as it is.

Shapes: B rows, T positions of this call, S positions with those in the cache, Hq heads of queries,
Hk heads of keys and values, D numbers a head, H hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.adapted_layer import fused_weights
from lorakit.models.cache import Storage
from lorakit.models.config import ModelConfig
from lorakit.models.expert_layers import expert_layers
from lorakit.models.views import AttentionView

Recipe = tuple[Callable[[Tensor], Tensor], Tensor]
"""A function and its argument, whose result is the input of a layer.

Backward computes that input again with it, so that forward need not keep it (see
`kernels.lora_qkv`).
"""

Adapted = list[kernels.LoraWeights] | None
"""Layers that share an input, as the fused kernels take them; None if one is to be called."""


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
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)

    def adapted(self) -> Adapted:
        """Return q, k and v as the fused kernels take them, or None."""
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
        if adapted is None:
            q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = kernels.lora_qkv(x, adapted, again=recipe, room=room)
        return q, k, v

    def _rotate(
        self, q: Tensor, k: Tensor, view: AttentionView, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions; some families normalize them first.

        In place where they share their memory with v, which keeps it in any case.
        """
        if self.q_norm is None or self.k_norm is None:
            return kernels.rope(q, k, *view.tables, inplace=inplace)
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


class MLP(nn.Module):
    """The gated MLP: y = down(activation(gate(x)) * up(x)).

    An expert is such an MLP too; some families give its layers other names.
    """

    def __init__(
        self,
        config: ModelConfig,
        inner: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.names, self.hidden_act = names, config.hidden_act
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, inner, bias=bias))
        self.add_module(up, nn.Linear(hidden, inner, bias=bias))
        self.add_module(down, nn.Linear(inner, hidden, bias=bias))

    def adapted(self) -> Adapted:
        """Return gate, up and down as the fused kernels take them, or None."""
        return fused_weights(*[self.get_submodule(name) for name in self.names])

    def forward(
        self, x: Tensor, keep: bool, adapted: Adapted, room: int = 0, recipe: Recipe | None = None
    ) -> Tensor:
        """Return y [..., H].

        Args:
            x: [..., H].
            keep: Whether gate(x) and up(x) are kept for backward, which otherwise computes them
                again.
            adapted: What the method of that name returned for this pass.
            room: Of `kernels.lora_room` for gate and up, which x was made with.
            recipe: Computes x again in backward; None: x is kept.
        """
        if adapted is None:
            gate, up, down = (self.get_submodule(name) for name in self.names)
            return down(kernels.gated(gate(x), up(x), self.hidden_act))
        lora_gate, lora_up, lora_down = adapted
        return kernels.lora_mlp(
            x,
            lora_gate,
            lora_up,
            lora_down,
            self.hidden_act,
            keep=keep,
            again=recipe,
            room=room,
        )


class MoE(nn.Module):
    """Experts in the MLP's place: a router picks a few for every token and weighs their outputs.

    The tokens are grouped by expert. On a GPU all experts run together, and the host does not ask
    how many tokens each has (`kernels.expert_mlp`). Elsewhere an expert runs by itself, once, on
    all tokens that it was picked for, and not at all if there are none. So it does on a GPU for a
    few tokens, and if an expert is more than frozen layers with low-rank updates.

    A packed row needs care, since no document may change a bit of another's result. The documents
    share the groups, and matrix libraries sum a product of few rows in another order than one of
    many. So the groups of a packed row are filled up to a multiple of ROWS; from that many rows on,
    the order stays the same. How many tokens a packed row has does not decide how it is computed.
    """

    ROWS = 16

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.per_token, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        _, gate, up, down = config.moe_names
        self.names, self.hidden_act = (gate, up, down), config.hidden_act
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size, self.names) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor, packed: bool, keep: bool) -> Tensor:
        """Return the output for x [B, T, H].

        Args:
            x: [B, T, H].
            packed: Whether x is one row of packed documents.
            keep: As in MLP.
        """
        tokens = x.reshape(-1, x.shape[-1])  # [n, H]
        probs = self.gate(tokens).softmax(-1, dtype=torch.float32)  # [n, experts]
        weights, picked = probs.topk(self.per_token)  # [n, per_token]
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        few = picked.numel() < len(self.experts) and not packed  # most experts have no token
        layers = None if few else self.together(tokens)
        if layers is not None:
            gate, up, down = layers
            act = self.hidden_act
            out = kernels.expert_mlp(tokens, picked, weights, gate, up, down, act, keep=keep)
        else:
            out = self._one_by_one(tokens, picked, weights, packed, keep)
        return out.view_as(x)

    def together(self, tokens: Tensor) -> list[kernels.ExpertLayers] | None:
        """Return the layers of all experts, if the kernels compute them together.

        Of the tokens only dtype and device count. What a packed row computes follows from this
        alone.
        """
        if not kernels.dispatch.triton_runs(tokens):
            return None
        if torch.is_autocast_enabled(tokens.device.type):
            return None
        layers = expert_layers(self.experts, self.names)
        return layers if layers is not None and kernels.takes_experts(tokens, *layers) else None

    def _one_by_one(
        self, tokens: Tensor, picked: Tensor, weights: Tensor, packed: bool, keep: bool
    ) -> Tensor:
        """Return the output for tokens [n, H], one expert after the other."""
        order = picked.flatten().argsort(stable=True)  # numbers of the picks, by expert
        counts = picked.flatten().bincount(minlength=len(self.experts)).tolist()
        groups = (order // self.per_token).split(counts)  # numbers of the tokens of each expert
        group_weights = weights.flatten()[order].split(counts)
        out = torch.zeros_like(tokens)
        for expert, group, weight in zip(self.experts, groups, group_weights, strict=True):
            if len(group):
                assert isinstance(expert, MLP)  # as it was made
                filling = -len(group) % self.ROWS if packed else 0
                own = F.pad(tokens[group], (0, 0, 0, filling))
                found = expert(own, keep, expert.adapted())[: len(group)]
                out.index_add_(0, group, (found * weight[:, None]).to(out.dtype))
        return out


class Block(nn.Module):
    """Attention, then the MLP; each reads a norm of x, and its output is added to x.

    Gemma 2 and 3 also normalize the outputs before they are added ("sandwich" norms). There
    post_attention_layernorm is the norm of attention's output; in other families it is the norm
    before the MLP. The names are those of the published files.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm = RMSNorm(hidden, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if config.sandwich_norm:
            self.pre_feedforward_layernorm = RMSNorm(hidden, config)
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
        normalized, x = norm(attended, x, room)  # norm(attended + x), and attended + x
        if self.moe_name is None:
            recipe = (norm, x) if again else None
            added = self.mlp(normalized, view.keeps, adapted, room, recipe)
        else:
            packed = view.lengths is not None
            added = self.get_submodule(self.moe_name)(normalized, packed, view.keeps)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        return x, added


def _room(x: Tensor, adapted: Adapted) -> int:
    """Return the room that layers want beside the rows of a norm of x [B, T, H]."""
    return 0 if adapted is None else kernels.lora_room(x, adapted)
