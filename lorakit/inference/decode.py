"""One token after another: the step from a token to the logits of the next one.

The decoder module computes a step of one new token per row as some 15 small ops a layer, and on a
CPU calling them costs more than reading the weights. Where a model consists of plain linear layers,
`kernels.decode_step` does the whole step in one compiled call. That needs dense weights in fp32 or
bf16 (merged adapters included), no experts, no hooks, and at most 32 rows.
"""

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.inference.kv_cache import KVCache
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.blocks import Block, RMSNorm
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.rope import rope_tables

COMPILED_ROWS = 32
"""Most rows that the compiled step takes: the most for which it was measured (docs/dev/LOG.md)."""
_PROMPT_TOKENS = 64
"""Tokens of a prompt, of all rows together, that one compiled call takes."""


class Decoding:
    """The state of a batch whose texts are being continued; decoding(ids) takes its next tokens."""

    def __init__(self, model: Decoder, padding: list[int], capacity: int):
        """Begin a batch.

        Args:
            model: The model.
            padding: Number of padding columns on the left of each row.
            capacity: Number of positions that a row may reach, padding included. Those of a learned
                prompt, with which the cache begins, come on top.
        """
        rows, device = len(padding), model.device
        self.model = model
        self.prompt_length = model.beginning.length
        capacity += self.prompt_length
        self.cache = KVCache(model.config, rows, capacity, model.dtype, device)
        model.beginning(model, self.cache, rows)
        self.padding = torch.tensor(padding, device=device)
        self.real: Tensor | None = None  # bool [B, capacity], false at padding
        if any(padding):
            columns = torch.arange(capacity, device=device)
            first = self.prompt_length + self.padding[:, None]
            self.real = (columns < self.prompt_length) | (columns >= first)
        plan = _plan(model) if rows <= COMPILED_ROWS else None
        self.compiled: _CompiledStep | None = None
        if plan is not None:
            self.compiled = _CompiledStep(plan, model.config, self.cache, capacity)
        # On a processor without AVX-512, torch's bf16 products run at a seventh of the speed of its
        # fp32 ones; there prompts take the compiled step too.
        slow_bf16 = torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.compiled_prompts = model.dtype == torch.bfloat16 and slow_bf16

    def __call__(self, ids: Tensor) -> Tensor:
        """Take ids int64 [B, T], which follow those of earlier calls.

        Returns:
            The logits of the token after them, fp32 [B, V].
        """
        B, T = ids.shape
        if self.compiled is not None and T == 1:
            return self.compiled(ids, self.padding, self.real)
        if self.compiled is not None and self.compiled_prompts and self.compiled.has_room(T):
            for part in ids.split(max(1, _PROMPT_TOKENS // B), dim=1):
                logits = self.compiled(part, self.padding, self.real)
            return logits
        real = self.real
        if real is not None:
            real = real[:, self.prompt_length : self.cache.length + T]
        hidden = self.model.hidden_states(ids, attention_mask=real, cache=self.cache)
        return self.model.head(hidden[:, -1]).float()


class _CompiledStep:
    """`kernels.decode_step` for a model and the cache of one batch."""

    def __init__(
        self, plan: kernels.DecodePlan, config: ModelConfig, cache: KVCache, capacity: int
    ):
        self.plan, self.cache = plan, cache
        columns = torch.arange(capacity)
        self.tables = [rope_tables(rope, config.head_dim, columns) for rope in config.ropes]
        self.memory = kernels.DecodeCache(plan, cache.keys, cache.values)
        self.sizes = set(cache.sizes)

    def has_room(self, new: int) -> bool:
        """Return whether `new` tokens fit without wrapping round the window of a layer."""
        return self.cache.length + new <= min(self.sizes)

    def __call__(self, ids: Tensor, padding: Tensor, real: Tensor | None) -> Tensor:
        """Take ids, and put their keys and values into the cache.

        Args:
            ids: int64 [B, T].
            padding: int64 [B], as in `Decoding`.
            real: bool [B, capacity], false at padding; None: there is none.

        Returns:
            The logits of the token after them, fp32 [B, V].
        """
        cache, (B, T) = self.cache, ids.shape
        start, end = cache.length, cache.length + T
        if B == 1:  # no padding then
            tables = [(cos[None, start:end], sin[None, start:end]) for cos, sin in self.tables]
        else:
            positions = (torch.arange(start, end) - padding[:, None]).clamp_(min=0)
            tables = [(cos[positions], sin[positions]) for cos, sin in self.tables]
        slots = {size: cache.slots(size, T) for size in self.sizes}
        visible = None
        if real is not None:
            seen = {w: real[:, cache.positions(T, w)] for w in set(cache.windows)}
            visible = [seen[window] for window in cache.windows]
        logits = kernels.decode_step(
            self.plan,
            ids.contiguous(),
            tables,
            self.memory,
            [slots[size] for size in cache.sizes],
            visible,
        )
        cache.length = end
        return logits


# ---- the model as the compiled step takes it ----


def _plan(model: Decoder) -> kernels.DecodePlan | None:
    """Return the model as `kernels.decode_step` takes it, or None where it cannot."""
    config = model.config
    if config.by_length:
        return None  # every step has tables of its own
    if not kernels.decode_compiled(model.device):
        return None
    if any(has_hooks(m) or has_own_forward(m) for m in model.modules()):
        return None
    embedding = _computing(model.model.embed_tokens)
    head = embedding if model.lm_head is None else _computing(model.lm_head)
    if type(embedding) is not nn.Embedding:
        return None
    if type(head) is not nn.Linear and type(head) is not nn.Embedding:
        return None
    layers = []
    for number, block in enumerate(model.model.layers):
        layer = _layer(block, config, number)
        if layer is None:
            return None
        layers.append(layer)
    scale = torch.tensor(config.hidden_size**0.5, dtype=model.dtype).item()
    try:
        return kernels.DecodePlan(
            embedding.weight,
            layers,
            model.model.norm.weight,
            head.weight,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            activation=config.hidden_act,
            norm_weight_offset=config.norm_weight_offset,
            embedding_scale=scale if config.scale_embeddings else 1.0,
            attention_scale=config.attention_scale,
            attn_softcap=config.attn_logit_softcapping,
            final_softcap=config.final_logit_softcapping,
        )
    except ValueError:  # other dtypes, several, or strides, all of which the forward pass takes
        return None


def _layer(block: nn.Module, config: ModelConfig, number: int) -> kernels.DecodeLayer | None:
    """Return the weights of a block, or None if one of its layers is not a plain nn.Linear."""
    if not isinstance(block, Block) or block.moe_name is not None:
        return None
    attention, mlp = block.self_attn, block.mlp
    dense = []
    for layer in (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        *(mlp.get_submodule(name) for name in mlp.names),
    ):
        computing = _computing(layer)
        if type(computing) is not nn.Linear:
            return None
        dense.append(computing)
    q, k, v, o, gate, up, down = dense
    return kernels.DecodeLayer(
        input_norm=block.input_layernorm.weight,
        q=q.weight,
        k=k.weight,
        v=v.weight,
        o=o.weight,
        gate=gate.weight,
        up=up.weight,
        down=down.weight,
        post_attention_norm=block.post_attention_layernorm.weight,
        pre_feedforward_norm=_weight(block.pre_feedforward_layernorm),
        post_feedforward_norm=_weight(block.post_feedforward_layernorm),
        q_norm=_weight(attention.q_norm),
        k_norm=_weight(attention.k_norm),
        q_bias=q.bias,
        k_bias=k.bias,
        v_bias=v.bias,
        o_bias=o.bias,
        gate_bias=gate.bias,
        up_bias=up.bias,
        down_bias=down.bias,
        rope=int(config.rope_local is not None and config.slides(number)),
    )


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _computing(layer: nn.Module) -> nn.Module:
    """Return the module that computes in the place of an adapted layer, if that is a single one."""
    if isinstance(layer, AdaptedLayer):
        only = layer.only_module()
        return layer if only is None else only
    return layer
