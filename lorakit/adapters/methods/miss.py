"""MiSS (arXiv:2409.15371): one small block is added to every run of r columns of the weight.

    W' = W + [D D ... D]        D [out, r] trained, and cut off where r does not divide `in`
    y  = W x + D z              z [r] is the sum of x over all its runs of r numbers

That is a low-rank update with B = D, and with an A [r, in] that is frozen and the same for every
layer: r x r identities side by side. So it is computed as one, by LoRA's kernels, and merged as
one. A layer trains out x r numbers, which start at zero; LoRA of rank r trains in x r more. Columns
that lie r apart get the same update, which is what the method gives up.

`mini_r` repeats a block of so many rows down the layer too: D [mini_r, r] becomes [out, r], and a
layer trains mini_r x r numbers. PEFT calls that init_weights "mini". Its third form, "bat",
multiplies the blocks of W by D and is not here: it is no low-rank update.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.lora import LowRankLinear, LowRankPart
from lorakit.adapters.methods.method import LinearMethod
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.peft_files.layout import AdapterFiles
from lorakit.adapters.plan import Plan
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError, check
from lorakit.config.fields import check_below_one


@dataclass(frozen=True)
class MissConfig(TargetConfig):
    """An adapter that adds one trained block to every run of columns of a weight (MiSS)."""

    r: int = 64
    """The width of the block, and the rank of the update."""
    miss_dropout: float = 0.0
    """The share of a layer's inputs that the update does not see, in training."""
    init_weights: bool | str = True
    """Start and form of the block: True, zeros and as high as the layer; "mini", zeros and mini_r
    rows high; false, random numbers, for tests."""
    mini_r: int = 1
    """The height of the block with init_weights "mini", which must divide the layer's outputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.r > 0, f"r must be positive, not {self.r}")
        check(self.mini_r > 0, f"mini_r must be positive, not {self.mini_r}")
        check_below_one(self, "miss_dropout")
        check(
            not self.fan_in_fan_out,
            "fan_in_fan_out: MiSS has no file for layers that store their weight transposed",
        )
        if self.init_weights == "bat":
            raise LorakitError(
                'init_weights "bat" multiplies blocks of the weight, which lorakit lacks: choose '
                'true or "mini"'
            )
        known = isinstance(self.init_weights, bool) or self.init_weights == "mini"
        check(known, f'init_weights is {self.init_weights!r}; choose true, false or "mini"')


class MissPart(LowRankPart):
    """The block of one layer: miss_block [r, out], or [r, mini_r], fp32; it is D transposed."""

    runs: Tensor

    def __init__(self, config: MissConfig, in_features: int, out_features: int, runs: Tensor):
        super().__init__(config, config.r, 1.0, config.miss_dropout)
        height = config.mini_r if config.init_weights == "mini" else out_features
        self.repeats = out_features // height
        self.miss_block = nn.Parameter(torch.zeros(config.r, height))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=5**0.5)
        self.register_buffer("runs", runs, persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        D = self.miss_block.t()
        # whole in memory, as the compiled step of decoding takes it
        return self.runs, D.contiguous() if self.repeats == 1 else D.repeat(self.repeats, 1)


class MissLinear(LowRankLinear[MissPart]):
    """A linear layer with one block that is added to every run of its columns."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"miss_block": self.part_of(name).miss_block}


class Miss(LinearMethod[MissConfig]):
    """The method that adds one block to every run of columns."""

    peft_type = "MISS"
    config_type = MissConfig

    def plan(self, model: nn.Module, config: MissConfig) -> Plan:
        """Plan a block for every selected layer."""
        plan = Plan(model)

        @functools.cache
        def runs(width: int, device: torch.device) -> Tensor:
            """Return A [r, width], which layers of one width share."""
            columns = torch.arange(width, device=device) % config.r
            return (columns == torch.arange(config.r, device=device)[:, None]).float()

        for name in plan.select_linear(config):
            layer = plan.wrap_linear(name, MissLinear)
            if layer is None:
                continue
            wide, high = layer.in_features, layer.out_features
            if config.r > wide:
                raise LorakitError(f"attach: {name}: r is {config.r}, and the layer reads {wide}")
            if config.init_weights == "mini" and high % config.mini_r:
                raise LorakitError(
                    f"attach: {name}: mini_r {config.mini_r} does not divide its {high} outputs"
                )
            part = MissPart(config, wide, high, runs(wide, layer.device))
            plan.add(layer, part.to(layer.device))
        plan_modules_to_save(plan, config)
        return plan

    def config_values(self, model: nn.Module, name: str, config: MissConfig) -> dict[str, Any]:
        """Return every field that PEFT has, and the bias that its file says."""
        values = super().config_values(model, name, config) | {"bias": "none"}
        del values["fan_in_fan_out"]
        return values

    def read_config(self, files: AdapterFiles, model: nn.Module) -> MissConfig:
        """Return the config; what a block started from does not matter once it is read."""
        config = super().read_config(files, model)
        return dataclasses.replace(config, init_weights=config.init_weights or True)
