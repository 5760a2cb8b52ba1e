"""One block of the decoder, and what it is made of: norms, attention, the MLP, experts.

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
from lorakit.models.cache import Cache
from lorakit.models.config import ModelConfig
from lorakit.models.views import AttentionView

Recipe = tuple[Callable[[Tensor], Tensor], Tensor]
"""A function and its input, which together make a layer's input again.

Backward makes the input with it, so that forward need not keep it (see `kernels.lora_qkv`).
"""


class RMSNorm(nn.Module):
    """Divide the last dimension by its root mean square, and scale each of its numbers."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.weight_offset, self.casting_mode = config.norm_weight_offset, config.norm_casting_mode

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return x normalized; with a residual, the sum of both normalized, and that sum."""
        offset, casting = self.weight_offset, self.casting_mode
        if residual is None:
            return kernels.rms_norm(
                x, self.weight, self.eps, weight_offset=offset, casting_mode=casting
            )
        return kernels.add_rms_norm(
            x, residual, self.weight, self.eps, weight_offset=offset, casting_mode=casting
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

    def forward(
        self, x: Tensor, view: AttentionView, cache: Cache | None, recipe: Recipe | None
    ) -> Tensor:
        """Return attention's output for x [B, T, H]; `recipe` makes x again in backward."""
        B, T, _ = x.shape
        q, k, v = (
            y.view(B, T, y.shape[-1] // self.head_dim, self.head_dim)  # [B, T, Hq or Hk, D]
            for y in self._project(x, recipe)
        )
        q, k = self._rotate(q, k, view)
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

    def _project(self, x: Tensor, recipe: Recipe | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, the heads of each side by side."""
        layers = self.q_proj, self.k_proj, self.v_proj
        adapted = fused_weights(*layers)
        if adapted is None:
            q, k, v = (layer(x) for layer in layers)
        else:
            q, k, v = kernels.lora_qkv(x, adapted, again=recipe)
        return q, k, v

    def _rotate(self, q: Tensor, k: Tensor, view: AttentionView) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions, normalized first where the family does so."""
        if self.q_norm is None or self.k_norm is None:
            return kernels.rope(q, k, *view.tables)
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
    """The gated MLP: down(activation(gate(x)) * up(x)).

    An expert is one too; some families name its layers otherwise.
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

    def forward(self, x: Tensor, keep: bool = False, recipe: Recipe | None = None) -> Tensor:
        """Return the output for x [..., H].

        keep: whether gate(x) and up(x) are kept for backward, which otherwise computes them again;
            on a CPU they always are.
        recipe: how x is made again, if it is not to be kept.
        """
        layers = [self.get_submodule(name) for name in self.names]
        adapted = fused_weights(*layers)
        if adapted is None:
            gate, up, down = layers
            return down(kernels.gated(gate(x), up(x), self.hidden_act))
        keep = keep or x.device.type == "cpu"
        lora_gate, lora_up, lora_down = adapted
        return kernels.lora_mlp(
            x, lora_gate, lora_up, lora_down, self.hidden_act, keep=keep, again=recipe
        )


class MoE(nn.Module):
    """Experts in the MLP's place: a router picks a few for every token and weighs their outputs.

    The tokens are grouped by expert: an expert runs once, on all tokens that chose it, and one that
    none chose does not run. How many tokens meet in a product depends on all documents of a packed
    row, and matrix libraries sum a product of few rows in another order than one of many. So there
    every group is filled up to a multiple of ROWS: from so many on, the order stays the same.
    """

    ROWS = 16

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chosen, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        _, gate, up, down = config.moe_names
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size, (gate, up, down))
            for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor, packed: bool, keep: bool) -> Tensor:
        """Return the output for x [B, T, H]; `keep` as in MLP."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1, dtype=torch.float32).topk(self.chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # choices, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        groups = (order // self.chosen).split(counts)  # numbers of the tokens of each expert
        weights = weights.flatten()[order].split(counts)
        out = torch.zeros_like(tokens)
        for expert, group, weight in zip(self.experts, groups, weights, strict=True):
            if len(group):
                filling = -len(group) % self.ROWS if packed else 0
                found = expert(F.pad(tokens[group], (0, 0, 0, filling)), keep)[: len(group)]
                out.index_add_(0, group, (found * weight[:, None]).to(out.dtype))
        return out.view_as(x)


class Block(nn.Module):
    """Attention and the MLP, each on normalized input and added to what it was given.

    Gemma 2 and 3 also normalize what is added ("sandwich" norms). There
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

    def forward(self, x: Tensor, view: AttentionView, cache: Cache | None) -> Tensor:
        """Return x [B, T, H] with attention's and the MLP's outputs added."""
        # What the linear layers read is a norm of what is kept in any case. On a CPU it is cheap
        # to compute again; a block that runs again before its backward keeps nothing for long.
        again = x.device.type == "cpu" and not view.recomputed
        recipe = (self.input_layernorm, x) if again else None
        attended = self.self_attn(self.input_layernorm(x), view, cache, recipe)
        norm = self.pre_feedforward_layernorm
        if norm is None:
            norm = self.post_attention_layernorm
        else:
            attended = self.post_attention_layernorm(attended)
        normalized, x = norm(attended, x)
        added = self._feed_forward(normalized, view, (norm, x) if again else None)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        return x + added

    def _feed_forward(self, x: Tensor, view: AttentionView, recipe: Recipe | None) -> Tensor:
        if self.moe_name is None:
            return self.mlp(x, view.recomputed, recipe)
        packed = view.lengths is not None
        return self.get_submodule(self.moe_name)(x, packed, view.recomputed)
