"""Which layers an adapter goes on, and the settings of LoRA.

The fields have PEFT's names, which are those in adapter_config.json. The settings of the other
methods stand in the files of those methods. All methods that adapt layers build on TargetConfig.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import check_below_one, check_types
from lorakit.config.patterns import of_pattern, valid_regex

MOST_RANK = 1 << 16  # no layer is so wide; a larger rank is a slip that would fill the memory

QuantizeAware = Literal[
    "nf4",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "iq4_nl",
    "q4_k",
    "q4_k_s",
    "q4_k_m",
    "q5_k",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
]

# The names that init_lora_weights takes, and whether each is plain: a plain initialization leaves
# the weights of the base alone.
INITIALIZATIONS = {
    "gaussian": True,
    "orthogonal": True,
    "pissa": False,
    "pissa_niter_N": False,
    "olora": False,
    "loftq": False,
    "eva": True,
}
# Initializations of PEFT that lorakit lacks, and why.
LACKING_INITIALIZATIONS = {
    "corda": "needs the covariance of each layer's inputs",
    "lora_ga": "needs a gradient of each weight",
    "mica": "trains A over a B that is frozen, and lorakit trains both",
}
# What adapter_config.json may say as init_lora_weights if the adapter fits the base's own weights.
# MiCA is among them: its B is stored beside A, and what both compute is plain LoRA.
PLAIN_INITIALIZATIONS = (
    None,
    True,
    False,
    *(name for name, plain in INITIALIZATIONS.items() if plain),
    "mica",
)


def check_initialization(kind: bool | str) -> None:
    """Raise LorakitError, with the nearest valid name, unless `kind` is an initialization.

    True, False and the names in INITIALIZATIONS are valid. The N of "pissa_niter_N" stands for a
    whole number up to 1000.
    """
    if isinstance(kind, bool) or (kind in INITIALIZATIONS and kind != "pissa_niter_N"):
        return
    if kind in LACKING_INITIALIZATIONS:
        raise LorakitError(
            f"init_lora_weights={kind!r} of PEFT {LACKING_INITIALIZATIONS[kind]}: choose true, "
            f"false or one of {', '.join(INITIALIZATIONS)}"
        )
    if not (isinstance(kind, str) and re.fullmatch(r"pissa_niter_(1000|[0-9]{1,3})", kind)):
        raise LorakitError(
            f"init_lora_weights is {kind!r}{nearest(kind, INITIALIZATIONS)}; it must be true, "
            f"false or one of {', '.join(INITIALIZATIONS)}, N a whole number up to 1000"
        )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings that every method on layers shares: which layers an adapter goes on."""

    target_modules: str | list[str] = "all-linear"
    """Layers to adapt: "all-linear" for every linear layer but the output head and the small ones
    that decide (routers of experts, decay and learning rate of linear attention), a list of names,
    or one regex that matches whole names. A name is whole or an end after a dot, such as q_proj."""
    exclude_modules: str | list[str] | None = None
    """Layers that stay as they are although target_modules selects them, by the rules of
    target_modules; null excludes none."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the layers to adapt, where the number of a layer is the first in its name; null
    means all layers."""
    layers_pattern: str | list[str] | None = None
    """Part of a name that stands before its number, such as `layers`, for names that hold several
    numbers; null takes the first number."""
    modules_to_save: list[str] | None = None
    """Modules to train whole beside the adapted layers, and to save with the adapter; null means
    none."""
    fan_in_fan_out: bool = False
    """Adapt layers that store their weight as [in, out] too, like the Conv1D of GPT-2."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.target_modules:
            raise LorakitError("target_modules is empty: name at least one layer")
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not valid_regex(pattern):
                raise LorakitError(f"layers_pattern: {pattern!r} is no valid regex")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise LorakitError(
                "layers_pattern says where layers_to_transform finds its numbers: give these too"
            )


@dataclass(frozen=True)
class LoraConfig(TargetConfig):
    """Settings of a low-rank adapter (LoRA, arXiv:2106.09685).

    The adapter adds s B A x to the output W x of each layer. The scaling s is lora_alpha / r, or
    lora_alpha / sqrt(r) with use_rslora.
    """

    r: int = 8
    """Rank of the update, the number of rows of A and of columns of B."""
    lora_alpha: int | float = 32
    """Strength of the update, which is scaled by lora_alpha / r, so that it hardly depends on r."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another r for some layers, by their names, ends of names after a dot, or regexes of these."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Another lora_alpha for some layers, by the rules of rank_pattern."""
    lora_dropout: float = 0.0
    """Share of a layer's inputs that its update does not see in a training step, from 0 to below
    1."""
    use_rslora: bool = False
    """Scale the update by lora_alpha / sqrt(r), so that a larger r does not weaken it (rsLoRA,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn the length of each row of the weight beside its direction (DoRA, arXiv:2402.09353)."""
    lora_bias: bool = False
    """Learn a bias of the update too."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the base that are trained too: "none", "lora_only" for those of the adapted layers,
    or "all"."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding to train, by token id. A mapping from embed_tokens and lm_head, or from
    the names of several embeddings, gives the rows of each. A tied head follows its embedding; null
    trains none."""
    ensure_weight_tying: bool = False
    """Adapt a tied embedding and its output head together; without this a tied embedding is
    refused."""
    init_lora_weights: bool | str = True
    """Start of A and B. True makes B zero; false draws both at random, which changes the model at
    once. A name chooses another start: gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq or
    eva."""
    quantize_aware: QuantizeAware | None = None
    """Merge that the training computes with already: "nf4", or a quantization of GGUF files such as
    "q4_k_m". Each layer multiplies by the quantized sum of base and update, and the gradients pass
    through. null adds the update to the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if not 0 < r <= MOST_RANK:
                raise LorakitError(f"{name} must be positive, and {MOST_RANK} at most, not {r}")
        check_below_one(self, "lora_dropout")
        for name, pattern in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for key in pattern:
                if not valid_regex(key):
                    raise LorakitError(f"{name}: {key!r} is no valid regex")
        check_initialization(self.init_lora_weights)
        if self.lora_bias and self.use_dora:
            raise LorakitError("lora_bias and use_dora do not go together: choose one")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise LorakitError("lora_bias goes with init_lora_weights true or false only")
        if self.quantize_aware is not None:
            for name, value in (("use_dora", self.use_dora), ("lora_dropout", self.lora_dropout)):
                if value:
                    raise LorakitError(
                        f"quantize_aware quantizes the sum of weight and update, which {name} "
                        "leaves apart: leave one of them out"
                    )

    def rank(self, name: str) -> int:
        """Return the rank of the layer called `name`."""
        return of_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> int | float:
        """Return the lora_alpha of the layer called `name`."""
        return of_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """Return the factor of B A in the layer called `name`."""
        return self.rank_and_scaling(name)[1]

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return the rank of the layer called `name`, and the factor of B A in it."""
        r = self.rank(name)
        return r, self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)
