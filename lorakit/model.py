"""The one decoder. Families differ by ModelConfig fields; there is no class per family.

    x = embed(ids)
    for each layer:   x += attention(norm(x));   x += mlp(norm(x))
    logits = norm(x) head^T                       head = the embedding itself where they are tied

Parameter names are those of the published checkpoints (`model.layers.0.self_attn.q_proj.weight`),
so that loading is an assignment. Tied models have no `lm_head` at all: one tensor, one name.

Build it on the meta device and let `checkpoint.load_model` fill it; nothing here allocates weights
that are about to be overwritten. Shapes: B batch, T positions of this call, S positions with the
cache, Hq and Hk heads, D head_dim.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels
from .config import ModelConfig
from .rope import inverse_frequencies, rope_tables


class Cache(Protocol):
    """Keys and values of earlier positions, per layer (see generation.KVCache)."""

    length: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, Hk, D] of new positions; all of them so far: [B, S, Hk, D]."""


def _mask(positions: Tensor, S: int, window: int | None, real: Tensor | None) -> Tensor | None:
    """Which of S positions each of `positions` [T] may see: bool [T, S], with padding [B, 1, T, S].

    Not the future, nothing `window` or more positions back, no padding (`real` [B, S] is false
    there); but always itself, so that no row is empty. None where plain causal attention says all.
    """
    T = len(positions)
    slides = window is not None and window < S
    if real is None and not slides and T in (1, S):
        return None
    seen = torch.arange(S, device=positions.device)
    mask = seen <= positions[:, None]
    if slides:
        mask &= seen > positions[:, None] - window
    if real is None:
        return mask
    return ((mask & real[:, None]) | (seen == positions[:, None]))[:, None]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, bias = config.hidden_size, config.qkv_bias
        self.grouped = heads != kv_heads
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rope(q, k, *tables)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and T > 1,  # without a mask, S == T or T == 1
            enable_gqa=self.grouped,
        )
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head; the checkpoints call it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model.

    `gradient_checkpointing` (an attribute, off by default) keeps only each block's input for
    backward and computes the block again: less memory, one more forward pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = Trunk(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The final, normalized hidden states [B, T, hidden_size] of input_ids int64 [B, T].

        attention_mask [B, S]: true at real tokens, false at padding, on either side; positions
        count real tokens. With a cache, input_ids continue what it holds, and S includes that.
        """
        T = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + T, device=input_ids.device)
        position_ids, real = positions[None], None
        if attention_mask is not None:
            real = attention_mask.bool()
            position_ids = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
        windows = {self.config.window(i) for i in range(self.config.num_hidden_layers)}
        masks = {window: _mask(positions, past + T, window, real) for window in windows}
        freqs = inverse_frequencies(self.config.rope, self.config.head_dim, input_ids.device)
        tables = rope_tables(freqs, position_ids)
        x = self.model.embed_tokens(input_ids)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            mask = masks[self.config.window(i)]
            if recompute:
                x = checkpoint(block, x, tables, mask, cache, use_reentrant=False)
            else:
                x = block(x, tables, mask, cache)
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: [..., hidden_size] -> [..., vocab_size]."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] of input_ids int64 [B, T]. See `hidden_states` for the rest."""
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask, cache=cache)
        return self.head(hidden)

    def loss(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy of labels int64 [B, T], summed, and how many labels counted.

        Position t predicts label t + 1; labels of -100 do not count, and their hidden states never
        meet the head. Pad on the right: padding then lies in the future of every real token.
        """
        hidden, targets = self.hidden_states(input_ids)[:, :-1], labels[:, 1:]
        if self.lm_head is None:
            weight = self.model.embed_tokens.weight
        elif type(self.lm_head) is nn.Linear:
            weight = self.lm_head.weight
        else:  # a head that is quantized or adapted: its own forward, on the label positions only
            rows = (targets != -100).nonzero(as_tuple=True)
            return kernels.cross_entropy(self.lm_head(hidden[rows]), targets[rows])
        return kernels.linear_cross_entropy(hidden, weight, targets)
