"""Rotary embedding: the angle by which each pair of a head's numbers is turned at each position.

Pair j of D / 2 turns by f_j radians a position, f_j = theta^(-2j/D). Stretching a model beyond the
context L that it was trained on, by a factor s, changes f. The last two ways also change the length
of the turned vectors: cos and sin are multiplied by a constant m.

    linear     f_j / s: positions are squeezed                            (arXiv:2306.15595)
    dynamic    beyond L, theta grows with the sequence length n:
               theta (s n / L - s + 1)^(D / (D-2))                        ("NTK-aware")
    llama3     a frequency that turns rarely within L is divided by s, one that turns often is kept,
               and those between are blended                              (Llama 3.1's config)
    yarn       the same idea with a ramp over j between two numbers of turns within L, and
               m = 0.1 ln(s) + 1                                          (arXiv:2309.00071)
    longrope   f_j / l_j with a searched list l, one up to L and one beyond, and
               m = sqrt(1 + ln(s) / ln(L))                                (arXiv:2402.13753)
    proportional   f_j / s for the first p D / 2 pairs, and 0 for the others, which do not turn

Where only a share p of each head turns (partial rotation), the first R = p D of its numbers are R/2
pairs, with R in the place of D in the formulas. "proportional" instead pairs the whole head. A
layer without positions (NoPE, arXiv:2305.19466) is NO_ROPE, a rotation by 0.

Ministral 3 also multiplies the query at position t by 1 + b ln(1 + floor(t / L)), as Llama 4 does,
so that attention stays sharp over long texts (`query_scale`).

"dynamic" and "longrope" depend on how long the sequence is now. Each row of a batch and each packed
document has a length of its own, and so its own frequencies. Keys that lie in a cache keep the
rotation they were given.

Everything is fp32, whatever the model's dtype: at position 8192 a bf16 angle is off by whole turns.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding: its theta, and how it is stretched.

    Names are those of config.json. Making one raises LorakitError for values that no rotation has.
    """

    rope_theta: float = 10000.0
    """Base of the frequencies, theta."""
    rope_type: str = "default"
    """Way of stretching, one of ROPE_TYPES; "default" does not stretch."""
    factor: float = 1.0
    """Factor s by which the context is stretched."""
    original_max_position_embeddings: int = 8192
    """Context L before stretching; default and linear do not use it."""
    low_freq_factor: float = 1.0
    """Turns within L up to which llama3 divides a frequency by s."""
    high_freq_factor: float = 4.0
    """Turns within L from which on llama3 keeps a frequency."""
    attention_factor: float | None = None
    """Constant m for yarn and longrope; None takes the formula of each."""
    beta_fast: float = 32.0
    """Turns within L where the ramp of yarn begins: faster pairs are kept."""
    beta_slow: float = 1.0
    """Turns within L where the ramp of yarn ends: slower pairs are divided by s."""
    mscale: float | None = None
    """Factor of ln(s) / 10 in yarn's m, if mscale_all_dim is given too."""
    mscale_all_dim: float | None = None
    """Factor of ln(s) / 10 in a second m, by which yarn divides the first."""
    truncate: bool = True
    """Whether the ends of yarn's ramp are rounded to whole pairs."""
    short_factor: list[float] = field(default_factory=list, hash=False)
    """Divisors l of longrope for sequences up to L, [R / 2]."""
    long_factor: list[float] = field(default_factory=list, hash=False)
    """Divisors l of longrope for longer sequences, [R / 2]."""
    partial_rotary_factor: float = 1.0
    """Share p of each head that turns."""
    llama_4_scaling_beta: float | None = None
    """Factor b in the scale of queries; None: they have none."""
    mrope_section: list[int] | None = field(default=None, hash=False)
    """How many pairs turn by each of an image's three positions. In text the three are equal, so
    that this changes nothing; it is kept for the model files."""
    mrope_interleaved: bool | None = None
    """Whether these pairs lie interleaved; kept for the model files."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise LorakitError(
                f"rope_type {self.rope_type!r} is not supported; supported are "
                f"{', '.join(ROPE_TYPES)}"
            )
        if not (self.rope_theta > 0 and self.factor > 0):
            raise LorakitError("rope_theta and factor must be positive")
        if not self.high_freq_factor > self.low_freq_factor:
            raise LorakitError("rope: high_freq_factor must exceed low_freq_factor")
        if self.original_max_position_embeddings <= 1:
            raise LorakitError("rope: original_max_position_embeddings must be at least 2")
        if not (self.beta_fast > 0 and self.beta_slow > 0):
            raise LorakitError("rope: beta_fast, beta_slow must be > 0")
        if self.rope_type == "yarn" and not self.rope_theta > 1:
            raise LorakitError("rope: yarn needs a rope_theta above 1")
        least = 0 if self.rope_type == "proportional" else 1e-9
        if not least <= self.partial_rotary_factor <= 1:
            raise LorakitError("rope: partial_rotary_factor must lie between 0 and 1")
        if not all(divisor > 0 for divisor in self.short_factor + self.long_factor):
            raise LorakitError("rope: short_factor and long_factor must be positive")

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence is."""
        return self.rope_type in ("dynamic", "longrope")

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many numbers R of a head of so many the tables turn."""
        # a product with 1 would be the same, but no number where a compiler has symbols for sizes
        if self.rope_type == "proportional" or self.partial_rotary_factor == 1:
            return head_dim
        return int(head_dim * self.partial_rotary_factor)


NO_ROPE = RopeConfig(rope_type="proportional", partial_rotary_factor=0.0)
"""The rotary embedding of a layer that knows no positions: it turns nothing."""


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, device: torch.device, lengths: Tensor | None = None
) -> Tensor:
    """Return the frequencies f of sequences.

    Args:
        rope: The rotary embedding.
        head_dim: D.
        device: The device of the result.
        lengths: int64 [...], the lengths of the sequences in positions. None stands for one that
            does not exceed L. Where no frequency depends on a length, it is not looked at.

    Returns:
        Radians a position: fp32 [..., R / 2] where they depend on the length, else [R / 2].
    """
    share, head_dim = rope.partial_rotary_factor, rope.rotary_dim(head_dim)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    original = rope.original_max_position_embeddings
    if rope.rope_type == "dynamic" and lengths is not None:
        # fp64: the differences of large numbers, and a power of them
        grown = rope.factor * lengths.clamp(min=original).double() / original - rope.factor + 1
        theta = rope.rope_theta * grown ** (head_dim / (head_dim - 2))
        return 1.0 / theta.float()[..., None] ** exponents
    freqs = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return freqs / rope.factor
    if rope.rope_type == "proportional":
        turns = torch.arange(head_dim // 2, device=device) < int(share * head_dim / 2)
        return torch.where(turns, freqs / rope.factor, 0.0)
    if rope.rope_type == "longrope":
        short, long = (
            torch.tensor(divisors, dtype=torch.float32, device=device)
            for divisors in (rope.short_factor, rope.long_factor)
        )
        if lengths is None:
            return freqs / short
        return freqs / torch.where(lengths[..., None] > original, long, short)
    if rope.rope_type == "llama3":
        # turns within L: below `low` a frequency is divided, above `high` kept, between blended
        turns = original * freqs / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * freqs / rope.factor + keep * freqs
    if rope.rope_type == "yarn":
        keep = _yarn_kept(rope, head_dim, device)
        return (1 - keep) * freqs / rope.factor + keep * freqs
    return freqs


def _fixed_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Return frequencies that no length changes, made in host memory, on a device."""
    if kernels.dispatch.traces():  # what is cached then would belong to the trace
        return inverse_frequencies(rope, head_dim, torch.device("cpu")).to(device)
    return _kept_frequencies(rope, head_dim, device)


@functools.lru_cache(maxsize=16)
def _kept_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Return the same, made once."""
    with torch.inference_mode(False):
        return kernels.dispatch.sent(
            inverse_frequencies(rope, head_dim, torch.device("cpu")), device
        )


def _yarn_kept(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Return the share of each frequency that yarn keeps: 1 for fast pairs, 0 for slow ones."""

    def pair(turns: float) -> float:
        """Return the j that makes so many turns within the original context."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def magnitude(rope: RopeConfig) -> float:
    """Return m, the constant by which cos and sin are multiplied."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    log = math.log(max(rope.factor, 1.0))
    if rope.rope_type == "longrope":
        return math.sqrt(1 + log / math.log(rope.original_max_position_embeddings))
    if rope.mscale and rope.mscale_all_dim:
        return (0.1 * rope.mscale * log + 1) / (0.1 * rope.mscale_all_dim * log + 1)
    return 0.1 * log + 1


def rope_tables(
    rope: RopeConfig, head_dim: int, position_ids: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return m cos and m sin of position * frequency.

    Args:
        rope: The rotary embedding.
        head_dim: D.
        position_ids: int64 [B, T].
        lengths: int64 [B, T], at each position the length of the sequence that it belongs to. None:
            a row is one sequence, which ends at its largest position. It is looked at only where
            the frequencies depend on it.

    Returns:
        Two fp32 tensors [B, T, R / 2], as `kernels.rope` takes them.
    """
    if not rope.by_length:
        lengths = None
    elif lengths is None:
        lengths = position_ids.amax(-1, keepdim=True) + 1
    if lengths is None:
        freqs = _fixed_frequencies(rope, head_dim, position_ids.device)
    else:
        freqs = inverse_frequencies(rope, head_dim, position_ids.device, lengths)
    angles, m = position_ids[..., None].float() * freqs, magnitude(rope)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if m == 1 else (m * cos, m * sin)


def query_scale(rope: RopeConfig, position_ids: Tensor, longest: int) -> Tensor | None:
    """Return the factors of queries, 1 + b ln(1 + floor(position / L)).

    Args:
        rope: The rotary embedding.
        position_ids: int64 [B, T].
        longest: No position reaches this number.

    Returns:
        fp32 [B, T, 1, 1], or None if all are 1.
    """
    original = rope.original_max_position_embeddings
    if not rope.llama_4_scaling_beta or longest <= original:
        return None
    turns = (position_ids // original).float()
    return (1 + rope.llama_4_scaling_beta * torch.log1p(turns))[..., None, None]


def llama3_of_divisors(divisors: Tensor, theta: float) -> RopeConfig | None:
    """Return the llama3 scaling that divides the frequencies by these numbers, or None if none is.

    The factor is the largest divisor. The frequencies tell the other three parameters up to one
    factor, so the low one is 1, as in every published model. L = 8192 and 4, which those have too,
    are tried first. Else the two follow from the divisors.

    Args:
        divisors: fp32 [D / 2].
        theta: The base of the frequencies.
    """
    size, cpu = 2 * len(divisors), divisors.device
    plain = inverse_frequencies(RopeConfig(rope_theta=theta), size, cpu)
    if not (divisors.isfinite().all() and divisors.gt(0).all()):
        return None
    factor = float(divisors.max())
    for length, high in [(8192, 4.0), _blended(divisors.double(), plain.double())]:
        if length < 2 or not high > 1:
            continue
        scaled = RopeConfig(
            theta, "llama3", factor, length, low_freq_factor=1.0, high_freq_factor=high
        )
        if torch.allclose(inverse_frequencies(scaled, size, cpu) * divisors, plain, rtol=1e-4):
            return scaled
    return None


def _blended(divisors: Tensor, plain: Tensor) -> tuple[int, float]:
    """Return L and the high factor h of llama3 where the low factor is 1; (0, 0) if none.

    With x the turns a position, a frequency between 1 / L and h / L keeps the share
    (L x - 1) / (h - 1) of itself. So x is a line over that share, from 1 / L to h / L.

    Args:
        divisors: fp64 [D / 2].
        plain: The frequencies before they are divided, fp64 [D / 2], in radians a position.
    """
    least, turns = 1 / divisors.max(), plain / (2 * math.pi)
    keep = (1 / divisors - least) / (1 - least)
    between = (keep > 1e-4) & (keep < 1 - 1e-4)
    if not keep.isfinite().all():  # all divisors are one
        return 0, 0.0
    low, high = turns[keep <= 1e-4].max(), 4 * turns.max()
    if between.sum() > 1:
        line = torch.stack([keep[between], torch.ones_like(keep[between])], 1)
        slope, start = torch.linalg.lstsq(line, turns[between]).solution
        low, high = start, start + slope
    elif between.any():  # one point gives no line: h is 4
        low = turns[between][0] / (1 + 3 * keep[between][0])
        high = 4 * low
    elif (keep > 0.5).any():  # any line between two neighbours will do
        low = 1 / (1 / low).floor()
        high = torch.minimum(4 * low, turns[keep > 0.5].min())
    if not low > 1e-12:
        return 0, 0.0
    length = round(1 / float(low))
    return length, round(float(high) * length, 4)
