"""Carried out of lorakit/config.py."""

from dataclasses import dataclass, field
from typing import Any

from lorakit.config.errors import check
from lorakit.config.fields import from_mapping

STORAGE = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class QuantConfig:
    """How the frozen weights are stored."""

    quant_type: str = "nf4"
    """of the linear layers: "nf4", "fp4", or "int8" with one scale per row"""
    block_size: int = 64
    """values that share one scale in 4 bits: a power of two from 32 to 4096"""
    double_quant: bool = True
    """store the scales of 4-bit weights in 8 bits too"""
    search_scales: bool = False
    """look for the scales with the least squared error: slower to quantize, free to use"""
    embed_tokens: str | None = None
    """of the embeddings: "nf4", "fp4", "int8", or null for dense; of a tied head with them"""
    lm_head: str | None = None
    """of an output head of its own: "nf4", "fp4", "int8", or null for dense"""
    skip_modules: list[str] = field(default_factory=lambda: ["gate"])
    """what stays dense: names of layers or of what holds them, whole or a part between dots. `gate`
    is the router of a mixture of experts: small, and what follows depends on its every choice"""

    def __post_init__(self):
        storage = ", ".join(STORAGE)
        check(
            self.quant_type in STORAGE,
            f"quant_type is {self.quant_type!r}; it must be one of {storage}",
        )
        for name in ("embed_tokens", "lm_head"):
            kind = getattr(self, name)
            check(
                kind is None or kind in STORAGE,
                f"{name} is {kind!r}; it must be one of {storage}, or null",
            )
            check(
                kind is None or name not in self.skip_modules,
                f"{name} is to be stored as {kind}, and stands in skip_modules too",
            )
        check(
            type(self.block_size) is int
            and self.block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            f"block_size is {self.block_size}; it must be a power of two from 32 to 4096",
        )


def quant_config(value: Any, where: str = "quantize") -> QuantConfig | None:
    """None, "nf4", a QuantConfig or a mapping of its fields, as a QuantConfig or None."""
    if value is None or isinstance(value, QuantConfig):
        return value
    if isinstance(value, str):
        value = {"quant_type": value}
    return from_mapping(QuantConfig, value, where)
