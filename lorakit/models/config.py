"""`ModelConfig` says what a decoder computes: one field per difference between models.

The decoder asks this class and nothing else. config_json.py reads its fields from a Hugging Face
config.json and writes them to one. families.py knows what a `model_type` means beyond the keys of
that file.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.kernels.ops.swiglu import Activation
from lorakit.models.config_json import fields_from_hf, fields_to_hf, text_config
from lorakit.models.families import family_of
from lorakit.models.rope import NO_ROPE, RopeConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_LINEAR_SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_POSITIVE_OR_NULL = (
    "query_pre_attn_scalar",
    "attention_multiplier",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True)
class ModelConfig:
    """The settings that say what a decoder computes.

    Names and defaults are those of Hugging Face's config.json. Making one raises LorakitError for
    values that no decoder can have.
    """

    model_type: str
    """Name of the model's family, such as "llama"; FAMILIES in families.py lists them."""
    vocab_size: int
    """Number of tokens that the embedding knows, V."""
    hidden_size: int
    """Width of the hidden states, H."""
    intermediate_size: int
    """Width inside the MLP."""
    num_hidden_layers: int
    """Number of decoder blocks."""
    num_attention_heads: int
    """Number of query heads, Hq."""
    num_key_value_heads: int
    """Number of key and value heads, Hk; it divides Hq."""
    head_dim: int
    """Width of one head, D; an even number."""
    global_head_dim: int | None = None
    """Width of a head in the layers without a sliding window; None: head_dim."""
    num_global_key_value_heads: int | None = None
    """Number of key and value heads in those of them that have no v_proj; None: as elsewhere."""
    hidden_act: str = "silu"
    """Activation of the MLP's gate: "silu", "gelu_pytorch_tanh", "gelu" or "swiglu_oai"."""
    rms_norm_eps: float = 1e-6
    """Number added to the mean square in RMSNorm, under the root."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding of all layers, or of those without a sliding window."""
    rope_local: RopeConfig | None = None
    """Rotary embedding of the sliding layers, where they have one of their own."""
    rope_layers: list[bool] = field(default_factory=list)
    """Whether each layer turns its queries and keys; an empty list means that all do."""
    max_position_embeddings: int = 2048
    """Number of positions the model was trained for; see `context_length`."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding itself."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    o_bias: bool = False
    """Whether attention's output projection has a bias."""
    mlp_bias: bool = False
    """Whether the linear layers of the MLP have a bias."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """RMSNorm of queries and keys before the rotary embedding: of each head, or of all together."""
    v_norm: bool = False
    """Whether the values of each head are normalized too, by an RMSNorm without a weight."""
    attention_k_eq_v: bool = False
    """Whether values are made of the keys in the layers without a window, which have no v_proj."""
    num_kv_shared_layers: int = 0
    """Number of last layers that see the keys and values of an earlier layer of their kind."""
    use_double_wide_mlp: bool = False
    """Whether these layers have an MLP of twice the width."""
    use_bidirectional_attention: Literal["vision"] | None = None
    """Whether tokens of one image see each other. Text never does; kept for the model files."""
    norm_weight_offset: float = 0.0
    """Number added to the weight of every norm: norms scale by offset + weight."""
    norm_casting_mode: str = "llama"
    """Whether a norm rounds to the model's dtype before ("llama") or after ("gemma") scaling."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Whether the inputs of attention and of the MLP are normalized, their outputs, or both."""
    attention_sinks: bool = False
    """Whether each head has a sink, a score beside those of the keys that has no value."""
    attention_gate: bool = False
    """Whether q_proj has a gate beside each head's queries, whose sigmoid scales the output."""
    fused_qkv: bool = False
    """Whether the query, key and value projections are one layer, qkv_proj."""
    fused_gate_up: bool = False
    """Whether gate and up of the MLP are one layer, gate_up_proj."""
    layer_scalar: bool = False
    """Whether each layer multiplies what it returns by a number of its own."""
    hidden_size_per_layer_input: int = 0
    """Width P of a second embedding, which each layer has a part of; 0: there is none."""
    vocab_size_per_layer_input: int = 0
    """Number of tokens that the second embedding knows."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to their dtype."""
    embedding_multiplier: float = 1.0
    """Number that embeddings are multiplied by."""
    residual_multiplier: float = 1.0
    """Number that the outputs of attention and of the MLP are multiplied by."""
    logits_scaling: float = 1.0
    """Number that logits are divided by."""
    attention_multiplier: float | None = None
    """Number that attention scores are multiplied by; None: query_pre_attn_scalar says it."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by the square root of this number; None takes head_dim."""
    attn_logit_softcapping: float | None = None
    """Soft cap c of the attention scores: s becomes c tanh(s / c) before the softmax."""
    final_logit_softcapping: float | None = None
    """Soft cap of the logits, by the formula of attn_logit_softcapping."""
    sliding_window: int | None = None
    """Number of positions that a sliding layer sees, its own included."""
    sliding_layers: list[bool] = field(default_factory=list)
    """Whether each layer has the sliding window; an empty list means that none has."""
    linear_layers: list[bool] = field(default_factory=list)
    """Whether each layer has linear attention, a gated delta net; an empty list: none has."""
    linear_num_key_heads: int = 0
    """Number of heads of queries and keys in linear attention, nk."""
    linear_num_value_heads: int = 0
    """Number of heads of values in linear attention, nv, a multiple of nk."""
    linear_key_head_dim: int = 0
    """Width of a query and of a key in linear attention, dk."""
    linear_value_head_dim: int = 0
    """Width of a value in linear attention, dv."""
    linear_conv_kernel_dim: int = 4
    """Number of positions that the convolution of linear attention sees, K."""
    fused_qkvz: bool = False
    """Whether the inputs of linear attention are two layers, in_proj_qkvz and in_proj_ba."""
    num_experts: int = 0
    """Number of experts in a layer that has them."""
    num_experts_per_tok: int = 0
    """Number of experts that the router picks for each token."""
    moe_intermediate_size: int = 0
    """Width inside an expert."""
    shared_expert_intermediate_size: int = 0
    """Width inside the expert that all tokens take, weighed by a gate; 0: there is none."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are scaled to sum to one."""
    moe_layers: list[bool] = field(default_factory=list)
    """Whether each layer has experts in the MLP's place; an empty list means that none has."""
    moe_beside_mlp: bool = False
    """Whether a layer with experts has its MLP too, and adds the two."""
    fused_experts: bool = False
    """Whether model files hold the experts of a layer as two tensors, gate_up_proj and down_proj.
    They are read in any family, and written where transformers reads nothing else."""
    moe_names: list[str] = field(
        default_factory=lambda: ["mlp", "gate_proj", "up_proj", "down_proj"]
    )
    """Names in the model files of the MoE block, and of an expert's gate, up and down layers.
    Experts beside an MLP are in no block: its name is empty."""
    router_name: str = "gate"
    """Name in the model files of the layer that picks the experts."""
    router_bias: bool = False
    """Whether that layer has a bias."""
    experts_transposed: bool = False
    """Whether published files have transposed matrices in the tensors of all experts of a layer."""
    experts_interleaved: bool = False
    """Whether the outputs of gate and up take turns there; else all of gate stand first."""
    bos_token_id: int | None = None
    """Token that begins a text."""
    eos_token_id: int | list[int] | None = None
    """Token, or tokens, that end a text."""
    pad_token_id: int | None = None
    """Token that fills rows up."""
    classifier: ClassifierConfig | None = None
    """Head that tells classes in the place of tokens; None: there is none."""

    def __post_init__(self) -> None:
        family_of(self.model_type)
        self._check_sizes()
        self._check_attention()
        self._check_layers_that_differ()
        if self.linear_layers:
            self._check_linear_attention()
        if any(self.moe_layers):
            self._check_experts()

    def _check_sizes(self) -> None:
        for name in _SIZES:
            if getattr(self, name) <= 0:
                raise LorakitError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise LorakitError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.global_head_dim is not None and self.global_head_dim <= 0:
            raise LorakitError(f"global_head_dim must be positive, not {self.global_head_dim}")
        for name in ("head_dim", "global_head_dim"):
            if (getattr(self, name) or 0) % 2:
                raise LorakitError(f"{name} must be even, not {getattr(self, name)}")
        if self.hidden_act not in Activation.__members__:
            raise LorakitError(
                f"hidden_act {self.hidden_act!r} is not supported; supported are "
                f"{', '.join(Activation.__members__)}"
            )

    def _check_attention(self) -> None:
        if len(self.sliding_layers) not in (0, self.num_hidden_layers):
            raise LorakitError(
                f"layer_types names {len(self.sliding_layers)} of {self.num_hidden_layers} layers"
            )
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise LorakitError(f"sliding_window must be positive, not {self.sliding_window}")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise LorakitError("sliding_window is missing")
        for name in _POSITIVE_OR_NULL:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise LorakitError(f"{name} must be positive or null, not {value}")
        if len(self.rope_layers) not in (0, self.num_hidden_layers):
            raise LorakitError(
                f"no_rope_layers names {len(self.rope_layers)} of {self.num_hidden_layers} layers"
            )
        for rope, size in zip(self.ropes, self.rope_head_dims, strict=True):
            turned = rope.rotary_dim(size)
            if turned < 2 or turned % 2:
                raise LorakitError(
                    f"partial_rotary_factor {rope.partial_rotary_factor} turns {turned} of "
                    f"head_dim {size}, which must be a positive even number"
                )
            given = len(rope.short_factor), len(rope.long_factor)
            if rope.rope_type == "longrope" and given != (turned // 2, turned // 2):
                raise LorakitError(
                    f"longrope's short_factor and long_factor hold {given[0]} and {given[1]} "
                    f"numbers, not head_dim / 2 = {turned // 2}"
                )

    def _check_layers_that_differ(self) -> None:
        heads = self.num_global_key_value_heads
        if heads is not None and (heads <= 0 or self.num_attention_heads % heads):
            raise LorakitError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_global_key_value_heads ({heads})"
            )
        for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            if getattr(self, name) < 0:
                raise LorakitError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < self.vocab_size:
            raise LorakitError(
                f"vocab_size_per_layer_input ({self.vocab_size_per_layer_input}) must not be "
                f"smaller than vocab_size ({self.vocab_size})"
            )
        first = self.num_hidden_layers - self.num_kv_shared_layers
        own, shared = self.sliding_layers[:first], self.sliding_layers[first:]
        if not 0 < first <= self.num_hidden_layers or not set(shared) <= set(own):
            raise LorakitError(
                f"num_kv_shared_layers ({self.num_kv_shared_layers}) leaves no layer whose keys "
                "and values the shared ones could see"
            )

    def _check_linear_attention(self) -> None:
        if len(self.linear_layers) != self.num_hidden_layers:
            raise LorakitError(
                f"layer_types names {len(self.linear_layers)} of {self.num_hidden_layers} layers"
            )
        if all(self.linear_layers):
            raise LorakitError("layer_types must name a layer of full_attention")
        for name in _LINEAR_SIZES:
            if getattr(self, name) <= 0:
                raise LorakitError(f"{name} must be positive, not {getattr(self, name)}")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise LorakitError(
                f"linear_num_value_heads ({self.linear_num_value_heads}) must be a multiple of "
                f"linear_num_key_heads ({self.linear_num_key_heads})"
            )

    def _check_experts(self) -> None:
        if not 0 < self.num_experts_per_tok <= self.num_experts:
            raise LorakitError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and the "
                f"number of experts ({self.num_experts})"
            )
        if self.moe_intermediate_size <= 0:
            raise LorakitError("moe_intermediate_size must be positive")
        if self.shared_expert_intermediate_size < 0:
            raise LorakitError("shared_expert_intermediate_size must not be negative")

    @property
    def ropes(self) -> list[RopeConfig]:
        """The rotary embeddings in use; `rope_number` says which of them a layer has."""
        found = [self.rope] if self.rope_local is None else [self.rope, self.rope_local]
        return found if all(self.rope_layers) else [*found, NO_ROPE]

    @property
    def rope_head_dims(self) -> list[int]:
        """The width of the heads that each of `ropes` turns."""
        full = self.global_head_dim or self.head_dim
        return [full, *[self.head_dim] * (len(self.ropes) - 1)]

    def rope_number(self, layer: int) -> int:
        """Return which of `ropes` a layer has."""
        if self.rope_layers and not self.rope_layers[layer]:
            return len(self.ropes) - 1
        return int(self.rope_local is not None and self.slides(layer))

    @property
    def by_length(self) -> bool:
        """Whether rotary frequencies depend on the length of a row or packed document."""
        return any(rope.by_length for rope in self.ropes)

    def slides(self, layer: int) -> bool:
        """Return whether the layer of this number has the sliding window."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees, or None if it sees all before it."""
        return self.sliding_window if self.slides(layer) else None

    def layer_head_dim(self, layer: int) -> int:
        """Return the width of one head in a layer."""
        return self.head_dim if self.slides(layer) else self.global_head_dim or self.head_dim

    def has_values(self, layer: int) -> bool:
        """Return whether a layer has a v_proj; else its values are made of its keys."""
        return self.slides(layer) or not self.attention_k_eq_v

    def layer_kv_heads(self, layer: int) -> int:
        """Return the number of key and value heads in a layer."""
        fewer = None if self.has_values(layer) else self.num_global_key_value_heads
        return fewer or self.num_key_value_heads

    def kv_source(self, layer: int) -> int | None:
        """Return the layer whose keys and values a layer sees; None if it has its own."""
        first = self.num_hidden_layers - self.num_kv_shared_layers
        if layer < first:
            return None
        return max(i for i in range(first) if self.slides(i) == self.slides(layer))

    def mlp_width(self, layer: int) -> int:
        """Return the width inside a layer's MLP."""
        wide = self.use_double_wide_mlp and self.kv_source(layer) is not None
        return self.intermediate_size * (2 if wide else 1)

    def is_linear(self, layer: int) -> bool:
        """Return whether a layer has linear attention, which keeps a state and no keys."""
        return bool(self.linear_layers) and self.linear_layers[layer]

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts in the place of its MLP."""
        return bool(self.moe_layers) and self.moe_layers[layer]

    @property
    def attention_scale(self) -> float:
        """The number that attention scores are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def context_length(self) -> int:
        """The number of positions that the model is meant for.

        Yarn and dynamic scaling reach beyond max_position_embeddings, which for them stays the
        length before stretching.
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

    @classmethod
    def from_hf(cls, values: Any, where: str = "config.json") -> "ModelConfig":
        """Read the contents of a Hugging Face config.json, in transformers 4's or 5's spelling.

        The text model of a multimodal one is read. Keys that do not change the computation are
        ignored.

        Args:
            values: The JSON object.
            where: The file's name, for error messages.

        Returns:
            The config.

        Raises:
            LorakitError: For an unknown model_type, a wrong type, a missing size, or a feature that
                lorakit lacks.
        """
        values, where = text_config(values, where)
        return from_mapping(cls, fields_from_hf(values, where), where, ignore_unknown=True)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json in the spelling of transformers 4.

        Every version of transformers reads it.
        """
        return fields_to_hf({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
