"""One decoding step: a new token per row through a whole dense decoder, in one call.

The maths
---------
For token ids [B] and a cache of earlier keys and values, with the norm of a row
n(x) = (weight + offset) x / sqrt(mean(x^2) + eps), where offset is 0 or, for Gemma, 1:

    x = embedding[ids] * embedding_scale
    for each layer:
        q, k, v = n(x) Wq^T, n(x) Wk^T, n(x) Wv^T             + biases, if any
        q, k    = rotate(n(q)), rotate(n(k))                  n, per head, if the family has it
        cache[slot] = k, v                                    rounded to the cache's dtype
        s_t     = c tanh(scale <q, k_t> / c)                  visible slots t; without c no tanh
        x      += (sum_t softmax(s)_t v_t) Wo^T
        x      += (act(n(x) Wgate^T) * (n(x) Wup^T)) Wdown^T
    logits = c tanh(n(x) head^T / c)

A sandwich layer (Gemma 2 and 3) also takes the norm of what attention and the MLP add to x. The
order of the slots is irrelevant, since keys are stored rotated: a cache may be a ring buffer.

Weights are fp32 or bf16 and widened exactly; everything else is fp32. Of the activations only the
new keys and values are rounded, when they are stored, and attention reads them rounded.

Memory layout
-------------
    embedding, head             [V, H]      the checkpoints' layout: an output is one contiguous row
    keys, values                [B, capacity, Hk, D]
    cos, sin                    fp32 [B, D / 2], half-split pairs (see rope)
    visible                     bool [B, count or more], false where a row must not attend

Nothing is repacked or copied: a plan holds pointers to the model's own tensors.

The trade-off
-------------
With one row, a step reads every weight once to use it once: its time is the weights' bytes over the
memory's bandwidth. A framework adds the launch of some 15 ops per layer, each waiting for the one
before it; for a model of 135M parameters that costs more than the reading. The kernel runs the
layers inside one parallel region instead (see cpu.cpp), at the price of being a second description
of the decoder, without training, hooks or adapters that are not merged. It suits few rows: from a
few dozen on, the products are worth a matrix multiplication.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import FLOAT, INT64, POINTER
from ..swiglu import Activation, check_activation
from . import reference


class DecodeLayer(NamedTuple):
    """The weights of one layer, named like the checkpoints' modules.

    With sandwich norms (`pre_feedforward_norm` and `post_feedforward_norm`, both or none),
    `post_attention_norm` is the norm of attention's output; without, it is the norm before the MLP.
    """

    input_norm: Tensor  # [H]
    q: Tensor  # [Hq D, H]
    k: Tensor  # [Hk D, H]
    v: Tensor  # [Hk D, H]
    o: Tensor  # [H, Hq D]
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I]
    post_attention_norm: Tensor  # [H]
    pre_feedforward_norm: Tensor | None = None  # [H]
    post_feedforward_norm: Tensor | None = None  # [H]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    rope: int = 0  # which of the step's (cos, sin) tables


class DecodePlan:
    """A model made ready for `decode_step`: its tensors, checked once, and what is read off them.

    All tensors are contiguous, in host memory and of one dtype, fp32 or bf16; ValueError names the
    one that is not. `head` is the embedding itself where they are tied. The plan keeps the tensors
    alive and sees changes made to their values in place. Several threads may use it at a time, each
    with a cache of its own.
    """

    def __init__(
        self,
        embedding: Tensor,  # [V, H]
        layers: Sequence[DecodeLayer],
        norm: Tensor,  # [H]
        head: Tensor,  # [V, H]
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        activation: str,
        norm_weight_offset: float = 0.0,
        embedding_scale: float = 1.0,
        attention_scale: float | None = None,
        attn_softcap: float | None = None,
        final_softcap: float | None = None,
    ):
        check_activation(activation, "activation")
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads are no multiple of {num_kv_heads} kv heads")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}: rotation needs an even number")
        if embedding.dim() != 2 or embedding.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"embedding is {embedding.dtype} {list(embedding.shape)}: "
                "[vocabulary, hidden] in float32 or bfloat16 is expected"
            )
        self.embedding, self.layers, self.norm, self.head = embedding, tuple(layers), norm, head
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.eps, self.activation = eps, activation
        self.norm_weight_offset, self.embedding_scale = norm_weight_offset, embedding_scale
        self.attention_scale = head_dim**-0.5 if attention_scale is None else attention_scale
        self.attn_softcap, self.final_softcap = attn_softcap, final_softcap
        self.vocab_size, self.hidden_size = embedding.shape
        self.dtype, self.device = embedding.dtype, embedding.device
        self.ropes = 1 + max((layer.rope for layer in self.layers), default=0)
        self.inner_size = self.layers[0].gate.shape[0] if self.layers else 0
        self._check_tensors()
        self._layers, self._model = _pack(self)
        self._op = "decode_bf16" if self.dtype == torch.bfloat16 else "decode_fp32"

    def _check_tensors(self) -> None:
        V, H, I, D = self.vocab_size, self.hidden_size, self.inner_size, self.head_dim  # noqa: E741
        Q, K = self.num_heads * D, self.num_kv_heads * D
        self._check("embedding", self.embedding, V, H)
        self._check("head", self.head, V, H)
        self._check("norm", self.norm, H)
        shapes = {
            "input_norm": (H,), "q": (Q, H), "k": (K, H), "v": (K, H), "o": (H, Q),
            "gate": (I, H), "up": (I, H), "down": (H, I), "post_attention_norm": (H,),
            "pre_feedforward_norm": (H,), "post_feedforward_norm": (H,),
            "q_norm": (D,), "k_norm": (D,), "q_bias": (Q,), "k_bias": (K,), "v_bias": (K,),
            "o_bias": (H,), "gate_bias": (I,), "up_bias": (I,), "down_bias": (H,),
        }  # fmt: skip
        for i, layer in enumerate(self.layers):
            for name, shape in shapes.items():
                tensor = layer._asdict()[name]
                if tensor is not None:
                    self._check(f"layers[{i}].{name}", tensor, *shape)
                elif name not in DecodeLayer._field_defaults:
                    raise ValueError(f"layers[{i}].{name} is missing")
            for one, other in (
                ("pre_feedforward_norm", "post_feedforward_norm"),
                ("q_norm", "k_norm"),
            ):
                if (layer._asdict()[one] is None) != (layer._asdict()[other] is None):
                    raise ValueError(f"layers[{i}] needs both of {one} and {other}, or none")
            if layer.rope < 0:
                raise ValueError(f"layers[{i}].rope is {layer.rope}")

    def _check(self, name: str, tensor: Tensor, *shape: int) -> None:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != self.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the embedding {self.dtype}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and in host memory")


class DecodeCache:
    """The keys and values of a plan's layers [B, capacity, Hk, D], checked once.

    Raises ValueError for what does not fit the plan. The tensors are kept, and written by
    `decode_step`.
    """

    def __init__(self, plan: DecodePlan, keys: Sequence[Tensor], values: Sequence[Tensor]):
        if not len(keys) == len(values) == len(plan.layers):
            raise ValueError(
                f"the cache needs keys and values of each of {len(plan.layers)} layers"
            )
        self.keys, self.values = tuple(keys), tuple(values)
        self.rows = len(keys[0]) if keys else 0
        self._contexts = array("q")  # cpu.cpp's Context[layers]
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            capacity = _check_pair(plan, self.rows, i, k, v)
            self._contexts.extend((k.data_ptr(), v.data_ptr(), capacity, 0, 0, 0, 0))


def decode_compiled(device: torch.device) -> bool:
    """Whether `decode_step` runs as compiled code there; its reference is no faster than a model's
    own forward.
    """
    return dispatch.pick(device, "cpu") == "cpu"


def decode_step(
    plan: DecodePlan,
    ids: Tensor,  # int64 [B] or [B, T]
    tables: Sequence[tuple[Tensor, Tensor]],  # per rope: cos, sin, fp32 [B, D / 2] or [B, T, D / 2]
    cache: DecodeCache,
    slots: Sequence[tuple[int, int]],  # per layer: slot, count
    visible: Sequence[Tensor | None] | None = None,  # per layer: bool [B, >= count], or None
) -> Tensor:
    """Logits fp32 [B, V] of the token after `ids`; the cache gains their keys and values at `slot`.

    A query attends to slots 0 .. count - 1, which include the new one, where `visible` is true; to
    its own slot always. With T tokens a row (a prompt, or a piece of one) token t goes to slot + t,
    sees the slots up to its own, and count is slot + T; the logits are those after the last one.
    Raises ValueError, before anything is written, for what does not fit. One cache serves one step
    at a time.
    """
    B, T = len(ids), ids.shape[-1] if ids.dim() == 2 else 1
    rotations = _check_inputs(plan, ids, tables)
    contexts = _check_slots(plan, B, T, cache, slots, visible)
    if dispatch.pick(plan.device, "cpu") == "reference":
        return _by_reference(plan, ids.view(B, T), tables, cache, slots, visible)
    logits = torch.empty(B, plan.vocab_size)
    run = dispatch.function(plan._op, POINTER, POINTER, POINTER, POINTER, POINTER, INT64, INT64)
    run(
        ctypes.addressof(plan._model),
        ids.data_ptr(),
        rotations.buffer_info()[0],
        contexts.buffer_info()[0],
        logits.data_ptr(),
        B,
        T,
    )
    return logits


@torch.no_grad()
def _by_reference(plan, ids, tables, cache, slots, visible) -> Tensor:
    """One token after another."""
    (B, T), D = ids.shape, plan.head_dim
    tables = [[table.view(B, T, D // 2) for table in pair] for pair in tables]
    for t in range(T):
        at = [[table[:, t] for table in pair] for pair in tables]
        counts = [(slot + t, count - T + 1 + t) for slot, count in slots]
        layers = [
            (*its, *its_at) for *its, its_at in zip(cache.keys, cache.values, counts, strict=True)
        ]
        logits = reference.decode_step(plan, ids[:, t], at, layers, visible)
    return logits


def _check_inputs(plan: DecodePlan, ids: Tensor, tables) -> array:
    """What cpu.cpp reads as Table[ropes], once ids and tables fit."""
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(
            f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [B] or [B, T], none of them 0"
        )
    if not ids.is_contiguous() or not ids.is_cpu:
        raise ValueError("ids must be contiguous and in host memory")
    if not all(0 <= i < plan.vocab_size for i in ids.flatten().tolist()):
        raise ValueError(f"ids hold a token outside of [0, {plan.vocab_size})")
    if len(tables) < plan.ropes:
        raise ValueError(f"tables are {len(tables)}, the layers use {plan.ropes}")
    shape, rotations = (*ids.shape, plan.head_dim // 2), array("q")
    for i, pair in enumerate(tables):
        for name, table in zip(("cos", "sin"), pair, strict=True):
            if table.shape != shape or table.dtype != torch.float32:
                raise ValueError(
                    f"tables[{i}] {name} is {table.dtype} {list(table.shape)}, "
                    f"expected float32 {list(shape)}"
                )
            if not table.is_contiguous() or not table.is_cpu:
                raise ValueError(f"tables[{i}] {name} must be contiguous and in host memory")
            rotations.append(table.data_ptr())
    return rotations


def _check_slots(plan: DecodePlan, B: int, T: int, cache: DecodeCache, slots, visible) -> array:
    """What cpu.cpp reads as Context[layers], once slots and visible fit.

    A step finds Python's own data evicted by the weights, so every object it touches counts: this
    loop writes numbers into one array.
    """
    depth, contexts = len(plan.layers), cache._contexts
    if len(slots) != depth or (visible is not None and len(visible) != depth):
        raise ValueError(f"slots and visible need an entry for each of {depth} layers")
    if cache.rows != B and depth:
        raise ValueError(f"ids hold {B} rows, the cache {cache.rows}")
    for i, (slot, count) in enumerate(slots):
        at = 7 * i
        if not 0 <= slot < count <= contexts[at + 2] or (T > 1 and count != slot + T):
            raise ValueError(
                f"slots[{i}] are slot {slot}, count {count}, of a capacity of {contexts[at + 2]}"
            )
        contexts[at + 3], contexts[at + 4] = slot, count
        if visible is None or visible[i] is None:
            contexts[at + 5] = 0
        else:
            contexts[at + 5], contexts[at + 6] = _check_mask(B, i, visible[i], count)
    return contexts


def _check_pair(plan: DecodePlan, B: int, i: int, keys: Tensor, values: Tensor) -> int:
    """The capacity of a layer's cache, if it fits."""
    tail, shape = (plan.num_kv_heads, plan.head_dim), keys.shape
    if keys.dim() != 4 or shape[0] != B or shape[2:] != tail or values.shape != shape:
        raise ValueError(
            f"cache[{i}] keys are {list(shape)}, values {list(values.shape)}, "
            f"expected [{B}, capacity, {tail[0]}, {tail[1]}]"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != plan.dtype:
            raise ValueError(f"cache[{i}] {name} are {tensor.dtype}, not {plan.dtype}")
        if not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"cache[{i}] {name} must be contiguous and in host memory")
    return shape[1]


def _check_mask(B: int, i: int, mask: Tensor, count: int) -> tuple[int, int]:
    """Pointer and width of a layer's mask, if it fits."""
    if mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != B:
        raise ValueError(
            f"visible[{i}] is {mask.dtype} {list(mask.shape)}, expected bool [{B}, {count}]"
        )
    if mask.shape[1] < count or not mask.is_contiguous() or not mask.is_cpu:
        raise ValueError(f"visible[{i}] must be contiguous, in host memory and {count} wide")
    return mask.data_ptr(), mask.shape[1]


# ---- the compiled kernel ------------------------------------------------------------------------


class _Model(ctypes.Structure):
    """cpu.cpp's Model."""

    _fields_ = (
        *((name, POINTER) for name in ("embedding", "norm", "head", "layers")),
        *((name, INT64) for name in ("depth", "vocab", "hidden", "inner")),
        *((name, INT64) for name in ("heads", "kv_heads", "head_dim", "activation")),
        *((name, FLOAT) for name in ("eps", "norm_offset", "embedding_scale")),
        *((name, FLOAT) for name in ("attention_scale", "attn_softcap", "final_softcap")),
    )


def _pack(plan: DecodePlan) -> tuple[array, _Model]:
    """cpu.cpp's Layer[depth], whose order is DecodeLayer's, and its Model, which points there."""
    layers = array("q")
    for layer in plan.layers:
        layers.extend(0 if tensor is None else tensor.data_ptr() for tensor in layer[:-1])
        layers.append(layer.rope)
    model = _Model(
        plan.embedding.data_ptr(),
        plan.norm.data_ptr(),
        plan.head.data_ptr(),
        layers.buffer_info()[0],
        len(plan.layers),
        plan.vocab_size,
        plan.hidden_size,
        plan.inner_size,
        plan.num_heads,
        plan.num_kv_heads,
        plan.head_dim,
        Activation[plan.activation],
        plan.eps,
        plan.norm_weight_offset,
        plan.embedding_scale,
        plan.attention_scale,
        plan.attn_softcap or 0,
        plan.final_softcap or 0,
    )
    return layers, model
