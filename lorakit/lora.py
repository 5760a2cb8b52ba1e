"""LoRA layers, and the walks that attach, merge and remove them on any nn.Module.

            x ------------------+
            |                   |
        base(x)            A  [r, in]      random: U(-1/sqrt(in), 1/sqrt(in))
       W frozen                 |
            |              B  [out, r]     zero: an attached adapter changes nothing yet
            |                   |
            +---- + s * --------+

A `LoraLinear` owns its base and asks four things of it: `base(x)`, `base.dequantize()`,
`base.stored`, the weight as the kernels take it, and `base.requantize(w)`. What the base stores,
four bits or thirty-two, is not its business.

A merged layer computes with one dense weight, W + s B A, in its dtype; the base is kept beside it,
so that unmerge restores the very bits (subtracting s B A again would not). A and B are fp32
parameters whatever the model computes in.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoraConfig, LorakitError, nearest
from .kernels import LoraWeights, Packed, lora_linear


@runtime_checkable
class Base(Protocol):
    """What an adapter can sit on: a module with these beside its forward."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dequantize(self) -> Tensor: ...

    @property
    def stored(self) -> Tensor | Packed: ...

    def requantize(self, w: Tensor) -> None: ...


class DenseBase(nn.Module):
    """An nn.Linear with the methods of a base."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def dequantize(self) -> Tensor:
        return self.linear.weight.detach()

    @property
    def stored(self) -> Tensor:
        return self.linear.weight.detach()

    def requantize(self, w: Tensor) -> None:
        self.linear.weight.data.copy_(w)


class LoraLinear(nn.Module):
    """base(x) + scaling * B A dropout(x)."""

    def __init__(self, base: Base, config: LoraConfig):
        super().__init__()
        self.base, self.config = base, config
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        self.enabled = True
        self.register_buffer("merged", None, persistent=False)  # [out, in]: W + s B A while merged

    def adapted(self) -> LoraWeights | None:
        """What the fused kernels need, or None if this layer is not to be computed by them:
        disabled, merged, or with a base whose weight is trained too.
        """
        bias = self.base.bias
        trained = any(p.requires_grad and p is not bias for p in self.base.parameters())
        if not self.enabled or self.merged is not None or trained:
            return None
        dropout = self.config.lora_dropout if self.training else 0.0
        return LoraWeights(self.base, self.lora_A, self.lora_B, self.config.scaling, dropout)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.adapted()
        if weights is not None:
            return lora_linear(x, weights)
        if not self.enabled:
            return self.base(x)
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        # the caller trains the base too: let autograd see all of it
        low = F.linear(
            F.dropout(x, self.config.lora_dropout, self.training), self.lora_A.to(x.dtype)
        )
        return self.base(x) + self.config.scaling * F.linear(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W + s B A from now on. Raises LorakitError if that is not finite."""
        weight = self.base.dequantize()
        A, B = self.lora_A.float(), self.lora_B.float()
        merged = torch.addmm(weight.float(), B, A, alpha=self.config.scaling).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise LorakitError("merge: the merged weight holds NaN or infinite values")
        self.merged = merged

    def extra_repr(self) -> str:
        merged = self.merged is not None
        return f"r={self.config.r}, scaling={self.config.scaling:g}, merged={merged}"


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers inside `module` by name, in the order of the module tree."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLinear)}


def _adapted(module: nn.Module, what: str) -> dict[str, LoraLinear]:
    layers = lora_layers(module)
    if not layers:
        raise LorakitError(f"{what}: no adapter is attached")
    return layers


def match_targets(names: list[str], targets: str | list[str]) -> list[str]:
    """The `names` of linear layers that `targets` selects, by PEFT's rules.

    "all-linear": all but the output head `lm_head`. Another string: a regex that must match the
    whole name. A list: each entry matches a whole name or its end after a dot. Raises LorakitError
    for a string or a list entry that matches nothing, with the nearest name.
    """
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if targets == "all-linear":
        found = [name for name in names if name.rpartition(".")[2] != "lm_head"]
        if not found:
            raise LorakitError("target_modules 'all-linear': the module holds no linear layer")
        return found
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise LorakitError(f"target_modules {targets!r} is no valid regex: {error}") from None
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            hint = nearest(targets, leaves)
            raise LorakitError(
                f"target_modules: the regex {targets!r} matches no linear layer{hint}; a string is "
                "matched against whole names, a list against their ends"
            )
        return found
    matched = {t: [n for n in names if n == t or n.endswith("." + t)] for t in targets}
    for target, hits in matched.items():
        if not hits:
            raise LorakitError(
                f"target_modules: {target!r} matches no linear layer{nearest(target, leaves)}; "
                f"there are {', '.join(leaves)}"
            )
    wanted = {name for hits in matched.values() for name in hits}
    return [name for name in names if name in wanted]


def attach(module: nn.Module, config: LoraConfig | None = None) -> nn.Module:
    """Put a LoraLinear around every linear layer that `config.target_modules` selects, in place.

    All other parameters are frozen; A is drawn from torch's global generator. Returns `module`.
    Raises LorakitError, and changes nothing, if an adapter is attached already, a target matches
    nothing, or a target is a subclass of nn.Linear that lorakit does not know how to wrap.
    """
    config = config or LoraConfig()
    if lora_layers(module):
        raise LorakitError("attach: an adapter is attached already; detach it first")
    linear = {
        name: m for name, m in module.named_modules() if name and isinstance(m, (nn.Linear, Base))
    }
    names = match_targets(list(linear), config.target_modules)
    for name in names:
        if not isinstance(linear[name], Base) and type(linear[name]) is not nn.Linear:
            raise LorakitError(
                f"attach: {name} is a {type(linear[name]).__name__}, not an nn.Linear"
            )
    module.requires_grad_(False)
    for name in names:
        base = linear[name] if isinstance(linear[name], Base) else DenseBase(linear[name])
        module.set_submodule(name, LoraLinear(base, config).train(linear[name].training))
    return module


def detach(module: nn.Module) -> nn.Module:
    """Remove the adapter: the base layers return to their places, still frozen."""
    for name, layer in _adapted(module, "detach").items():
        base = layer.base
        module.set_submodule(name, base.linear if isinstance(base, DenseBase) else base)
    return module


def merge(module: nn.Module) -> nn.Module:
    """Let every adapted layer compute with one dense weight W + s B A. Returns `module`.

    Needs the dense weights in memory beside the base. `save_model` writes merged weights; `unmerge`
    returns to base and adapter. Raises LorakitError, and leaves everything unmerged, if a merged
    weight is not finite.
    """
    layers = _adapted(module, "merge")
    try:
        for name, layer in layers.items():
            try:
                layer.merge()
            except LorakitError as error:
                raise LorakitError(f"{error} ({name})") from None
    except LorakitError:
        unmerge(module)
        raise
    return module


def unmerge(module: nn.Module) -> nn.Module:
    """Undo `merge`; the base was never touched. Returns `module`."""
    for layer in _adapted(module, "unmerge").values():
        layer.merged = None
    return module


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block every adapted layer computes its base alone."""
    layers = list(_adapted(module, "disable_adapters").values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
