"""The model as the compiled step takes it, with the adapters that rows may choose.

The step takes weights in fp32, bf16, NF4 or int8, no experts, no hooks, and nothing that only a few
families compute (OLMo 2's norms, Phi's fused layers, Granite's multipliers). An adapter goes along
if all that it changes are low-rank updates of the linear layers of blocks: LoRA, PiSSA, VeRA, but
not DoRA, new biases, or an update of the embedding. Rows with another adapter go through the
modules; so does all of a model that the step cannot take. Updates are read where they lie, so
training changes them; but a matrix that is computed (PiSSA's, VeRA's) stays as it was when the plan
was made.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.lora import LowRankLinear, LowRankPart
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import adapter_names, attached, selected_adapter
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.blocks import Block, RMSNorm
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.packed_layers import PackedEmbedding, PackedLinear, PackedWeight


@dataclass
class Plan:
    """A model for `kernels.decode_step`, and the numbers of its adapters."""

    model: kernels.DecodePlan
    adapters: dict[str, int]
    """The number of each adapter that the step can add."""
    current: str | None
    """The adapter that the model computed with when the plan was made; None: none."""

    def numbers(self, n: int, names: Sequence[str | None] | None) -> list[int | None] | None:
        """Return the numbers of the adapters of n rows; None if the step lacks one of them.

        `names` has the adapters' names, or is None where all rows take the current one.
        """
        found: list[int | None] = []
        for name in [self.current] * n if names is None else names:
            if name is not None and name not in self.adapters:
                return None
            found.append(None if name is None else self.adapters[name])
        return found


def make_plan(model: Decoder, longest: int) -> Plan | None:
    """Return the model as `kernels.decode_step` takes it, or None where it cannot.

    No row has more than `longest` positions.
    """
    if _computes_more(model.config, longest) or model.mesh is not None:  # weights that move
        return None
    if not kernels.decode_compiled(model.device):
        return None
    if any(has_hooks(m) or has_own_forward(m) for m in model.modules()):
        return None
    wrappers = attached(model)
    if any(each.by_rows for each in wrappers.values()):
        return None
    linears = []
    for block in model.model.layers:
        if not isinstance(block, Block) or block.moe_name is not None:
            return None
        attention, mlp = block.self_attn, block.mlp
        # a layer without attention of its own, or without keys, is no business of the step
        assert attention is not None
        assert attention.k_proj is not None
        assert attention.v_proj is not None
        qkvo = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        places = [*qkvo, *(mlp.get_submodule(name) for name in mlp.names)]
        linears.append(dict(zip(("q", "k", "v", "o", "gate", "up", "down"), places, strict=True)))
    names = [name for name in adapter_names(model) if _fits(name, wrappers.values(), linears)]
    updates = [[_updates(name, layer) for layer in linears] for name in names]
    plan = _decode_plan(model, linears, updates)
    if plan is None:
        return None
    # a learned prompt is no business of the step: it stands in the cache
    prompt = id(model.beginning)
    active = any(each.active is not None and id(each) != prompt for each in wrappers.values())
    current = selected_adapter(model) if active else None
    return Plan(plan, {name: number for number, name in enumerate(names)}, current)


def _computes_more(config: ModelConfig, longest: int) -> bool:
    """Return whether a model of this config computes what `kernels.decode_step` lacks."""
    rope = config.rope
    return (
        config.by_length  # every step has tables of its own
        or any(each.rotary_dim(config.head_dim) != config.head_dim for each in config.ropes)
        or (bool(rope.llama_4_scaling_beta) and longest > rope.original_max_position_embeddings)
        or config.qk_norm == "whole"
        or config.norm_placement == "post"
        or bool(config.linear_layers)
        or config.attention_gate
        or config.attention_sinks
        or config.fused_qkv
        or config.fused_gate_up
        or config.residual_multiplier != 1
        or config.logits_scaling != 1
        or config.v_norm
        or config.layer_scalar
        or config.num_kv_shared_layers > 0
        or config.hidden_size_per_layer_input > 0
        or config.global_head_dim is not None
    )


# ---- adapters ----


def _fits(
    name: str, wrappers: Collection[Attached], linears: Sequence[dict[str, nn.Module]]
) -> bool:
    """Return whether low-rank updates of the blocks' linear layers are all that an adapter is."""
    places = {id(module) for layer in linears for module in layer.values()}
    for each in wrappers:
        if name not in each.adapters:
            continue
        part = each.part_of(name)
        if id(each) not in places or each.merged is not None or not isinstance(part, LowRankPart):
            return False
        A, B = part.pair()
        if part.has_extras or part.rounding is not None:
            return False
        if A.dtype != torch.float32 or B.dtype != torch.float32:
            return False
    return True


def _updates(name: str, layer: dict[str, nn.Module]) -> dict[str, kernels.DecodeUpdate]:
    """Return the updates of an adapter in one layer."""
    found = {}
    for place, module in layer.items():
        if isinstance(module, LowRankLinear) and name in module.adapters:
            part = module.part_of(name)
            A, B = (matrix.detach().contiguous() for matrix in part.pair())
            found[place] = kernels.DecodeUpdate(A, B, part.scaling)
    return found


# ---- the base ----


def _decode_plan(
    model: Decoder,
    linears: Sequence[dict[str, nn.Module]],
    adapters: Sequence[Sequence[dict[str, kernels.DecodeUpdate]]],
) -> kernels.DecodePlan | None:
    config = model.config
    if config.classifier is not None:
        return None
    embedding = _computing(model.model.embed_tokens)
    head = embedding if model.lm_head is None else _computing(model.lm_head)
    plain = isinstance(embedding, PackedEmbedding) or type(embedding) is nn.Embedding
    if not plain or (head is not embedding and not _linear(head)):
        return None
    layers = []
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        layer = _layer(block, linears[number], config, number)
        if layer is None:
            return None
        layers.append(layer)
    scale = torch.tensor(config.hidden_size**0.5, dtype=model.dtype).item()
    try:
        return kernels.DecodePlan(
            _weight(embedding),
            layers,
            _norm(model.model.norm),
            _weight(head),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            activation=config.hidden_act,
            norm_weight_offset=config.norm_weight_offset,
            embedding_scale=scale if config.scale_embeddings else config.embedding_multiplier,
            attention_scale=config.attention_scale,
            attn_softcap=config.attn_logit_softcapping,
            final_softcap=config.final_logit_softcapping,
            adapters=adapters,
        )
    except ValueError:  # other dtypes, several, or strides, all of which the forward pass takes
        return None


def _layer(
    block: Block, linears: dict[str, nn.Module], config: ModelConfig, number: int
) -> kernels.DecodeLayer | None:
    """Return the weights of a block, or None if a layer is neither an nn.Linear nor packed."""
    given: dict[str, Any] = {}
    for name, module in linears.items():
        computing = _computing(module)
        if not _linear(computing):
            return None
        given[name] = _weight(computing)
        given[f"{name}_bias"] = computing.bias
    attention = block.self_attn
    # else the model computes more than the step
    assert attention is not None
    assert block.input_layernorm is not None
    return kernels.DecodeLayer(
        **given,
        input_norm=_norm(block.input_layernorm),
        post_attention_norm=_norm(block.post_attention_layernorm),
        pre_feedforward_norm=_norm_or_none(block.pre_feedforward_layernorm),
        post_feedforward_norm=_norm_or_none(block.post_feedforward_layernorm),
        q_norm=_norm_or_none(attention.q_norm),
        k_norm=_norm_or_none(attention.k_norm),
        rope=config.rope_number(number),
    )


def _linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, PackedLinear)


def _weight(module: nn.Module) -> Tensor | kernels.Packed:
    """Return the matrix of a linear layer or an embedding, dense or packed."""
    if isinstance(module, PackedWeight):
        return module.quantized
    assert isinstance(module.weight, Tensor)
    return module.weight


def _norm(module: nn.Module) -> Tensor:
    norm = _computing(module)
    assert isinstance(norm, RMSNorm)
    return norm.weight


def _norm_or_none(module: nn.Module | None) -> Tensor | None:
    return None if module is None else _norm(module)


def _computing(module: nn.Module) -> nn.Module:
    """Return the module that computes in the place of another, or that adapters add to."""
    return module.current_module() if isinstance(module, AdaptedLayer) else module
