"""VeRA (arXiv:2310.11454): all layers share one random A and one random B, and train vectors alone.

    y = W x + b * (B (d * (A x)))        A [r, in] and B [out, r] frozen, d [r] and b [out] trained

This is a low-rank update with diag(d) A and diag(b) B, and it is computed as one. A and B are as
large as the largest layer; smaller layers read their upper left corner. b starts at zero, d at
`d_initial`.

A layer stores out + r numbers. A and B follow from `projection_prng_key`: the draw is PEFT's,
repeated here number by number. Should torch draw other numbers one day, only a file that holds A
and B (`save_projection`, the default) still means the same; it costs r (in + out) numbers. A rank
of hundreds costs time in every layer, though hardly any trained numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.lora import LowRankLinear, LowRankPart
from lorakit.adapters.methods.method import LinearMethod
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.plan import Plan
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import check


@dataclass(frozen=True)
class VeraConfig(TargetConfig):
    """An adapter that trains vectors between random matrices that all layers share (VeRA)."""

    r: int = 256
    """The rank of the update, the number of rows of A."""
    projection_prng_key: int = 0
    """The seed that the shared random matrices A and B are drawn with."""
    save_projection: bool = True
    """Write A and B into the adapter's file too."""
    vera_dropout: float = 0.0
    """The share of a layer's inputs that is dropped before A, in training."""
    d_initial: float = 0.1
    """The value that the vector after A starts with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self.r) is int and self.r > 0, f"r must be positive and whole, not {self.r}")
        p = self.vera_dropout
        check(0 <= p < 1, f"vera_dropout is {p}; it must be in [0, 1)")


class _Projection(nn.Module):
    """The matrices that all layers of an adapter share: A [r, in] and B [out, r], fp32.

    They are drawn as PEFT draws them: uniform, of variance 2 / in and 2 / r.
    """

    A: Tensor
    B: Tensor

    def __init__(self, config: VeraConfig, in_features: int, out_features: int):
        super().__init__()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in ("A", (config.r, in_features)), ("B", (out_features, config.r)):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn)


class VeraPart(LowRankPart):
    """The vectors of one layer, lambda_b [out] and lambda_d [r], beside the shared matrices."""

    def __init__(
        self, config: VeraConfig, shared: _Projection, in_features: int, out_features: int
    ):
        super().__init__(config, config.r, 1.0, config.vera_dropout)
        self.shared, self.in_features, self.out_features = shared, in_features, out_features
        self.lambda_b = nn.Parameter(torch.zeros(out_features))
        self.lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial))

    def pair(self) -> tuple[Tensor, Tensor]:
        A = self.shared.A[:, : self.in_features] * self.lambda_d[:, None]
        return A, self.shared.B[: self.out_features] * self.lambda_b[:, None]


class VeraLinear(LowRankLinear[VeraPart]):
    """A linear layer whose A and B are made of those that all layers share."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.part_of(name)
        return {"vera_lambda_b": part.lambda_b, "vera_lambda_d": part.lambda_d}

    def tensors_to_save(self, name: str) -> dict[str, Tensor]:
        return {ending: tensor.float() for ending, tensor in self.trained_tensors(name).items()}


class Vera(LinearMethod[VeraConfig]):
    """The method that trains vectors between two random matrices, which all layers share."""

    peft_type = "VERA"
    config_type = VeraConfig

    def plan(self, model: nn.Module, config: VeraConfig) -> Plan:
        """Plan the vectors of every selected layer, and matrices as large as the largest one."""
        plan, layers = Plan(model), []
        for name in plan.select_linear(config):
            layer = plan.wrap_linear(name, VeraLinear)
            if layer is not None:
                layers.append(layer)
        widest = max(layer.in_features for layer in layers)
        tallest = max(layer.out_features for layer in layers)
        shared = _Projection(config, widest, tallest).to(layers[0].device)
        for layer in layers:
            part = VeraPart(config, shared, layer.in_features, layer.out_features)
            plan.add(layer, part.to(layer.device))
        plan_modules_to_save(plan, config)
        return plan

    def shared_tensors(self, model: nn.Module, name: str, config: VeraConfig) -> dict[str, Tensor]:
        """Return A and B, unless they are left to the seed."""
        if not config.save_projection:
            return {}
        layers = (m for m in model.modules() if isinstance(m, VeraLinear) and name in m.adapters)
        shared = next(layers).part_of(name).shared
        return {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}
