"""A model made ready for the decoding step, and a cache for it: each is checked once."""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import address
from ...pretend import kind_of
from ..frozen_linear.dense import Packed
from ..nf4 import NF4Tensor
from ..swiglu import check_activation
from . import cpu


class DecodeLayer(NamedTuple):
    """The weights of one layer, named like the modules of model files.

    The seven matrices are dense, or packed in NF4, FP4 or int8. A packed one is taken as
    `dequantize` makes it dense in fp32.

    With sandwich norms (`pre_feedforward_norm` and `post_feedforward_norm`, both or none),
    `post_attention_norm` is the norm of attention's output; without, it is the norm before the MLP.

    Attributes:
        input_norm: the norm before attention [H].
        q: the weight that makes queries [Hq D, H].
        k: the weight that makes keys [Hk D, H].
        v: the weight that makes values [Hk D, H].
        o: the weight of attention's output [H, Hq D].
        gate: the weight that makes the gate of the MLP [I, H].
        up: the weight that makes what the gate is multiplied by [I, H].
        down: the weight of the MLP's output [H, I].
        post_attention_norm: a norm [H]; see above.
        pre_feedforward_norm: the norm before the MLP [H], or None.
        post_feedforward_norm: the norm of the MLP's output [H], or None.
        q_norm: the norm of each head of q [D], or None; both of q and k, or none.
        k_norm: the norm of each head of k [D], or None.
        q_bias: the bias of `q` [Hq D], or None.
        k_bias: the bias of `k` [Hk D], or None.
        v_bias: the bias of `v` [Hk D], or None.
        o_bias: the bias of `o` [H], or None.
        gate_bias: the bias of `gate` [I], or None.
        up_bias: the bias of `up` [I], or None.
        down_bias: the bias of `down` [H], or None.
        rope: which of the step's tables of cos and sin turn its heads.
    """

    input_norm: Tensor
    q: Tensor | Packed
    k: Tensor | Packed
    v: Tensor | Packed
    o: Tensor | Packed
    gate: Tensor | Packed
    up: Tensor | Packed
    down: Tensor | Packed
    post_attention_norm: Tensor
    pre_feedforward_norm: Tensor | None = None
    post_feedforward_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    rope: int = 0


class DecodeUpdate(NamedTuple):
    """What an adapter adds to a linear layer: scale B A x.

    Attributes:
        A: fp32 [r, K], contiguous, in host memory.
        B: fp32 [N, r], contiguous, in host memory.
        scale: the factor.
    """

    A: Tensor
    B: Tensor
    scale: float


class DecodePlan:
    """A model made ready for `decode_step`: its tensors, checked once, and its sizes.

    All dense tensors are contiguous, in host memory and of one dtype, fp32 or bf16. Embedding and
    head may be packed, like the matrices of layers. The plan keeps its tensors alive and sees
    changes made to their values in place. Several threads may use it at a time, each with a cache
    of its own.

    Args:
        embedding: the rows of the tokens [V, H].
        layers: the weights of each layer.
        norm: the norm before the head [H].
        head: the weight of the logits [V, H]; the embedding itself where they are tied.
        num_heads: Hq, the heads of queries.
        num_kv_heads: Hk, the heads of keys and values, of which num_heads is a multiple.
        head_dim: D, the values of a head, an even number.
        eps: what every norm adds to the mean of the squares.
        activation: of the gate, "silu", "gelu_pytorch_tanh" or "gelu".
        norm_weight_offset: what every norm adds to its weight, 1 for Gemma.
        embedding_scale: what the rows of the embedding are multiplied by.
        attention_scale: what the scores are multiplied by; None for D^-0.5.
        attn_softcap: the soft cap of the scores, or None.
        final_softcap: the soft cap of the logits, or None.
        adapters: what rows may add to the model: for each adapter, the updates of each layer by the
            names of its linear layers.

    Raises:
        ValueError: a tensor or a number does not fit; the error names it.
    """

    def __init__(
        self,
        embedding: Tensor | Packed,
        layers: Sequence[DecodeLayer],
        norm: Tensor,
        head: Tensor | Packed,
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
        adapters: Sequence[Sequence[Mapping[str, DecodeUpdate]]] = (),
    ):
        check_activation(activation, "activation")
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads are no multiple of {num_kv_heads} kv heads")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}: rotation needs an even number")
        dtype = (embedding if isinstance(embedding, Tensor) else norm).dtype
        if len(embedding.shape) != 2 or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"embedding is {dtype} {list(embedding.shape)}: "
                "[vocabulary, hidden] in float32 or bfloat16 is expected"
            )
        self.embedding, self.layers, self.norm, self.head = embedding, tuple(layers), norm, head
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.eps, self.activation = eps, activation
        self.norm_weight_offset, self.embedding_scale = norm_weight_offset, embedding_scale
        self.attention_scale = head_dim**-0.5 if attention_scale is None else attention_scale
        self.attn_softcap, self.final_softcap = attn_softcap, final_softcap
        self.vocab_size, self.hidden_size = embedding.shape
        self.dtype, self.device = dtype, embedding.device
        self.ropes = 1 + max((layer.rope for layer in self.layers), default=0)
        self.inner_size = self.layers[0].gate.shape[0] if self.layers else 0
        self.adapters = tuple(adapters)
        self._check_tensors()
        self._check_updates()
        self.packed = cpu.pack(self)

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

    def _check_updates(self) -> None:
        for number, adapter in enumerate(self.adapters):
            if len(adapter) != len(self.layers):
                raise ValueError(f"adapters[{number}] has not {len(self.layers)} layers")
            for i, updates in enumerate(adapter):
                for name, update in updates.items():
                    what = f"adapters[{number}][{i}].{name}"
                    if name not in cpu.LINEARS:
                        raise ValueError(f"{what} is none of {', '.join(cpu.LINEARS)}")
                    N, K = self.layers[i]._asdict()[name].shape
                    r = update.A.shape[0]
                    for part, shape in ((update.A, (r, K)), (update.B, (N, r))):
                        if part.shape != shape or part.dtype != torch.float32 or r < 1:
                            raise ValueError(
                                f"{what} is {part.dtype} {list(part.shape)}, expected float32 "
                                f"{list(shape)}"
                            )
                        if not in_host_memory(part):
                            raise ValueError(f"{what} must be contiguous and in host memory")

    def _check(self, name: str, tensor: Tensor | Packed, *shape: int) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if not isinstance(tensor, Tensor):
            if name.rpartition(".")[2] not in (*cpu.LINEARS, "embedding", "head"):
                raise ValueError(f"{name} must be dense")
            if isinstance(tensor, NF4Tensor) and shape[1] % tensor.block_size:
                raise ValueError(f"{name} has rows that are no multiple of its block")
            parts = (
                (tensor.codes,) if isinstance(tensor, NF4Tensor) else (tensor.values, tensor.scale)
            )
            if not all(map(in_host_memory, parts)):
                raise ValueError(f"{name} must be contiguous and in host memory")
            return
        if tensor.dtype != self.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the embedding {self.dtype}")
        if not in_host_memory(tensor):
            raise ValueError(f"{name} must be contiguous and in host memory")


def in_host_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous there, or pretended to be (pretend.py)."""
    return kind_of(tensor.device) == "cpu" and tensor.is_contiguous()


MOST_KINDS = 2
"""How many tables of pages a row may have; `KINDS` of cpu.cpp."""


class DecodePlace(NamedTuple):
    """A row's position, and the pages of what came before it.

    Attributes:
        position: the position of the row's first new token.
        pages: for each kind of layer, the pages of the row in order, as `array("q")`. What a window
            has left behind may be any number.
    """

    position: int
    pages: tuple[array, ...]


class DecodeCache:
    """The keys and values of a plan's layers in pages, checked once.

    The tensors are kept, and `decode_step` writes to them.

    Args:
        plan: the model.
        keys: of each layer, [pages, size, Hk, D] in the plan's dtype, contiguous, in host memory.
            The size is a power of two, one for all layers. The number of pages may differ from kind
            to kind.
        values: of each layer, in the shape of its keys.
        windows: how many positions a token sees in each layer, itself included, or None for all.
            Layers of one window are of one kind: they share a table of pages. There are two kinds
            at most, in the order in which layers bring them.

    Raises:
        ValueError: a tensor or a window does not fit; the error names it.
    """

    def __init__(
        self,
        plan: DecodePlan,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        windows: Sequence[int | None],
    ):
        if not len(keys) == len(values) == len(windows) == len(plan.layers):
            raise ValueError(
                f"the cache needs keys, values and a window of each of {len(plan.layers)} layers"
            )
        self.keys, self.values = tuple(keys), tuple(values)
        self.reach = list(dict.fromkeys(windows))  # of each kind
        self.kinds = len(self.reach)
        self.kind_of = [self.reach.index(window) for window in windows]
        if self.kinds > MOST_KINDS:
            raise ValueError(f"the windows are {self.reach}, at most {MOST_KINDS} may differ")
        self.size = keys[0].shape[1] if keys and keys[0].dim() == 4 else 1
        if self.size & (self.size - 1) or not self.size:
            raise ValueError(f"cache[0] has pages of {self.size} positions, which must be 2^n")
        self.pages = [len(keys[self.kind_of.index(kind)]) for kind in range(self.kinds)]
        self.contexts = array("q")  # `Context[layers]` of cpu.cpp
        for i, (k, v, window) in enumerate(zip(keys, values, windows, strict=True)):
            kind = self.kind_of[i]
            self._check_pair(plan, self.pages[kind], i, k, v)
            if window is not None and window < 1:
                raise ValueError(f"cache[{i}] has a window of {window}")
            shift = self.size.bit_length() - 1
            self.contexts.extend((address(k), address(v), shift, window or 0, kind))

    def _check_pair(
        self, plan: DecodePlan, pages: int, i: int, keys: Tensor, values: Tensor
    ) -> None:
        """Raise ValueError unless the keys and values of a layer fit the plan."""
        expected = [pages, self.size, plan.num_kv_heads, plan.head_dim]
        for name, tensor in (("keys", keys), ("values", values)):
            if list(tensor.shape) != expected:
                raise ValueError(f"cache[{i}] {name} are {list(tensor.shape)}, expected {expected}")
            if tensor.dtype != plan.dtype:
                raise ValueError(f"cache[{i}] {name} are {tensor.dtype}, not {plan.dtype}")
            if not in_host_memory(tensor):
                raise ValueError(f"cache[{i}] {name} must be contiguous and in host memory")
