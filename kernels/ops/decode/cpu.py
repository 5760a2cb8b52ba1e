"""Calls of the C++ kernel in cpu.cpp: one decoding step, in host memory."""

import ctypes
import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address
from ..int8 import Int8Tensor
from ..nf4 import NF4Tensor
from ..nf4.cpu import PackedNF4, packed_arguments
from ..swiglu import Activation

if TYPE_CHECKING:
    from .plan import DecodePlan


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a layer, in the order of `Linear` of cpu.cpp."""


class PackedWeight(ctypes.Structure):
    """`PackedWeight` of cpu.cpp: a matrix in 4 bits or in 8, or neither."""

    _fields_ = (("nf4", PackedNF4), ("values", POINTER), ("scale", POINTER))


class Model(ctypes.Structure):
    """`Model` of cpu.cpp: a plan, without the caches."""

    _fields_ = (
        *((name, POINTER) for name in ("embedding", "norm", "head", "layers")),
        *((name, INT64) for name in ("depth", "vocab", "hidden", "inner")),
        *((name, INT64) for name in ("heads", "kv_heads", "head_dim", "activation")),
        *((name, POINTER) for name in ("packed", "updates")),
        ("rank", INT64),
        *((name, FLOAT) for name in ("eps", "norm_offset", "embedding_scale")),
        *((name, FLOAT) for name in ("attention_scale", "attn_softcap", "final_softcap")),
    )


class PackedPlan(NamedTuple):
    """A plan as the kernel reads it: pointers to tensors, which the plan keeps alive."""

    op: str
    layers: array  # `Layer[depth]` of cpu.cpp
    packed: ctypes.Array | None  # `PackedWeight[depth LINEARS + 2]`, if one is packed
    updates: array  # `Update[adapters, depth, LINEARS]`
    model: Model  # which points to the layers and updates


def pack(plan: "DecodePlan") -> PackedPlan:
    """Return the plan as the kernel reads it. The order of a layer's fields is DecodeLayer's."""
    layers = array("q")
    for layer in plan.layers:
        layers.extend(map(_dense_address, layer[:-1]))
        layers.append(layer.rope)
    weights = [layer._asdict()[name] for layer in plan.layers for name in LINEARS]
    weights += plan.embedding, plan.head
    packed = None
    if not all(isinstance(weight, Tensor) for weight in weights):
        packed = (PackedWeight * len(weights))(*map(_packed_weight, weights))
    updates, rank = array("B"), 0  # of bytes: three whole numbers and a double each
    for adapter in plan.adapters:
        for by_name in adapter:
            for name in LINEARS:
                update = by_name.get(name)
                if update is None:
                    updates.frombytes(struct.pack("qqqd", 0, 0, 0, 0.0))
                else:
                    (A, B, scale), r = update, len(update.A)
                    updates.frombytes(struct.pack("qqqd", address(A), address(B), r, scale))
                    rank = max(rank, r)
    model = Model(
        _dense_address(plan.embedding),
        address(plan.norm),
        _dense_address(plan.head),
        layers.buffer_info()[0],
        len(plan.layers),
        plan.vocab_size,
        plan.hidden_size,
        plan.inner_size,
        plan.num_heads,
        plan.num_kv_heads,
        plan.head_dim,
        Activation[plan.activation],
        0 if packed is None else ctypes.addressof(packed),
        updates.buffer_info()[0] if updates else 0,
        rank,
        plan.eps,
        plan.norm_weight_offset,
        plan.embedding_scale,
        plan.attention_scale,
        plan.attn_softcap or 0,
        plan.final_softcap or 0,
    )
    return PackedPlan(f"decode_{CPU_DTYPES[plan.dtype]}", layers, packed, updates, model)


def _dense_address(weight: Tensor | NF4Tensor | Int8Tensor | None) -> int:
    return address(weight) if isinstance(weight, Tensor) else 0


def _packed_weight(weight: Tensor | NF4Tensor | Int8Tensor) -> PackedWeight:
    if isinstance(weight, NF4Tensor):
        return PackedWeight(packed_arguments(weight))
    found = PackedWeight()
    if isinstance(weight, Int8Tensor):
        found.values, found.scale = address(weight.values), address(weight.scale)
    return found


def decode_step(
    packed: PackedPlan,
    ids: Tensor,
    rotations: array,
    contexts: array,
    places: array,
    vocab_size: int,
) -> Tensor:
    """Call the C++ kernel `decode`; see cpu.cpp. Returns the logits fp32 [B, V].

    ids are int64 [B] or [B, T]. rotations, contexts and places are `Table[ropes]`,
    `Context[layers]` and `Place[B]` of cpu.cpp.
    """
    B, T = len(ids), ids.shape[-1] if ids.dim() == 2 else 1
    logits = torch.empty(B, vocab_size, device=ids.device)
    run = dispatch.function(packed.op, *6 * (POINTER,), INT64, INT64)
    run(
        ctypes.addressof(packed.model),
        address(ids),
        rotations.buffer_info()[0],
        contexts.buffer_info()[0],
        places.buffer_info()[0],
        logits.data_ptr(),
        B,
        T,
    )
    return logits
