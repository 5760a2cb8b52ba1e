"""Frozen 4-bit linear layers, and the walk that puts them in the place of dense ones.

`NF4Linear` keeps the packed codes and the scales of `kernels.nf4` as frozen parameters, so they
move with `.to(device)`, are seen by FSDP as plain uint8 tensors, and take part in `state_dict`. Its
three methods, `layer(x)`, `layer.dequantize()` and `layer.requantize(w)`, are what `lora` needs of
a base.

`quantize` on a model of the meta device makes empty shells of the right size; the loader then packs
each dense weight as it is read. The dense model never exists.
"""

import math

import torch
from torch import Tensor, nn

from .config import LorakitError, QuantConfig, nearest
from .kernels import NF4Tensor, dequantize_nf4, nf4_linear, quantize_nf4
from .kernels.nf4 import NESTED_BLOCK


class NF4Linear(nn.Module):
    """y = x W^T + bias, W [out_features, in_features] in NF4; `dtype` is what it computes in."""

    def __init__(self, in_features, out_features, config, bias=None, *, dtype, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.dtype = config.block_size, dtype
        n = in_features * out_features
        blocks = math.ceil(n / config.block_size)

        def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = frozen(math.ceil(n / 2), dtype=torch.uint8)  # two codes a byte
        if config.double_quant:
            self.absmax = frozen(blocks, dtype=torch.uint8)
            self.nested_absmax = frozen(math.ceil(blocks / NESTED_BLOCK), dtype=torch.float32)
            self.offset = frozen(dtype=torch.float32)
        else:
            self.absmax = frozen(blocks, dtype=torch.float32)
            self.nested_absmax = self.offset = None
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig) -> "NF4Linear":
        """The quantized form of `linear`; on the meta device an empty shell."""
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            config,
            bias,
            dtype=weight.dtype,
            device=weight.device,
        )
        if not weight.is_meta:
            layer.requantize(weight)
        return layer

    @property
    def quantized(self) -> NF4Tensor:
        """The weight as the kernels take it; shares the parameters' memory."""
        return NF4Tensor(
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.offset,
            (self.out_features, self.in_features),
            self.block_size,
            self.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.quantized, self.bias)

    def dequantize(self) -> Tensor:
        """W, dense: [out_features, in_features] in the layer's dtype."""
        return dequantize_nf4(self.quantized, self.dtype)

    def requantize(self, w: Tensor) -> None:
        """Take dense `w` [out_features, in_features] as the new weight, on `w`'s device."""
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise LorakitError(
                f"requantize: the weight is {tuple(w.shape)}, the layer "
                f"({self.out_features}, {self.in_features})"
            )
        double_quant = self.nested_absmax is not None
        q = quantize_nf4(w, block_size=self.block_size, double_quant=double_quant)
        self.weight = nn.Parameter(q.codes, requires_grad=False)
        self.absmax = nn.Parameter(q.absmax, requires_grad=False)
        if double_quant:
            self.nested_absmax = nn.Parameter(q.nested_absmax, requires_grad=False)
            self.offset = nn.Parameter(q.offset, requires_grad=False)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """`.to(dtype)` changes what the layer computes in; the scales stay fp32."""
        exact = {
            n: p.detach() for n, p in self._parameters.items() if p is not None and n != "bias"
        }
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._parameters[name]
            if after.dtype != before.dtype:
                kept = nn.Parameter(before.to(after.device), requires_grad=False)
                self._parameters[name] = kept
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, dtype={self.dtype}"
        )


def quantize(module: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """Replace every nn.Linear inside `module` by an NF4Linear, in place; returns `module`.

    Layers named in `config.skip_modules` (by default the output head and the routers) stay as they
    are. Only the class nn.Linear itself is taken: a subclass may compute something else with its
    weight. Raises LorakitError, and changes nothing, if nothing is to be quantized or a skipped
    name is no layer.
    """
    config = config or QuantConfig()
    found = [
        name
        for name, child in module.named_modules()
        if type(child) is nn.Linear
        and name
        and name not in config.skip_modules
        and name.rpartition(".")[2] not in config.skip_modules
    ]
    if not found:
        raise LorakitError("quantize: the module holds no nn.Linear to quantize")
    named = {name for name, _ in module.named_modules()}
    named |= {name.rpartition(".")[2] for name in named}
    for skipped in config.skip_modules:
        if skipped not in named and skipped not in QuantConfig().skip_modules:
            raise LorakitError(
                f"quantize: skip_modules: {skipped!r} is no layer{nearest(skipped, named)}"
            )
    for name in found:
        parent, _, leaf = name.rpartition(".")
        linear = module.get_submodule(name)
        setattr(module.get_submodule(parent), leaf, NF4Linear.from_linear(linear, config))
    return module
