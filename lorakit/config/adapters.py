"""Carried out of lorakit/config.py."""

import math
import re
from dataclasses import dataclass, field

from lorakit.config.errors import check, nearest
from lorakit.config.fields import check_types
from lorakit.config.patterns import of_pattern, valid_regex

MOST_RANK = 1 << 16  # no layer is so wide; what is larger is a slip, and would fill the memory
# Each name of init_lora_weights, and whether it is plain: it leaves the weights of the base alone.
INITIALIZATIONS = {
    "gaussian": True,
    "orthogonal": True,
    "pissa": False,
    "pissa_niter_N": False,
    "olora": False,
    "loftq": False,
    "eva": True,
}
# Values of init_lora_weights in an adapter_config.json whose adapter fits the weights of the base.
PLAIN_INITIALIZATIONS = (
    None,
    True,
    False,
    *(name for name, plain in INITIALIZATIONS.items() if plain),
)


def check_initialization(kind: bool | str) -> None:
    """Raise LorakitError, with the nearest valid name, unless `kind` is an initialization.

    That is True, False, one of INITIALIZATIONS, or "pissa_niter_" and a whole number up to 1000.
    """
    known = [name for name in INITIALIZATIONS if name != "pissa_niter_N"]
    numbered = isinstance(kind, str) and re.fullmatch(r"pissa_niter_(1000|[0-9]{1,3})", kind)
    check(
        isinstance(kind, bool) or kind in known or bool(numbered),
        f"init_lora_weights is {kind!r}{nearest(kind, INITIALIZATIONS)}; it must be true, false or "
        f"one of {', '.join(INITIALIZATIONS)}, N a whole number up to 1000",
    )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which layers an adapter goes on: what every method that adapts layers is told alike."""

    target_modules: str | list[str] = "all-linear"
    """"all-linear" (every linear layer but the output head), names, or one regex for whole names"""
    exclude_modules: str | list[str] | None = None
    """what target_modules would select and is to stay as it is; by the same rules"""
    layers_to_transform: int | list[int] | None = None
    """only in the layers of these numbers: the first number in a layer's name"""
    layers_pattern: str | list[str] | None = None
    """what stands before that number, as `layers` does, where names hold several"""
    modules_to_save: list[str] | None = None
    """modules to train whole beside the adapted layers; they are saved with the adapter"""
    fan_in_fan_out: bool = False
    """also adapt layers that store their weight [in, out], like the Conv1D of GPT-2"""

    def __post_init__(self):
        check_types(self)
        check(len(self.target_modules) > 0, "target_modules is empty: name at least one layer")
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            check(valid_regex(pattern), f"layers_pattern: {pattern!r} is no valid regex")
        check(
            self.layers_pattern is None or self.layers_to_transform is not None,
            "layers_pattern says where layers_to_transform finds its numbers: give these too",
        )


@dataclass(frozen=True)
class LoraConfig(TargetConfig):
    """A low-rank adapter. The update is scaled by lora_alpha / r, or / sqrt(r) with use_rslora."""

    r: int = 8
    lora_alpha: int | float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another r for some layers: names, ends of names after a dot, or regexes of these"""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """another lora_alpha, by the same rules"""
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    """learn the length of every row of the weight beside its direction (DoRA)"""
    lora_bias: bool = False
    """a bias on the low-rank path, in layers that have one already"""
    bias: str = "none"
    """train the biases of the base too: "none", "lora_only" of the adapted layers, or "all" """
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """rows of the embedding to train; with several embeddings, by the name of each"""
    ensure_weight_tying: bool = False
    """adapt a tied embedding and its head alike; without it a tied embedding is refused"""
    init_lora_weights: bool | str = True
    """how A and B start. true: B zero; false: both random, which changes the model at once; or one
    of the names in `INITIALIZATIONS`"""

    def __post_init__(self):
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            check(0 < r <= MOST_RANK, f"{name} must be positive, and {MOST_RANK} at most, not {r}")
        check(
            0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)"
        )
        check(
            self.bias in ("none", "all", "lora_only"),
            f"bias is {self.bias!r}; choose none, lora_only or all",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                check(valid_regex(key), f"{name}: {key!r} is no valid regex")
        init = self.init_lora_weights
        check_initialization(init)
        check(
            not (self.lora_bias and self.use_dora),
            "lora_bias and use_dora do not go together: choose one",
        )
        check(
            not self.lora_bias or isinstance(init, bool),
            "lora_bias goes with init_lora_weights true or false only",
        )

    def rank(self, name: str) -> int:
        """r of the layer called `name`."""
        return of_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> int | float:
        """lora_alpha of the layer called `name`."""
        return of_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """The factor of B A in the layer called `name`."""
        return self.rank_and_scaling(name)[1]

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return r of the layer called `name`, and the factor of B A in it."""
        r = self.rank(name)
        return r, self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)
