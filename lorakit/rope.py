"""Rotary frequencies, and the cos and sin tables that `kernels.rope` turns queries and keys by.

Pair j of D/2 turns by f_j radians a position, f_j = theta^(-2j/D). A scaling changes only f:

    linear    f_j / factor: positions are squeezed                       (arXiv:2306.15595)
    llama3    a frequency that turns rarely within the original context is divided by `factor`, one
              that turns often is kept, and those between are blended    (Llama 3.1's config)

Everything is fp32, whatever the model's dtype: at position 8192 a bf16 angle is off by whole turns.
"""

import math

import torch
from torch import Tensor

from .config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """f, in radians per position: fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    freqs = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return freqs / rope.factor
    if rope.rope_type == "llama3":
        # turns within the original context: below `low` divided, above `high` kept, between blended
        turns = rope.original_max_position_embeddings * freqs / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * freqs / rope.factor + keep * freqs
    return freqs


def rope_tables(freqs: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency: positions int64 [B, T] -> two fp32 [B, T, D/2]."""
    angles = position_ids[..., None].float() * freqs
    return angles.cos(), angles.sin()
