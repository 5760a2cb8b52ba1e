"""One token after another: the key-value cache, and the step from a token to the next one's logits.

The decoder module computes a step of one new token per row as some 15 small ops a layer, and on a
CPU their launches cost more than reading the weights. Where nothing but plain linear layers is
in the way, `kernels.decode_step` does the whole step in one call: dense weights in fp32 or bf16
(merged adapters included), no experts, no hooks, at most 32 rows.
"""

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.inference.kv_cache import KVCache
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.blocks import Block
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.rope import rope_tables

PROMPT_ROWS = 64  # tokens of a prompt that one call takes
FUSED_ROWS = 32  # the most that was measured, and found faster (docs/dev/LOG.md)


class Decoding:
    """The state of a batch that is being continued: decoding(ids) takes its next tokens.

    padding: how many columns on the left of each row are none of it. capacity: positions in all,
    without those of a trained prompt, which the cache is begun with.
    """

    def __init__(self, model: Decoder, padding: list[int], capacity: int):
        B, device = len(padding), model.device
        self.model = model
        self.before = model.beginning.length
        capacity += self.before
        self.cache = KVCache(model.config, B, capacity, model.dtype, device)
        model.beginning(model, self.cache, B)
        self.padding = torch.tensor(padding, device=device)
        columns = torch.arange(capacity, device=device)
        self.real = None
        if any(padding):
            first = self.before + self.padding[:, None]
            self.real = (columns < self.before) | (columns >= first)
        self.plan = _plan(model) if B <= FUSED_ROWS else None
        if self.plan is None:
            return
        head_dim = model.config.head_dim
        self.tables = [rope_tables(rope, head_dim, columns) for rope in model.config.ropes]
        self.held = kernels.DecodeCache(self.plan, self.cache.keys, self.cache.values)
        self.sizes = set(self.cache.sizes)
        self.shortest = min(self.sizes)  # a prompt must not run around a layer's window
        # torch multiplies in bf16 at a seventh of its fp32 speed where the processor cannot
        narrow = torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.fused_prompts = model.dtype == torch.bfloat16 and narrow

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T], which follow those of earlier calls -> logits fp32 [B, V] of the next
        token.
        """
        B, T = ids.shape
        if self.plan is not None and T == 1:
            return self._fused(ids.contiguous())
        if self.plan is not None and self.fused_prompts and self.cache.length + T <= self.shortest:
            for part in ids.split(max(1, PROMPT_ROWS // B), dim=1):
                logits = self._fused(part.contiguous())
            return logits
        real = self.real
        if real is not None:
            real = real[:, self.before : self.cache.length + T]
        hidden = self.model.hidden_states(ids, attention_mask=real, cache=self.cache)
        return self.model.head(hidden[:, -1]).float()

    def _fused(self, ids: Tensor) -> Tensor:
        cache, (B, T) = self.cache, ids.shape
        start, end = cache.length, cache.length + T
        if B == 1:  # no padding then
            tables = [(cos[None, start:end], sin[None, start:end]) for cos, sin in self.tables]
        else:
            at = (torch.arange(start, end) - self.padding[:, None]).clamp_(min=0)
            tables = [(cos[at], sin[at]) for cos, sin in self.tables]
        slots = {size: cache.slots(size, T) for size in self.sizes}
        visible = None
        if self.real is not None:
            seen = {w: self.real[:, cache.positions(T, w)] for w in set(cache.windows)}
            visible = [seen[window] for window in cache.windows]
        logits = kernels.decode_step(
            self.plan, ids, tables, self.held, [slots[size] for size in cache.sizes], visible
        )
        cache.length = end
        return logits


def _plan(model: Decoder) -> kernels.DecodePlan | None:
    """The model as `kernels.decode_step` takes it, or None where it cannot."""
    config = model.config
    if any(rope.by_length for rope in config.ropes):
        return None  # every step has tables of its own
    hooks = any(has_hooks(m) or has_own_forward(m) for m in model.modules())
    embedding = _alone(model.model.embed_tokens)
    head = embedding if model.lm_head is None else _alone(model.lm_head)
    plain = type(embedding) is nn.Embedding and type(head) in (nn.Linear, nn.Embedding)
    if hooks or not plain or not kernels.decode_compiled(model.device):
        return None
    layers = [_layer(block, config, i) for i, block in enumerate(model.model.layers)]
    if None in layers:
        return None
    scale = torch.tensor(config.hidden_size**0.5, dtype=model.dtype).item()
    attention = model.model.layers[0].self_attn
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
            attention_scale=attention.scale,
            attn_softcap=config.attn_logit_softcapping,
            final_softcap=config.final_logit_softcapping,
        )
    except ValueError:  # another dtype, several, or strides: the forward pass knows them all
        return None


def _layer(block: Block, config: ModelConfig, i: int) -> kernels.DecodeLayer | None:
    if block.moe_name is not None:
        return None
    attention, mlp = block.self_attn, block.mlp
    linear = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    weights = {name: _dense(layer) for name, layer in linear.items()}
    if None in weights.values():
        return None
    biases = {f"{name}_bias": bias for name, (_, bias) in weights.items()}
    norms = {
        "input_norm": block.input_layernorm,
        "post_attention_norm": block.post_attention_layernorm,
        "pre_feedforward_norm": block.pre_feedforward_layernorm,
        "post_feedforward_norm": block.post_feedforward_layernorm,
        "q_norm": attention.q_norm,
        "k_norm": attention.k_norm,
    }
    return kernels.DecodeLayer(
        **{name: weight for name, (weight, _) in weights.items()},
        **biases,
        **{name: norm.weight for name, norm in norms.items() if norm is not None},
        rope=int(config.rope_local is not None and config.slides(i)),
    )


def _dense(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is one dense product, else None."""
    layer = _alone(layer)
    return (layer.weight, layer.bias) if type(layer) is nn.Linear else None


def _alone(layer: nn.Module) -> nn.Module:
    """What computes in the place of an adapted layer, if that is one module."""
    return (layer.only_module() or layer) if isinstance(layer, AdaptedLayer) else layer
