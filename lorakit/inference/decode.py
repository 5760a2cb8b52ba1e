"""The next tokens of rows: the step from tokens to the logits of the ones after them.

The decoder module computes a step of one new token per row as some 15 small ops a layer, and on a
CPU calling them costs more than reading the weights. Where a model consists of plain linear layers,
`kernels.decode_step` does the whole step in one compiled call. That needs dense weights in fp32 or
bf16 (merged adapters included), no experts, no hooks, and at most 32 rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.inference.kv_cache import PART, KVCache, NewPositions
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.blocks import Block, RMSNorm
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.rope import rope_tables

COMPILED_ROWS = 32
"""Most rows that the compiled step takes: the most for which it was measured (docs/dev/LOG.md)."""
_COMPILED_PART = 64
"""Most tokens of a prompt that one compiled call takes."""


class Decoding:
    """The state of rows that are being continued; decoding(lines, ids) takes their next tokens."""

    def __init__(self, model: Decoder, lines: int, capacity: int):
        """Make room.

        Args:
            model: The model.
            lines: How many rows there is room for.
            capacity: Number of positions that a row may reach. Those of a learned prompt, with
                which rows begin, come on top.
        """
        self.model = model
        capacity += model.beginning.length
        self.cache = KVCache(model.config, lines, capacity, model.dtype, model.device)
        self.compiled: _CompiledStep | None = None
        self.compile()
        # On a processor without AVX-512, torch's bf16 products run at a seventh of the speed of its
        # fp32 ones; there prompts take the compiled step too.
        slow_bf16 = torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.compiled_prompts = model.dtype == torch.bfloat16 and slow_bf16

    def compile(self) -> None:
        """Take the model as it is now into the compiled step, where that can compute it."""
        plan = _plan(self.model)
        self.compiled = None if plan is None else _CompiledStep(plan, self.model, self.cache)

    def begin(self, line: int) -> None:
        """Forget what a line held; a row begins there, with the learned prompt if there is one."""
        self.cache.lengths[line] = 0
        prompt = self.model.beginning.length
        if prompt:
            call = NewPositions(self.cache, [line], [prompt])
            self.model.beginning(self.model, call, 1)
            call.commit()

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        """Begin a row with each prompt, in the first lines.

        Returns:
            The logits of the token after each prompt, fp32 [n, V].
        """
        device, lengths = self.model.device, [len(prompt) for prompt in prompts]
        for line in range(len(prompts)):
            self.begin(line)
        if not self.model.beginning.length and not (self.compiled and self.compiled_prompts):
            longest = max(lengths)
            ids = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
            return self(range(len(prompts)), torch.tensor(ids, device=device), lengths)
        found = []
        for line, prompt in enumerate(prompts):
            for part in torch.tensor([prompt], device=device).split(PART, dim=1):
                logits = self([line], part)
            found.append(logits)
        return torch.cat(found)

    def __call__(
        self, lines: Sequence[int], ids: Tensor, new: Sequence[int] | None = None
    ) -> Tensor:
        """Take the tokens that follow in some rows.

        Args:
            lines: The line of each of the n rows, all different.
            ids: int64 [n, T]. T is at most PART, unless all rows are empty.
            new: How many of the T tokens of each row count; the rest is filling. None: all do.

        Returns:
            The logits of the token after them, fp32 [n, V].
        """
        n, T = ids.shape
        if self.compiled is not None and new is None:
            if T == 1 and n <= COMPILED_ROWS:
                return self.compiled(lines, ids)
            if T > 1 and n == 1 and self.compiled_prompts:
                for part in ids.split(_COMPILED_PART, dim=1):
                    logits = self.compiled(lines, part)
                return logits
        call = NewPositions(self.cache, lines, [T] * n if new is None else new)
        views = call.views(self.model.config, T)
        hidden = self.model.through_blocks(self.model.embed(ids), views, call)
        call.commit()
        last = hidden[:, -1]
        if new is not None:
            last = hidden[torch.arange(n, device=ids.device), call.index[2] - call.index[1] - 1]
        return self.model.head(last).float()


class _CompiledStep:
    """`kernels.decode_step` for a model and its cache."""

    def __init__(self, plan: kernels.DecodePlan, model: Decoder, cache: KVCache):
        self.plan, self.cache, config = plan, cache, model.config
        positions = torch.arange(cache.capacity)
        self.tables = [rope_tables(rope, config.head_dim, positions) for rope in config.ropes]
        self.memory = kernels.DecodeCache(plan, cache.keys, cache.values, cache.windows)

    def __call__(self, lines: Sequence[int], ids: Tensor) -> Tensor:
        """Take ids int64 [n, T], and put their keys and values into the cache.

        Returns:
            The logits of the token after them, fp32 [n, V].
        """
        lengths, T = self.cache.lengths, ids.shape[1]
        places = [(line, lengths[line]) for line in lines]
        if len(places) == 1:
            start = places[0][1]
            tables = [
                (c[None, start : start + T], s[None, start : start + T]) for c, s in self.tables
            ]
        else:
            starts = torch.tensor([start for _, start in places])
            positions = starts[:, None] + torch.arange(T)
            tables = [(cos[positions], sin[positions]) for cos, sin in self.tables]
        logits = kernels.decode_step(self.plan, ids.contiguous(), tables, self.memory, places)
        for line, start in places:
            lengths[line] = start + T
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
