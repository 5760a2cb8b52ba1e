"""The settings of a quantization, which say how a model's frozen weights are stored."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorakit.config.errors import LorakitError
from lorakit.config.fields import check_types, from_mapping
from lorakit.kernels.ops.nf4.tensor import BLOCK_SIZES

Storage = Literal["nf4", "fp4", "int8"]
STORAGE = get_args(Storage)


DECIDING_LAYERS = (
    *("gate", "shared_expert_gate", "router"),
    *("in_proj_a", "in_proj_b", "in_proj_ba"),
)
"""Small linear layers that the rest of a layer depends on: the router of a mixture of experts, the
gate of its shared expert, and decay and learning rate of linear attention."""


@dataclass(frozen=True)
class QuantConfig:
    """Settings of the quantization: how the frozen weights of a model are stored."""

    quant_type: Storage = "nf4"
    """Storage of the linear layers: "nf4" or "fp4" in 4 bits, or "int8" with one scale per row."""
    block_size: int = 64
    """Number of values that share one scale in 4 bits, a power of two from 32 to 4096."""
    double_quant: bool = True
    """Store the scales of 4-bit weights in 8 bits too."""
    search_scales: bool = False
    """Search for the scales with the least squared error; quantizing takes longer, using the
    weights does not."""
    embed_tokens: Storage | None = None
    """Storage of the embeddings, and of a head tied to them: "nf4", "fp4" or "int8"; null keeps
    them dense."""
    lm_head: Storage | None = None
    """Storage of an output head that is not tied: "nf4", "fp4" or "int8"; null keeps it dense."""
    skip_modules: list[str] = field(default_factory=lambda: [*DECIDING_LAYERS])
    """Layers that stay dense: names of layers or of modules that hold them, whole or a part between
    dots. The default is the router of a mixture of experts, the gate of an expert that all tokens
    share, and the layers of linear attention that make its decay and its learning rate: they are
    small, and everything after them depends on what they choose."""

    def __post_init__(self) -> None:
        # block_size has a check of its own below. The other fields take what behaves like their
        # type, such as a tuple of skip_modules.
        check_types(self, ["quant_type", "embed_tokens", "lm_head"])
        for name, kind in (("embed_tokens", self.embed_tokens), ("lm_head", self.lm_head)):
            if kind is not None and name in self.skip_modules:
                raise LorakitError(
                    f"{name} is to be stored as {kind}, and stands in skip_modules too"
                )
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise LorakitError(
                f"block_size is {self.block_size}; it must be a power of two from "
                f"{BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
            )


def quant_config(value: Any, where: str = "quantize") -> QuantConfig | None:
    """Return the settings that a caller or a run file means.

    Args:
        value: None, a quant_type such as "nf4", a mapping of QuantConfig's fields, or settings.
        where: The name of the value in messages.

    Returns:
        A QuantConfig, or None for no quantization.

    Raises:
        LorakitError: The value is none of these, or a field of it is wrong.
    """
    if value is None or isinstance(value, QuantConfig):
        return value
    if isinstance(value, str):
        value = {"quant_type": value}
    return from_mapping(QuantConfig, value, where)
