"""What a GGUF file says about its model, and which models it cannot say.

llama.cpp computes by the name of the architecture, and by some twenty numbers. What no number says
it computes its own way, whatever the model does: full attention in Llama and Qwen, a scale of
Gemma's attention that goes by the number of layers, expert weights that sum to one. A file of a
model that differs would load and answer wrongly. So `check_said` refuses each such model, and its
sentence names the setting.

The keys are those that the reader knows (models/gguf_names.py), and some more that every file has.
"""

import math
from typing import Any

import torch

from lorakit.config.errors import LorakitError
from lorakit.models.config import ModelConfig
from lorakit.models.gguf_gemma4 import gemma4_metadata, proportional_divisors
from lorakit.models.gguf_names import KEYS, Dialect
from lorakit.models.rope import RopeConfig, inverse_frequencies, magnitude

_FLOATS = (
    "rms_norm_eps",
    "rope_theta",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope_local_base_freq",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
_STATES_WINDOWS = ("gemma2", "gemma3", "gemma4", "gpt-oss", "olmo2")
_STRETCHES = {
    "llama": ("linear", "yarn", "llama3"),
    "granite": ("linear", "yarn", "llama3"),
    "phi3": ("longrope",),
    "gemma": ("linear",),
    "gemma2": ("linear",),
    "gemma3": ("linear",),
    "gemma4": ("proportional",),
}
"""The rotary scalings that llama.cpp has for an architecture; the others have _OF_ALL."""
_OF_ALL = ("linear", "yarn")
_BIASED = ("llama", "granite")  # with or without, as the tensors say
_ALWAYS_BIASED = ("qwen2", "qwen2moe", "seed_oss", "gpt-oss")  # in q, k and v
_ACTIVATIONS = {"gpt-oss": "swiglu_oai"}  # the others' are Gemma's, or SiLU
_STEP = 4  # llama.cpp's own for SmolLM3: every fourth layer knows no positions


def model_metadata(
    config: ModelConfig, arch: str, dialect: Dialect, context_length: int | None
) -> dict[str, Any]:
    """Return the keys of a file that describe the model.

    Args:
        config: The model's configuration, which `check_said` has let pass.
        arch: GGUF's name of its architecture.
        dialect: The names and keys of that architecture.
        context_length: The number of positions that the file states; None takes the model's.

    Returns:
        The values by their keys, which begin with the architecture.
    """
    values = config.to_hf() | {
        "max_position_embeddings": context_length or config.max_position_embeddings
    }
    values["rope_theta"] = config.rope.rope_theta
    found: dict[str, Any] = {}
    for name, key in {**KEYS, **dialect.keys}.items():
        value = values.get(name)
        if value is not None and name != "sliding_window_pattern":
            found[key] = float(value) if name in _FLOATS else int(value)
    found["attention.value_length"] = config.head_dim
    found["rope.dimension_count"] = config.rope.rotary_dim(config.head_dim)
    if config.sliding_window is None or not any(config.sliding_layers):
        found.pop("attention.sliding_window", None)
        if arch == "gemma2":  # where llama.cpp takes 4096 if the file says nothing
            found["attention.sliding_window"] = found["context_length"]
    elif arch in ("gemma3", "olmo2"):
        found["attention.sliding_window_pattern"] = list(config.sliding_layers)
    found |= _rope_scaling(config)
    if arch == "gemma4":
        found |= gemma4_metadata(config)
    if any(config.linear_layers):
        values_of_heads = config.linear_num_value_heads * config.linear_value_head_dim
        found["ssm.inner_size"] = values_of_heads
        found["full_attention_interval"] = _interval(config)
    if arch in ("qwen35", "qwen35moe"):  # where llama.cpp asks for them
        pairs = config.rope.rotary_dim(config.head_dim) // 2
        even = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]  # as published; text has one
        found["rope.dimension_sections"] = [*(config.rope.mrope_section or even), 0, 0, 0][:4]
    return {f"{arch}.{key}": value for key, value in found.items()}


def _interval(config: ModelConfig) -> int:
    """Return the number of the first layer that has no linear attention, counted from 1."""
    return config.linear_layers.index(False) + 1


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a rotary embedding that is stretched; llama3's are a tensor instead."""
    rope, original = config.rope, "rope.scaling.original_context_length"
    if rope.rope_type == "longrope":  # its divisors are tensors
        return {
            original: rope.original_max_position_embeddings,
            "rope.scaling.attn_factor": float(magnitude(rope)),
        }
    if rope.rope_type not in ("linear", "yarn"):
        return {}
    found = {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "yarn":
        found |= {
            original: rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
    if rope.mscale_all_dim is not None:
        found["rope.scaling.yarn_log_multiplier"] = float(rope.mscale_all_dim)
    if rope.llama_4_scaling_beta is not None:
        found["attention.temperature_scale"] = float(rope.llama_4_scaling_beta)
    return found


def rotary_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the vectors by which some rotary embeddings divide the frequencies, fp32 [R / 2]."""
    if config.rope.rope_type == "proportional":
        return {"rope_freqs.weight": proportional_divisors(config)}
    if config.rope.rope_type == "llama3":
        return {"rope_freqs.weight": llama3_divisors(config)}
    if config.rope.rope_type == "longrope":
        return {
            "rope_factors_short.weight": torch.tensor(config.rope.short_factor),
            "rope_factors_long.weight": torch.tensor(config.rope.long_factor),
        }
    return {}


def llama3_divisors(config: ModelConfig) -> torch.Tensor:
    """Return by what Llama 3's scaling divides each frequency, fp32 [head_dim / 2]."""
    cpu = torch.device("cpu")
    plain = RopeConfig(rope_theta=config.rope.rope_theta)
    scaled = inverse_frequencies(config.rope, config.head_dim, cpu)
    return (inverse_frequencies(plain, config.head_dim, cpu) / scaled).float()


# ---- what a file cannot say ---------------------------------------------------------------------


def check_said(
    config: ModelConfig, arch: str, dialect: Dialect, tied: bool, context_length: int | None
) -> None:
    """Raise LorakitError unless llama.cpp computes what this model does.

    Args:
        config: The model's configuration.
        arch: GGUF's name of its architecture.
        dialect: The names and keys of that architecture.
        tied: Whether the head is the embedding.
        context_length: The number of positions that the file will state; None for the model's.
    """
    allowed = range(1, config.context_length + 1)
    if context_length is not None and context_length not in allowed:
        raise LorakitError(
            f"context_length must lie between 1 and the model's {config.context_length}, not "
            f"{context_length!r}"
        )
    for what in (
        _unsaid_rope(config, arch, dialect),
        _unsaid_window(config, arch, context_length or config.max_position_embeddings),
        _unsaid_attention(config, arch, dialect),
        _unsaid_mlp(config, arch, dialect),
        "an output head of its own" if arch.startswith("gemma") and not tied else None,
    ):
        if what is not None:
            raise LorakitError(
                f"a GGUF file of architecture {arch!r} cannot say {what}: llama.cpp would compute "
                "something else; keep the model in safetensors"
            )


def _unsaid_rope(config: ModelConfig, arch: str, dialect: Dialect) -> str | None:
    """Return what of the rotary embeddings a file cannot say."""
    rope, local = config.rope, config.rope_local
    if rope.rope_type not in ("default", *_STRETCHES.get(arch, _OF_ALL)):
        return f"the rotary scaling {rope.rope_type!r}"
    if arch == "gemma4" and (rope.rope_type != "proportional" or rope.factor != 1):
        return "this rotary embedding of the full layers"
    stated = arch in ("gemma3", "gemma4") and local is not None and local.rope_type == "default"
    plain = arch == "olmo2" and local == RopeConfig(rope.rope_theta)
    if local is not None and not (stated or plain):
        return "this rotary embedding of the sliding layers"
    every = [True] * config.num_hidden_layers
    turning = [(layer + 1) % _STEP != 0 for layer in range(len(every))]
    if (config.rope_layers or every) != (turning if arch == "smollm3" else every):
        return "which layers know positions (no_rope_layers)"
    if rope.partial_rotary_factor != 1 and not (dialect.partial or arch == "gemma4"):
        return f"partial_rotary_factor {rope.partial_rotary_factor}"
    return _unsaid_yarn(rope, arch) if rope.rope_type == "yarn" else None


def _unsaid_yarn(rope: RopeConfig, arch: str) -> str | None:
    """Return what of a rotary embedding stretched by yarn a file cannot say."""
    usual = 0.1 * math.log(rope.factor) + 1
    factor = usual if rope.attention_factor is None else rope.attention_factor
    scales = (1.0, 1.0) if arch == "mistral3" else (None, None)
    if not math.isclose(factor, usual, rel_tol=1e-6) or scales != (
        rope.mscale,
        rope.mscale_all_dim,
    ):
        return "yarn's attention_factor, mscale and mscale_all_dim"
    # llama.cpp truncates: the published gpt-oss does not, and is run so everywhere
    return None if rope.truncate or arch == "gpt-oss" else "yarn with truncate=false"


def _unsaid_window(config: ModelConfig, arch: str, context_length: int) -> str | None:
    """Return what of the sliding windows a file cannot say."""
    window, sliding = config.sliding_window, config.sliding_layers
    if arch == "gpt-oss" and (window is None or sliding != _every_other(config)):
        return "these layer_types"
    if not any(sliding) or window is None or window >= context_length:
        return None
    if arch not in _STATES_WINDOWS:
        return f"a sliding window of {window} (context_length={window} needs none)"
    if arch == "gemma2" and sliding != _every_other(config):
        return "these layer_types"
    return None


def _every_other(config: ModelConfig) -> list[bool]:
    """Return whether each layer slides if every other does, from the first one on."""
    return [layer % 2 == 0 for layer in range(config.num_hidden_layers)]


def _unsaid_attention(config: ModelConfig, arch: str, dialect: Dialect) -> str | None:
    """Return what of the attention a file cannot say."""
    full = config.num_hidden_layers == dialect.full_width_layers
    width = config.hidden_size // config.num_attention_heads if full else config.head_dim
    if config.query_pre_attn_scalar not in (None, width) or (
        config.query_pre_attn_scalar is None and width != config.head_dim
    ):
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}, only {width}"
    if (config.attn_logit_softcapping is not None) != (arch == "gemma2"):
        return f"attn_logit_softcapping {config.attn_logit_softcapping}"
    capped = config.final_logit_softcapping is not None
    if arch != "gemma4" and capped != (arch == "gemma2"):
        return f"final_logit_softcapping {config.final_logit_softcapping}"
    if any(config.linear_layers):
        every = _interval(config)
        if config.linear_layers != [(i + 1) % every != 0 for i in range(config.num_hidden_layers)]:
            return "these layer_types"
        if config.linear_key_head_dim != config.linear_value_head_dim:
            return "a linear_value_head_dim that is not linear_key_head_dim"
    of_output, of_inputs = arch == "gpt-oss", arch in _ALWAYS_BIASED
    found = config.o_bias == of_output and config.qkv_bias == of_inputs
    if arch not in _BIASED and not found:
        return "these biases of the attention (attention_bias)"
    return None


def _unsaid_mlp(config: ModelConfig, arch: str, dialect: Dialect) -> str | None:
    """Return what of the MLP or of the experts a file cannot say."""
    usual = _ACTIVATIONS.get(arch, "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu")
    if config.hidden_act != usual:
        return f"hidden_act {config.hidden_act!r}, only {usual!r}"
    if config.mlp_bias != (arch == "gpt-oss") and arch not in _BIASED:
        return "mlp_bias"
    if "ffn_gate_inp" in dialect.names and not (arch == "gemma4" and not any(config.moe_layers)):
        if not all(config.moe_layers):
            return "layers without experts (mlp_only_layers, decoder_sparse_step)"
        if config.norm_topk_prob != (arch != "qwen2moe"):
            return f"norm_topk_prob={str(config.norm_topk_prob).lower()}"
    return None
