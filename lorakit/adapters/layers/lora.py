"""LoRA on a linear layer: what it computes, trains and saves.

            x ------------------+
            |                   |
        base(x)            A  [r, in]      random: U(-1/sqrt(in), 1/sqrt(in))
       W frozen                 |
            |              B  [out, r]     zero: an attached adapter changes nothing yet
            |                   |
            +---- + s * --------+

    LoraLinear      y = W x + s B A x; with DoRA, the rows of W + s B A get trained lengths

A and B are fp32 parameters, whatever the model computes in. LoRA on embeddings is in embeddings.py;
modules that are trained as they are in whole_modules.py. `LowRankLinear` holds what LoRA shares
with other methods whose update is a product of a tall and a wide matrix, such as VeRA and AdaLoRA.

An initialization that takes a part out of the weight (PiSSA, OLoRA) leaves the base as it is too.
The part lies beside A and B as A0 and B0, and the layer computes

    W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

That is the function which PiSSA and OLoRA define, at twice the rank of the low-rank path. So any
base serves, four bits too, and several adapters share it. What is saved is plain LoRA of twice the
rank, exactly.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.base import AttachedLinear, DenseBase
from lorakit.adapters.layers.quantized_sum import QuantizedSum
from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.config.adapters import LoraConfig
from lorakit.kernels import (
    LoraSpan,
    LoraWeights,
    QuantizedWeight,
    SpanWeights,
    lora_linear,
    lora_qkv,
    straight_through_linear,
)
from lorakit.models.sharding import gathered
from lorakit.models.shards import whole

# An input with at most so many numbers goes op by op through autograd: the call of the fused
# function would cost more than it saves (benchmarks/lora_overhead.py).
_FEW = 4096


class LowRankPart(Part):
    """The update s B A of one layer by one adapter.

    `pair` returns A and B. A part has none of these unless its method says so:

    lora_bias [out]     is added on the low-rank path, scaled as that is
    magnitude [out]     is DoRA's length of every row
    bias [out]          stands in place of the base's bias
    start_A, start_B    are A0 and B0, frozen: s B0 A0 is taken out of the weight
    rounding            makes the quantized sum of base and update, which the layer computes with
    """

    lora_bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    bias: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, config: Any, r: int, scaling: float, dropout: float):
        super().__init__(config)
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.counter: Tensor | None = None  # of dropout's masks, in a step that is a CUDA graph
        self.lora_bias = self.magnitude = self.bias = None
        self.rounding: QuantizedSum | None = None
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A [R, in] and B [out, R] of the whole update."""
        raise NotImplementedError

    @property
    def has_extras(self) -> bool:
        """Whether the part changes more than its A and B do: a bias, or the lengths of rows."""
        extras = (self.lora_bias, self.magnitude, self.bias)
        return any(extra is not None for extra in extras)

    @property
    def is_plain(self) -> bool:
        """Whether the layer computes W x + s B A x with the part, and no more."""
        return self.start_A is None and self.rounding is None and not self.has_extras


class LoraPart(LowRankPart):
    """The part of one LoRA adapter in one layer: lora_A [r, in] and lora_B [out, r], fp32.

    `awaits` names the initialization, "loftq" or "eva", that has yet to fill the part in; it is
    None otherwise.
    """

    def __init__(self, config: LoraConfig, scaling: float, lora_A: Tensor, lora_B: Tensor):
        super().__init__(config, len(lora_A), scaling, config.lora_dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        kind = config.init_lora_weights
        self.awaits = kind if kind in ("loftq", "eva") else None

    def start_with(self, A: Tensor, B: Tensor) -> None:
        """Start from A [r, in] and B [out, r] with s B A taken out of W: nothing changes yet."""
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A [R, in] and B [out, R] of the whole update: R = r, or 2 r with a start."""
        own: dict[str, Any] = self._parameters  # a module's own look-up is slower
        A, B = own["lora_A"], own["lora_B"]
        start_A, start_B = self._buffers["start_A"], self._buffers["start_B"]
        if start_A is None or start_B is None:
            return A, B
        return torch.cat([A, start_A]), torch.cat([B, -start_B], dim=1)


class LoraLayer(Attached[LoraPart]):
    """The base class of LoRA's wrappers of linear layers and of embeddings."""

    endings: tuple[str, str]
    """The endings of the keys of A and B in PEFT's file."""

    @property
    def lora_A(self) -> nn.Parameter:
        """A of the selected adapter."""
        return self.part.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """B of the selected adapter."""
        return self.part.lora_B

    def tensors_to_save(self, name: str) -> dict[str, Tensor]:
        pair = zip(self.endings, self.part_of(name).pair(), strict=True)
        values: dict[str, Tensor] = {**self.trained_tensors(name), **dict(pair)}
        return {ending: tensor.float() for ending, tensor in values.items()}

    @torch.no_grad()
    def restore(self, name: str, values: Mapping[str, Tensor]) -> None:
        part = self.part_of(name)
        if part.start_A is not None and part.start_B is not None:  # saved below A and beside B
            a, b = self.endings
            A, B = values[a], values[b]
            part.start_A.copy_(A[part.r :])
            part.start_B.copy_(-B[:, part.r :])
            values = {**values, a: A[: part.r], b: B[:, : part.r]}
        super().restore(name, values)


LowRankT = TypeVar("LowRankT", bound=LowRankPart)


class LowRankLinear(AttachedLinear[LowRankT]):
    """A linear layer with a low-rank update: base(x) + scaling * B A dropout(x).

    `float8` is the base as it computes in training, where a run wants that (training/float8.py).
    """

    float8: kernels.Float8Linear | None = None

    def low_rank_update(self) -> LoraWeights | None:
        part = self.active
        return None if part is None or part.rounding is not None else self.weights_of(part)

    def fusible_update(self) -> LoraWeights | None:
        part = self.active
        if part is None or part.rounding is not None or not self.base.frozen:
            return None
        return self.weights_of(part)

    def weights_of(self, part: LowRankT) -> LoraWeights:
        """Return base and update as the kernels take them."""
        A, B = part.pair()
        base = self.float8 if self.float8 is not None and self.training else self.base
        bias = base.bias if part.bias is None else part.bias
        if part.lora_bias is not None:
            more = part.scaling * part.lora_bias
            bias = more if bias is None else bias + more
        dropout = part.dropout if self.training else 0.0
        magnitude, counter = part.magnitude, part.counter
        return LoraWeights(base, A, B, part.scaling, dropout, magnitude, bias, counter)

    def forward(self, x: Tensor) -> Tensor:
        part = self.active
        return self.compute_inactive(x) if part is None else self.compute(part, x)

    def compute(self, part: LowRankT, x: Tensor) -> Tensor:
        if part.rounding is not None:
            weight, bias = self.quantized_sum(part), self.weights_of(part).bias
            return straight_through_linear(x, weight, *part.pair(), part.scaling, bias)
        if self.base.frozen:
            return lora_linear(x, self.weights_of(part))
        return self.compute_by_autograd(part, x)

    def takes_spans(self, name: str) -> bool:
        part = self.part_of(name)
        plain = part.rounding is None and not part.has_extras and not part.dropout
        return self.base.frozen and plain

    def span_updates(self) -> SpanWeights | None:
        if not self.spans or not self.by_rows:
            return None
        parts = [(self.part_of(name), start, end) for name, start, end in self.spans]
        spans = [LoraSpan(start, end, *part.pair(), part.scaling) for part, start, end in parts]
        return SpanWeights(self.base, spans)

    def compute_spans(self, x: Tensor) -> Tensor:
        updates = self.span_updates()
        assert updates is not None
        return lora_qkv(x, [updates])[0]

    def compute_by_autograd(self, part: LowRankT, x: Tensor) -> Tensor:
        """Compute op by op, so that autograd sees all of it: the caller trains the base too."""
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
            bias = self.weights_of(part).bias
            y = y if base.bias is None else y - base.bias
            if part.magnitude is not None:
                y = y * (part.magnitude / self._row_norms(part)).to(y.dtype)
            y = y if bias is None else y + bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    @torch.no_grad()
    def _row_norms(self, part: LowRankT) -> Tensor:
        """Return the length of each row of W + s B A, [out]."""
        return self._sum(part, self.base.dequantize()).norm(dim=1)

    def _sum(self, part: LowRankT, weight: Tensor) -> Tensor:
        """Return W + s B A [out, in], in fp32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = part.pair()
        return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=part.scaling)

    def quantized_sum(self, part: LowRankT) -> QuantizedWeight:
        """Return Q(W + s B A) [out, in], the weight that the merge of `part` will write."""
        base = self.base
        assert part.rounding is not None
        assert isinstance(base, nn.Module)
        made_of = [*part.parameters(), *part.buffers(), *base.parameters()]
        return part.rounding(made_of, base.stored.dtype, lambda: self._sum(part, base.dequantize()))

    @torch.no_grad()
    def make_merged(self, weight: Tensor | None) -> nn.Module:
        part, own = self.part, self.base.dequantize()
        found = self._sum(part, own if weight is None else weight)
        if part.magnitude is not None:
            found *= (part.magnitude / found.norm(dim=1))[:, None]
        return self.make_plain(found.to(own.dtype), self.weights_of(part).bias)

    def extra_repr(self) -> str:
        names = [f"{name}: r={self.part_of(name).r}" for name in self.adapters]
        return f"{', '.join(names)}, selected={self.selected}, merged={self.merged is not None}"


class LoraLinear(LowRankLinear[LoraPart], LoraLayer):
    """A linear layer with LoRA."""

    endings = ("lora_A.weight", "lora_B.weight")

    # The active part and the layer under it, where an input of few numbers may take a short path.
    short_path: tuple[LoraPart, nn.Linear] | None

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.part_of(name)
        found = {
            self.endings[0]: part.lora_A,
            self.endings[1]: part.lora_B,
            "lora_B.bias": part.lora_bias,
            "lora_magnitude_vector": part.magnitude,
            "base_layer.bias": part.bias,
        }
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    def complete(self, part: LoraPart) -> None:
        """Give a new part what its config asks for beside A and B."""
        config, base = part.config, self.base
        if config.lora_bias:
            part.lora_bias = nn.Parameter(torch.zeros_like(part.lora_B[:, 0]))
        if config.bias != "none" and base.bias is not None:
            part.bias = nn.Parameter(whole(base.bias).detach().float().clone())
        if config.use_dora:
            assert isinstance(base, nn.Module)
            with gathered(base):
                length = kernels.lora_row_norms(LoraWeights(base, *part.pair(), part.scaling))
            part.magnitude = nn.Parameter(length)

    def start_over(self, part: LoraPart) -> None:
        """Forget what a part of this layer started from, and complete it for its new A and B."""
        part.awaits = part.start_A = part.start_B = None
        self.complete(part)
        self._refresh()

    def _refresh(self) -> None:
        super()._refresh()
        part, base = self.active, self.base
        self.short_path = None
        if part is not None and part.is_plain and type(base) is DenseBase:
            self.short_path = (part, base.linear)

    def forward(self, x: Tensor) -> Tensor:
        short, few = self.short_path, x.numel() <= _FEW
        if short is not None and few and short[0].counter is None and self.float8 is None:
            return self._compute_few(*short, x)
        return super().forward(x)

    def _compute_few(self, part: LoraPart, linear: nn.Linear, x: Tensor) -> Tensor:
        """Compute with as little as possible beside the three products.

        So small a product takes 2 us, and Python's overhead costs as much as a product does.
        """
        own: dict[str, Any] = linear._parameters  # a module's own look-up is slower
        update: dict[str, Any] = part._parameters
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


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers inside `module` with LoRA's A and B, by name, in the order of the tree."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}
