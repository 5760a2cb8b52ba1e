"""What distinguishes one decoder from another, read from a Hugging Face config.json and back.

`ModelConfig` says what is computed, one field per difference; `model.py` asks it and nothing else.
What a `model_type` means beyond the keys of its file stands in `families.py`.

Both spellings are read: transformers 4's (`rope_theta` beside `rope_scaling`, `torch_dtype`,
`sliding_window_pattern`) and 5's (`rope_parameters`, nested by layer type for Gemma 3, and
`layer_types`). The older one is written, since every version reads it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.config.errors import LorakitError, check, nearest
from lorakit.config.fields import from_mapping
from lorakit.models.families import FAMILIES, MULTIMODAL
from lorakit.models.rope import RopeConfig

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class ModelConfig:
    """What distinguishes one decoder from another. Names and defaults follow config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    rope_local: RopeConfig | None = None
    """the sliding layers' own rotary embedding, where they have one"""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, before the rotary embedding"""
    norm_weight_offset: float = 0.0
    """norms scale by offset + weight"""
    norm_casting_mode: str = "llama"
    """whether a norm rounds to the model's dtype before ("llama") or after ("gemma") scaling"""
    sandwich_norm: bool = False
    """attention's and the MLP's outputs are normalized too, before they are added"""
    scale_embeddings: bool = False
    """embeddings are multiplied by sqrt(hidden_size), rounded to their dtype"""
    query_pre_attn_scalar: float | None = None
    """scores are divided by its square root; None: by head_dim's"""
    attn_logit_softcapping: float | None = None
    """c: scores s become c tanh(s / c) before the softmax"""
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    """positions that a sliding layer sees, its own included"""
    sliding_layers: list[bool] = field(default_factory=list)
    """per layer whether it slides; empty: none does"""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    """the weights of a token's experts are scaled to sum to one"""
    moe_layers: list[bool] = field(default_factory=list)
    """per layer whether it has experts in the MLP's place; empty: none has"""
    moe_names: list[str] = field(
        default_factory=lambda: ["mlp", "gate_proj", "up_proj", "down_proj"]
    )
    """what the checkpoints call the MoE block, and gate, up and down of an expert"""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        check(
            self.model_type in FAMILIES,
            f"model_type {self.model_type!r} is not supported; supported are "
            f"{', '.join([*FAMILIES, *MULTIMODAL])}{nearest(self.model_type, FAMILIES)}",
        )
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ]:
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        check(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        check(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act {self.hidden_act!r} is not supported; supported are "
            f"{', '.join(ACTIVATIONS)}",
        )
        check(
            len(self.sliding_layers) in (0, self.num_hidden_layers),
            f"layer_types names {len(self.sliding_layers)} of {self.num_hidden_layers} layers",
        )
        window = self.sliding_window
        check(window is None or window > 0, f"sliding_window must be positive, not {window}")
        check(not any(self.sliding_layers) or window is not None, "sliding_window is missing")
        for name in ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]:
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be positive or null, not {value}")
        for rope in self.ropes:
            if rope.rope_type == "longrope":
                pairs = (len(rope.short_factor), len(rope.long_factor))
                check(
                    pairs == (self.head_dim // 2, self.head_dim // 2),
                    f"longrope's short_factor and long_factor hold {pairs[0]} and {pairs[1]} "
                    f"numbers, not head_dim / 2 = {self.head_dim // 2}",
                )
        if any(self.moe_layers):
            check(
                0 < self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and the "
                f"number of experts ({self.num_experts})",
            )
            check(self.moe_intermediate_size > 0, "moe_intermediate_size must be positive")

    @property
    def ropes(self) -> list[RopeConfig]:
        """The rotary embeddings in use: one, or the full and the sliding layers' own."""
        return [self.rope] if self.rope_local is None else [self.rope, self.rope_local]

    def slides(self, layer: int) -> bool:
        """Whether `layer` has the sliding window."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def window(self, layer: int) -> int | None:
        """How many positions `layer` sees, or None where it sees all before it."""
        return self.sliding_window if self.slides(layer) else None

    def has_experts(self, layer: int) -> bool:
        """Whether `layer` has experts in the place of its MLP."""
        return bool(self.moe_layers) and self.moe_layers[layer]

    @property
    def context_length(self) -> int:
        """Positions the model is meant for: yarn and dynamic scaling reach beyond
        max_position_embeddings, which stays the length before stretching there.
        """
        rope = self.rope
        if rope.rope_type not in ("dynamic", "yarn"):
            return self.max_position_embeddings
        stretched = int(rope.original_max_position_embeddings * rope.factor)
        return max(self.max_position_embeddings, stretched)

    @property
    def eos_token_ids(self) -> list[int]:
        """The end tokens as a list, whether config.json holds none, one or several."""
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

