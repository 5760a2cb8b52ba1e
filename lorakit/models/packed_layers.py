"""Frozen layers whose weight is packed, and `quantize`, which puts them in a model.

    NF4Linear, Int8Linear            y = x W^T + bias
    NF4Embedding, Int8Embedding      rows of W: gathered packed, then dequantized, only they

A class is a use of the weight (`PackedLinear`, `PackedEmbedding`) together with a storage of it
(`NF4Weight` in 4 bits, `Int8Weight`). Each keeps the codes and scales of its one matrix as frozen
parameters, so that they move with `.to(device)`, are seen by FSDP as plain uint8 tensors, and take
part in `state_dict`. The linear ones have what an adapter needs of the layer below it: `layer(x)`,
`layer.dequantize()`, `layer.stored`, `layer.requantize(w)` and `layer.frozen`.

`quantize` on a model of the meta device makes empty shells of the right size; the loader then packs
each dense weight as it is read. The dense model never exists.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import lies_in
from lorakit.config.quantization import QuantConfig, Storage
from lorakit.kernels.dispatch import FLOATS
from lorakit.kernels.ops.nf4.tensor import NESTED_BLOCK
from lorakit.models.shards import is_sharded, keep, whole

# ---- how a weight is stored ----


class PackedWeight(nn.Module):
    """A frozen matrix [rows, columns], packed.

    Attributes:
        shape: (rows, columns).
        config: How the matrix is packed.
        dtype: The dtype that the layer computes in.
        frozen: True. The layer never trains, so an adapter may leave it to the fused kernels.
    """

    frozen = True
    weight: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, int],
        config: QuantConfig,
        dtype: torch.dtype,
        device: torch.device | None,
    ):
        super().__init__()
        self.shape, self.config, self.dtype = shape, config, dtype
        self._allocate(device)

    def _allocate(self, device: torch.device | None) -> None:
        """Make the parameters, without values."""
        raise NotImplementedError

    def _pack(self, w: Tensor, device: torch.device) -> kernels.Packed:
        raise NotImplementedError

    @property
    def quantized(self) -> kernels.Packed:
        """The matrix as the kernels take it; it shares the parameters' memory."""
        raise NotImplementedError

    @property
    def stored(self) -> kernels.Packed:
        """The matrix as an adapter asks for it."""
        return self.quantized

    def whole(self) -> kernels.Packed:
        """Return the matrix with the parts of all ranks, which must all call it if it is sharded.

        `quantized` of a sharded layer, outside of its block's pass, is of no use to a kernel.
        """
        raise NotImplementedError

    def place(self, q: kernels.Packed) -> None:
        """Take `q`, of the same kind and shape, as the new matrix, on the device of `q`."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Return the dense matrix, in the layer's dtype, with the parts of all ranks."""
        return kernels.dequantize(self.whole(), self.dtype)

    def requantize(self, w: Tensor, device: torch.device | None = None) -> None:
        """Pack the dense matrix `w` and take it as the new one, on `device` or where `w` lies."""
        if tuple(w.shape) != self.shape:
            raise LorakitError(
                f"requantize: the weight is {tuple(w.shape)}, the layer {self.shape}"
            )
        self.place(self._pack(w, device or w.device))

    def _freeze(self, name: str, tensor: Tensor) -> None:
        """Take a tensor as the parameter `name`, or this rank's part of it if that is sharded."""
        before = self._parameters.get(name)
        if before is not None and is_sharded(before) and not is_sharded(tensor):
            keep(before, tensor)
        else:
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Let `.to(dtype)` change what the layer computes in; the scales stay fp32."""
        exact = {
            n: p.detach() for n, p in self._parameters.items() if p is not None and n != "bias"
        }
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._parameters[name]
            if after is not None and after.dtype != before.dtype:
                self._freeze(name, before.to(after.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self


class NF4Weight(PackedWeight):
    """A matrix in 4 bits, NF4 or FP4, with one scale for each block of values."""

    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    offset: nn.Parameter | None
    _made: kernels.NF4Tensor | None = None  # what `quantized` returned last

    def _freeze(self, name: str, tensor: Tensor) -> None:
        super()._freeze(name, tensor)
        self.forget()

    def forget(self) -> None:
        """Let go of what was made of the parameters, which would keep their memory."""
        self._made = None

    def _allocate(self, device: torch.device | None) -> None:
        values = math.prod(self.shape)
        blocks = math.ceil(values / self.config.block_size)

        def freeze(name: str, *shape: int, dtype: torch.dtype) -> None:
            self._freeze(name, torch.empty(shape, dtype=dtype, device=device))

        freeze("weight", math.ceil(values / 2), dtype=torch.uint8)  # two codes a byte
        if self.config.double_quant:
            freeze("absmax", blocks, dtype=torch.uint8)
            freeze("nested_absmax", math.ceil(blocks / NESTED_BLOCK), dtype=torch.float32)
            freeze("offset", 1, dtype=torch.float32)
        else:
            freeze("absmax", blocks, dtype=torch.float32)
            self.nested_absmax = self.offset = None

    @property
    def quantized(self) -> kernels.NF4Tensor:
        """The matrix as the kernels take it; it shares the parameters' memory.

        It is made, and checked, once for the same parameters: a step asks for it twice a layer.
        """
        made, own = self._made, self._parameters  # a module's own look-up is slower
        if (
            made is not None
            and made.codes is own["weight"]
            and made.absmax is own["absmax"]
            and (made.nested_absmax is None or made.nested_absmax is own["nested_absmax"])
            and (made.offset is None or made.offset is own["offset"])
            and made.dtype is self.dtype
        ):
            return made
        found = self._of(self.weight, self.absmax, self.nested_absmax, self.offset)
        if not torch.compiler.is_dynamo_compiling():  # else the next call would compile again
            self._made = found
        return found

    def _of(
        self, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None
    ) -> kernels.NF4Tensor:
        config = self.config
        return kernels.NF4Tensor(
            codes,
            absmax,
            nested_absmax,
            offset,
            self.shape,
            config.block_size,
            self.dtype,
            config.quant_type,
        )

    def whole(self) -> kernels.NF4Tensor:
        if not is_sharded(self.weight):
            return self.quantized
        parts = self.weight, self.absmax, self.nested_absmax, self.offset
        codes, absmax, nested, offset = (None if p is None else whole(p) for p in parts)
        assert codes is not None
        assert absmax is not None
        return self._of(codes, absmax, nested, offset)

    stored = quantized  # by itself, and not by the class above, which is one call more

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # which is the parameters once more

    def place(self, q: kernels.Packed) -> None:
        assert isinstance(q, kernels.NF4Tensor)
        self._freeze("weight", q.codes)
        self._freeze("absmax", q.absmax)
        if q.nested_absmax is not None and q.offset is not None:
            self._freeze("nested_absmax", q.nested_absmax)
            self._freeze("offset", q.offset)

    def _pack(self, w: Tensor, device: torch.device) -> kernels.NF4Tensor:
        config = self.config
        quantize = kernels.quantize_nf4 if config.quant_type == "nf4" else kernels.quantize_fp4
        options = {"double_quant": config.double_quant, "search_scales": config.search_scales}
        return quantize(w, block_size=config.block_size, device=device, **options)


class Int8Weight(PackedWeight):
    """A matrix in 8 bits, with one scale per row."""

    scale: nn.Parameter

    def _allocate(self, device: torch.device | None) -> None:
        rows, _ = self.shape
        self._freeze("weight", torch.empty(self.shape, dtype=torch.int8, device=device))
        self._freeze("scale", torch.empty(rows, dtype=torch.float32, device=device))

    @property
    def quantized(self) -> kernels.Int8Tensor:
        return kernels.Int8Tensor(self.weight, self.scale, self.dtype)

    def whole(self) -> kernels.Int8Tensor:
        return kernels.Int8Tensor(whole(self.weight), whole(self.scale), self.dtype)

    def place(self, q: kernels.Packed) -> None:
        assert isinstance(q, kernels.Int8Tensor)
        self._freeze("weight", q.values)
        self._freeze("scale", q.scale)

    def _pack(self, w: Tensor, device: torch.device) -> kernels.Int8Tensor:
        return kernels.quantize_int8(w.to(device))


# ---- what a layer does with its weight ----


class PackedLinear(PackedWeight):
    """y = x W^T + bias, W [out_features, in_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        super().__init__((out_features, in_features), config, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.frozen_linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.dtype}, {_storage(self.config)}"
        )


class PackedEmbedding(PackedWeight):
    """Rows of W [num_embeddings, embedding_dim]: ids int64 [...] give [..., embedding_dim]."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: QuantConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        super().__init__((num_embeddings, embedding_dim), config, dtype, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return kernels.dequantize_rows(self.quantized, ids, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_storage(self.config)}"


def _storage(config: QuantConfig) -> str:
    if config.quant_type == "int8":
        return "int8"
    return f"{config.quant_type}, block_size={config.block_size}"


class NF4Linear(PackedLinear, NF4Weight):
    """A frozen linear layer in 4 bits."""


class Int8Linear(PackedLinear, Int8Weight):
    """A frozen linear layer in 8 bits."""


class NF4Embedding(PackedEmbedding, NF4Weight):
    """A frozen embedding in 4 bits."""


class Int8Embedding(PackedEmbedding, Int8Weight):
    """A frozen embedding in 8 bits."""


# ---- from dense layers to packed ones ----


def packed_layer(layer: nn.Linear | nn.Embedding, config: QuantConfig) -> PackedWeight:
    """Return the packed form of `layer`, stored as `config.quant_type`.

    A layer on the meta device gives a shell without values.
    """
    weight, int8 = layer.weight, config.quant_type == "int8"
    packed: PackedWeight
    if isinstance(layer, nn.Linear):
        packed = (Int8Linear if int8 else NF4Linear)(
            layer.in_features,
            layer.out_features,
            config,
            layer.bias,
            dtype=weight.dtype,
            device=weight.device,
        )
    else:
        packed = (Int8Embedding if int8 else NF4Embedding)(
            layer.num_embeddings,
            layer.embedding_dim,
            config,
            dtype=weight.dtype,
            device=weight.device,
        )
    if not weight.is_meta:
        packed.requantize(weight.detach())
    return packed.train(layer.training)


def quantize(module: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """Replace the linear layers inside a module by packed ones, in place.

    Every nn.Linear is packed, except the output head (`lm_head`) and the layers that
    `config.skip_modules` names (by default the routers of experts). The head and the embeddings
    are packed too if `config` says how. Only layers of the classes nn.Linear and nn.Embedding
    themselves are packed: a subclass may compute something else with its weight.

    Args:
        module: A model, dense, without adapters. On the meta device its layers become shells.
        config: How the weights are stored; None means QuantConfig(), which is NF4.

    Returns:
        `module` itself.

    Raises:
        LorakitError: If an adapter is attached, nothing is to be quantized, a name in `config` is
            no layer, a weight holds NaN or infinite values, or a weight belongs to two layers.
            Nothing is changed then.
    """
    config = config or QuantConfig()
    if any("adapters" in name.split(".") for name, _ in module.named_parameters()):
        raise LorakitError("quantize: an adapter is attached; quantize the model before attaching")
    _check_names(module, config)
    storage = _storage_by_layer(module, config)
    if not storage:
        raise LorakitError("quantize: the module holds no nn.Linear to quantize")
    _check_weights(module, storage)
    for name, kind in storage.items():  # each dense weight goes as soon as it is packed
        config_of_layer = dataclasses.replace(config, quant_type=kind)
        module.set_submodule(name, packed_layer(_dense_layer(module, name), config_of_layer))
    return module


def _dense_layer(module: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    layer = module.get_submodule(name)
    assert isinstance(layer, (nn.Linear, nn.Embedding))
    return layer


def _storage_by_layer(module: nn.Module, config: QuantConfig) -> dict[str, Storage]:
    """Return how each layer that is to be packed will be stored, by its name."""
    found: dict[str, Storage] = {}
    for name, layer in module.named_modules():
        kind: Storage | None = None
        if type(layer) is nn.Embedding:
            kind = config.embed_tokens
        elif type(layer) is nn.Linear and name:
            leaf = name.rpartition(".")[2]
            kind = config.lm_head if leaf == "lm_head" else config.quant_type
        if kind is not None and not any(lies_in(name, skipped) for skipped in config.skip_modules):
            found[name] = kind
    return found


def _check_names(module: nn.Module, config: QuantConfig) -> None:
    """Refuse a config that names layers which the module does not have."""
    layers = dict(module.named_modules())
    leaves = {name.rpartition(".")[2] for name in layers}
    for skipped in config.skip_modules:
        by_default = skipped in QuantConfig().skip_modules
        if not by_default and not any(lies_in(name, skipped) for name in layers):
            hint = nearest(skipped, {*layers, *leaves})
            raise LorakitError(f"quantize: skip_modules: {skipped!r} is no layer{hint}")
    if config.lm_head is not None and "lm_head" not in leaves:
        raise LorakitError(
            "quantize: there is no layer lm_head to be stored as "
            f"{config.lm_head}; a head that is tied to the embedding is stored with embed_tokens"
        )
    if config.embed_tokens is not None and nn.Embedding not in map(type, layers.values()):
        raise LorakitError("quantize: there is no nn.Embedding for embed_tokens")


def _check_weights(module: nn.Module, storage: dict[str, Storage]) -> None:
    """Refuse weights that cannot be packed."""
    places = module.named_modules(remove_duplicate=False)  # a layer may have two
    owners = Counter(id(layer._parameters.get("weight")) for _, layer in places)
    for name in storage:
        layer = _dense_layer(module, name)
        weight = layer.weight
        if is_sharded(weight):
            raise LorakitError(
                "quantize: the model is sharded; quantize it while it is loaded (load_model)"
            )
        if owners[id(weight)] > 1:
            raise LorakitError(
                f"quantize: {name} shares its weight with another layer; packed they would be two"
            )
        if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
            raise LorakitError(f"quantize: {name} has a max_norm, which a packed embedding has not")
        if weight.is_meta:
            continue
        if weight.dtype not in FLOATS:
            raise LorakitError(f"quantize: {name} holds {weight.dtype}, which is not packed")
        if weight.numel() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
            raise LorakitError(f"quantize: {name} holds NaN or infinite values")
