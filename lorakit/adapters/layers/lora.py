"""LoRA on a linear layer: what it computes.

            x ------------------+
            |                   |
        base(x)            A  [r, in]      random: U(-1/sqrt(in), 1/sqrt(in))
       W frozen                 |
            |              B  [out, r]     zero: an attached adapter changes nothing yet
            |                   |
            +---- + s * --------+

    LoraLinear      y = W x + s B A x, or with DoRA's lengths of the rows

Embeddings are in embeddings.py, modules that are trained as they are in trained_modules.py.

A `LoraLinear` owns its base and asks five things of it: `base(x)`, `base.dequantize()`,
`base.stored`, the weight as the kernels take it, `base.requantize(w)`, and `base.frozen`. What the
base stores, four bits or thirty-two, is not its business. A and B are fp32 parameters whatever the
model computes in.

An initialization that takes a part out of the weight (PiSSA, OLoRA) leaves the base as it is all
the same: the part lies beside A and B as A0 and B0, and the layer computes

    W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

which is the same function at twice the rank of the low-rank path. So any base serves, four bits
too, several adapters share it, and what is saved is plain LoRA of twice the rank, exactly.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.base import AttachedLinear, Base, DenseBase
from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.kernels import LoraWeights, lora_linear

# Inputs of so few numbers go op by op through autograd: the call of the fused function would cost
# more than it saves (benchmarks/lora_overhead.py).
FEW = 4096


class LowRank(Part):
    """The update s B A of one layer by one adapter, of which `pair` gives A and B; and nothing else
    that a `LoraLinear` knows of, unless a part says so.
    """

    def __init__(self, config: TargetConfig, r: int, scaling: float, dropout: float):
        super().__init__(config)
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.lora_bias = self.magnitude = self.bias = None
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] of the whole update."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Whether A and B are all there is."""
        return self.start_A is self.lora_bias is self.magnitude is self.bias is None


class LoraPart(LowRank):
    """What one adapter adds to one layer: lora_A [r, in], lora_B [out, r], fp32, and where the
    config says so

    lora_bias [out]     added on the low-rank path, scaled as it is
    magnitude [out]     DoRA's length of every row
    bias [out]          in place of the base's
    start_A, start_B    A0 and B0, frozen: s B0 A0 is taken out of the weight
    """

    def __init__(self, config: LoraConfig, scaling: float, lora_A: Tensor, lora_B: Tensor):
        super().__init__(config, len(lora_A), scaling, config.lora_dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        kind = config.init_lora_weights
        self.awaits = kind if kind in ("loftq", "eva") else None  # what has yet to start it

    def start_with(self, A: Tensor, B: Tensor) -> None:
        """Start from A [r, in] and B [out, r] with nothing changed: s B A is taken out of W."""
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def pair(self) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] of the whole update, R = r, or 2 r with a start."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.start_A])
        return A, torch.cat([self.lora_B, -self.start_B], dim=1)


class WithLora(Attached):
    """The common part of all kinds with A and B; `endings` are theirs in PEFT's file."""

    endings: tuple[str, str]

    @property
    def part(self) -> LoraPart:
        """Of the selected adapter."""
        return self.adapters[self.selected]

    @property
    def lora_A(self) -> nn.Parameter:
        return self.part.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return self.part.lora_B

    def saved(self, name: str) -> dict[str, Tensor]:
        pair = zip(self.endings, self.adapters[name].pair(), strict=True)
        values = self.tensors(name) | dict(pair)
        return {ending: tensor.float() for ending, tensor in values.items()}

    @torch.no_grad()
    def restore(self, name: str, values: Mapping[str, Tensor]) -> None:
        part = self.adapters[name]
        if part.start_A is not None:  # the lower half of what `pair` gives
            (a, A), (b, B) = ((ending, values[ending]) for ending in self.endings)
            part.start_A.copy_(A[part.r :])
            part.start_B.copy_(-B[:, part.r :])
            values = {**values, a: A[: part.r], b: B[:, : part.r]}
        super().restore(name, values)


class LoraLinear(AttachedLinear, WithLora):
    """base(x) + scaling * B A dropout(x), and the like."""

    endings = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base: Base):
        super().__init__(base)
        self.light: tuple[LoraPart, nn.Linear] | None = None

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.adapters[name]
        found = {
            self.endings[0]: part.lora_A,
            self.endings[1]: part.lora_B,
            "lora_B.bias": part.lora_bias,
            "lora_magnitude_vector": part.magnitude,
            "base_layer.bias": part.bias,
        }
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    def complete(self, part: LoraPart) -> None:
        """Give a new part what its config says beside A and B. Raises LorakitError for a lora_bias
        where the base has none.
        """
        config, base = part.config, self.base
        if config.lora_bias:
            if base.bias is None:
                raise LorakitError("lora_bias needs a layer with a bias")
            part.lora_bias = nn.Parameter(torch.zeros_like(part.lora_B[:, 0]))
        if config.bias != "none" and base.bias is not None:
            part.bias = nn.Parameter(base.bias.detach().float().clone())
        if config.use_dora:
            length = kernels.lora_row_norms(LoraWeights(base, *part.pair(), part.scaling))
            part.magnitude = nn.Parameter(length)

    def update(self) -> LoraWeights | None:
        (part,) = self.using
        return None if part is None else self._weights(part)

    def adapted(self) -> LoraWeights | None:
        return self.update() if self.base.frozen else None

    def _weights(self, part: LoraPart) -> LoraWeights:
        A, B = part.pair()
        bias = self.base.bias if part.bias is None else part.bias
        if part.lora_bias is not None:
            bias = bias + part.scaling * part.lora_bias
        dropout = part.dropout if self.training else 0.0
        return LoraWeights(self.base, A, B, part.scaling, dropout, part.magnitude, bias)

    def refresh(self) -> None:
        super().refresh()
        (part,) = self.using
        light = type(part) is LoraPart and part.is_plain and type(self.base) is DenseBase
        self.light = (part, self.base.linear) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.light is not None and x.numel() <= FEW:
            return self._lightly(x)
        (part,) = self.using
        return self.without(x) if part is None else self.compute(part, x)

    def _lightly(self, x: Tensor) -> Tensor:
        """With as little as possible beside the three products: 2 us are what a product costs."""
        part, linear = self.light
        own, update = linear._parameters, part._parameters  # a module's own look-up is slower
        A, B = update["lora_A"], update["lora_B"]
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = F.linear(flat, own["weight"], own["bias"])
        if part.dropout and self.training:
            flat = F.dropout(flat, part.dropout)
        if y.dtype == torch.float64:
            A, B = A.double(), B.double()
        if A.dtype == y.dtype:
            y = torch.addmm(y, F.linear(flat, A), B.t(), alpha=part.scaling)
        else:  # so few products are faster in A's fp32 than in 16 bits
            low, dtype = F.linear(flat.to(A.dtype), A), y.dtype
            y = torch.addmm(y.to(low.dtype), low, B.t(), alpha=part.scaling).to(dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    def compute(self, part: LoraPart, x: Tensor) -> Tensor:
        if self.base.frozen:
            return lora_linear(x, self._weights(part))
        return self._by_autograd(part, x)

    def _by_autograd(self, part: LoraPart, x: Tensor) -> Tensor:
        """Op by op: where the caller trains the base too, autograd has to see all of it."""
        flat, base = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), self.base
        y = base.forward(x)
        y = y if x.dim() == 2 else y.reshape(-1, y.shape[-1])
        if part.dropout and self.training:
            flat = F.dropout(flat, part.dropout)
        A, B = part.pair()
        if A.dtype != y.dtype:
            A, B = A.to(y.dtype), B.to(y.dtype)
        y = torch.addmm(y, F.linear(flat.to(A.dtype), A), B.t(), alpha=part.scaling)
        if not part.is_plain:
            weights = self._weights(part)
            y = y if base.bias is None else y - base.bias
            if part.magnitude is not None:
                y = y * (part.magnitude / self._row_norms(part)).to(y.dtype)
            y = y if weights.bias is None else y + weights.bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    @torch.no_grad()
    def _row_norms(self, part: LoraPart) -> Tensor:
        return self._sum(part, self.base.dequantize()).norm(dim=1)

    def _sum(self, part: LoraPart, weight: Tensor) -> Tensor:
        """W + s B A, fp32 or wider [out, in]."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = part.pair()
        return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=part.scaling)

    @torch.no_grad()
    def joined(self, weight: Tensor | None) -> nn.Module:
        base, part = self.base, self.part
        weight = base.dequantize() if weight is None else weight
        found = self._sum(part, weight)
        if part.magnitude is not None:
            found *= (part.magnitude / found.norm(dim=1))[:, None]
        return self.plain_with(found.to(base.dequantize().dtype), self._weights(part).bias)

    def extra_repr(self) -> str:
        names = [f"{name}: r={part.r}" for name, part in self.adapters.items()]
        return f"{', '.join(names)}, selected={self.selected}, merged={self.merged is not None}"


def lora_layers(module: nn.Module) -> dict[str, WithLora]:
    """The layers inside `module` with an A and a B of LoRA, by name, in the order of the tree."""
    return {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, WithLora) and all(isinstance(p, LoraPart) for p in m.adapters.values())
    }
