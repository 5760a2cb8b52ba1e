"""Adapters on embeddings, and on the heads that share their weight.

    LoraEmbedding   an embedding, W [V, H] by rows        y = W[id] + s B A[:, id]
    TokenRows       some rows of an embedding, trained    y = rows[id] instead of W[id]
    TiedHead        a head on the weight of an embedding that is adapted in one of these ways

A tied head computes with the embedding's weight, so it changes as the embedding does: what the
embedding adds is, to the head, an update of low rank too, with A and B in each other's place, or
for trained rows with a one-hot B.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.base import DenseBase, with_weight
from lorakit.adapters.layers.lora import LoraPart, WithLora
from lorakit.adapters.layers.wrapper import Attached, Part
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.kernels import LoraWeights, lora_linear


class HeadOfEmbedding:
    """The weight of an embedding [V, H] as that of a linear layer: the base of a tied head."""

    bias = None

    def __init__(self, embedding: nn.Module):
        packed = not isinstance(embedding, nn.Embedding)
        self.stored = embedding.quantized if packed else _frozen(embedding.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.stored, Tensor):
            return F.linear(x, self.stored)
        return kernels.frozen_linear(x, self.stored)


def _frozen(weight: Tensor) -> Tensor:
    if weight.requires_grad:
        raise LorakitError(
            "the weight of an adapted embedding is to train, and a head is tied to it: the head's "
            "gradient would be missing; freeze it, or save the embedding whole (modules_to_save)"
        )
    return weight


def _dense(embedding: nn.Module) -> Tensor:
    """The weight [V, H]; of a packed embedding as it computes."""
    return embedding.weight if isinstance(embedding, nn.Embedding) else embedding.dequantize()


def _look_up(embedding: nn.Module, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Rows of `weight` [n, any], with whatever else `embedding` does to its own; that of
    `padding_idx` gets no gradient.
    """
    if isinstance(embedding, nn.Embedding) and type(embedding) is not nn.Embedding:
        other = copy.copy(embedding)
        other._parameters = {}
        other.weight, other.padding_idx = weight, padding_idx
        return other(ids)
    return F.embedding(ids, weight, padding_idx)


def _padding(embedding: nn.Module) -> int | None:
    return embedding.padding_idx if isinstance(embedding, nn.Embedding) else None


class LoraEmbedding(WithLora):
    """base(ids) + scaling * A^T[ids] B^T, lora_A [r, V] and lora_B [H, r]."""

    endings = ("lora_embedding_A", "lora_embedding_B")

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.adapters[name]
        found = {
            self.endings[0]: part.lora_A,
            self.endings[1]: part.lora_B,
            "lora_magnitude_vector": part.magnitude,
        }
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    def update(self) -> LoraWeights | None:
        """As a tied head sees it."""
        (part,) = self.using
        return None if part is None else self.of_head(part, HeadOfEmbedding(self.base))

    def of_head(self, part: LoraPart, base) -> LoraWeights:
        A, B = part.pair()
        return LoraWeights(base, B.t(), A.t(), part.scaling)

    def compute(self, part: LoraPart, ids: Tensor) -> Tensor:
        y = self.base(ids)
        A, B = part.pair()
        low = _look_up(self.base, A.t(), ids, _padding(self.base)).to(y.dtype)
        if part.magnitude is None:
            flat, update = y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1])
            with torch.autocast(y.device.type, enabled=False):  # as precise as the embedding is
                flat = torch.addmm(flat, update, B.t().to(y.dtype), alpha=part.scaling)
            return flat.view_as(y)
        gain = (part.magnitude / self._column_norms(part)).to(y.dtype)
        return (y + part.scaling * F.linear(low, B.to(y.dtype))) * gain

    @torch.no_grad()
    def _column_norms(self, part: LoraPart) -> Tensor:
        """||W + s (B A)^T|| of each column [H], from products of rank r."""
        W = _dense(self.base)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, sB = part.lora_A.to(W.dtype), part.lora_B.to(W.dtype) * part.scaling
        square = torch.linalg.vector_norm(W, dim=0).square()
        square += 2 * (sB * (A @ W).t()).sum(1) + (sB * (sB @ (A @ A.t()))).sum(1)
        return square.clamp(min=0).sqrt()

    @property
    def weight(self) -> Tensor:
        """[V, H] with the update, computed each time: for code that uses it as a head. Gradients
        reach the adapter.
        """
        (part,) = self.using
        own = _dense(self.current())
        return own if part is None else self._sum(part, own)

    def _sum(self, part: LoraPart, W: Tensor) -> Tensor:
        A, B = part.pair()
        wide = torch.promote_types(W.dtype, torch.float32)
        found = torch.addmm(W.to(wide), A.t().to(wide), B.t().to(wide), alpha=part.scaling)
        if part.magnitude is not None:  # the lengths count as constants, as in PEFT
            found = found * (part.magnitude / found.detach().norm(dim=0))
        return found.to(W.dtype)

    @torch.no_grad()
    def joined(self, weight: Tensor | None) -> nn.Module:
        own = _dense(self.base)
        found = self._sum(self.part, own if weight is None else weight)
        if isinstance(self.base, nn.Embedding):
            return with_weight(self.base, found.to(own.dtype))
        return nn.Embedding.from_pretrained(found.to(own.dtype))


class RowsPart(Part):
    """Trained rows [n, H] for the tokens `ids` [n], n of V."""

    def __init__(self, config: LoraConfig, ids: Tensor, rows: Tensor, vocabulary: int):
        super().__init__(config)
        self.rows = nn.Parameter(rows)
        slots = torch.full((vocabulary,), -1, device=rows.device)
        slots[ids] = torch.arange(len(ids), device=rows.device)
        self.slot_of = {token: slot for slot, token in enumerate(ids.tolist())}
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)  # of each token its row, or -1


class TokenRows(Attached):
    """base(ids), but for some tokens rows that are trained; a tied head has them too."""

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.adapters[name].rows}

    def compute(self, part: RowsPart, ids: Tensor) -> Tensor:
        y, slots = self.base(ids), part.slots[ids]
        padding = part.slot_of.get(_padding(self.base))
        rows = _look_up(self.base, part.rows, slots.clamp(min=0), padding).to(y.dtype)
        return torch.where((slots >= 0)[..., None], rows, y)

    @property
    def weight(self) -> Tensor:
        """[V, H] with the trained rows, made each time, as that of a `LoraEmbedding`."""
        (part,) = self.using
        own = _dense(self.current())
        return own if part is None else own.index_copy(0, part.ids, part.rows.to(own.dtype))

    def original_rows(self, ids: Tensor) -> Tensor:
        """fp32 [n, H]"""
        if isinstance(self.base, nn.Embedding):
            return self.base.weight.detach()[ids].float()
        return self.base(ids).float()

    def update(self) -> LoraWeights | None:
        """As a tied head sees it: B one-hot, A the difference of the rows."""
        (part,) = self.using
        return None if part is None else self.of_head(part, HeadOfEmbedding(self.base))

    def of_head(self, part: RowsPart, base) -> LoraWeights:
        one_hot = (
            part.slots[:, None] == torch.arange(len(part.ids), device=part.ids.device)
        ).float()
        return LoraWeights(base, part.rows - self.original_rows(part.ids), one_hot, 1.0)

    @torch.no_grad()
    def joined(self, weight: Tensor | None) -> nn.Module:
        part, own = self.adapters[self.selected], _dense(self.base)
        own = own if weight is None else weight.to(own.dtype)
        found = own.index_copy(0, part.ids, part.rows.to(own.dtype))
        if isinstance(self.base, nn.Embedding):
            return with_weight(self.base, found)
        return nn.Embedding.from_pretrained(found)


class TiedHead(Attached):
    """A linear layer on the weight of an embedding that is adapted: it changes alike."""

    def __init__(self, base: nn.Linear, embedding: Attached):
        super().__init__(base)
        self.embedding = (embedding,)  # a tuple, lest its parameters have two names

    def in_use(self) -> bool:
        return self.embedding[0].in_use()

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {}

    def without(self, x: Tensor) -> Tensor:
        (embedding,) = self.embedding
        (part,) = embedding.using
        if self.rows is not None and self.enabled:
            raise LorakitError("adapter_rows: an adapted head that is tied has one adapter for all")
        if part is None:
            return self.current()(x)
        if isinstance(part, (LoraPart, RowsPart)):
            _frozen(self.base.weight)
            return lora_linear(x, embedding.of_head(part, DenseBase(self.base)))
        return F.linear(x, part.weight, self.base.bias)  # a copy that is trained whole

    def joined(self, weight: Tensor | None) -> nn.Module:
        (embedding,) = self.embedding
        other = with_weight(self.base, embedding.merged.weight)
        other.weight = embedding.merged.weight  # the same tensor
        return other
