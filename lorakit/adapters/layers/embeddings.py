"""Adapters on embeddings, and on the heads that share their weight.

    LoraEmbedding   an embedding, W [V, H] by rows        y = W[id] + s B A[:, id]
    TokenRows       some rows of an embedding, trained    y = rows[id] instead of W[id]
    HeadRows        some rows of a head of its own, trained
    TiedHead        a head on the weight of an adapted embedding

A tied head computes with the embedding's weight, so it changes as the embedding does. The part of
the embedding is a low-rank update to the head too: LoRA's A and B change places, and trained rows
become an update with a one-hot B. An embedding that is trained whole gives the head its copy.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.base import DenseBase, with_weight
from lorakit.adapters.layers.lora import LoraLayer, LoraPart, LowRankLinear, LowRankPart
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.layers.wrapper import Attached, Part, PartT
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.kernels import LoraWeights, Packed, lora_linear
from lorakit.models.packed_layers import PackedEmbedding

Embedding = nn.Embedding | PackedEmbedding


class HeadOfEmbedding:
    """The weight [V, H] of an embedding as a linear layer, which is the base of a tied head."""

    bias = None

    def __init__(self, embedding: Embedding):
        self.stored: Tensor | Packed
        if isinstance(embedding, nn.Embedding):
            self.stored = _frozen(embedding.weight)
        else:
            self.stored = embedding.quantized

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.stored, Tensor):
            return F.linear(x, self.stored)
        return kernels.frozen_linear(x, self.stored)


def _frozen(weight: Tensor) -> Tensor:
    """Return `weight`; raise LorakitError if it trains."""
    if weight.requires_grad:
        raise LorakitError(
            "the weight of an adapted embedding is to train, and a head is tied to it: the head's "
            "gradient would be missing; freeze it, or save the embedding whole (modules_to_save)"
        )
    return weight


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _dense(embedding: nn.Module) -> Tensor:
    """Return the weight [V, H], dequantized where it is packed."""
    assert isinstance(embedding, Embedding)
    return embedding.weight if isinstance(embedding, nn.Embedding) else embedding.dequantize()


def _like(embedding: Embedding, weight: Tensor) -> nn.Embedding:
    """Return a dense, frozen embedding like the given one, with another weight [V, H]."""
    if isinstance(embedding, nn.Embedding):
        return with_weight(embedding, weight)
    return nn.Embedding.from_pretrained(weight)


def _look_up(embedding: nn.Module, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Return rows of `weight` [n, any], with whatever else `embedding` does to its own rows.

    The row of `padding_idx` gets no gradient.
    """
    if isinstance(embedding, nn.Embedding) and type(embedding) is not nn.Embedding:
        other = copy.copy(embedding)
        other._parameters = {}
        other.weight, other.padding_idx = weight, padding_idx
        return other(ids)
    return F.embedding(ids, weight, padding_idx)


def _padding(embedding: nn.Module) -> int | None:
    """Return the token whose row gets no gradient, if there is one."""
    return embedding.padding_idx if isinstance(embedding, nn.Embedding) else None


class AttachedEmbedding(Attached[PartT]):
    """The base class of wrappers of an embedding, except of one that is trained whole."""

    base: Embedding

    def low_rank_update(self) -> LoraWeights | None:
        """Return base and update as a tied head sees them."""
        part = self.active
        return None if part is None else self.update_of_head(part, HeadOfEmbedding(self.base))

    def update_of_head(self, part: PartT, base: HeadOfEmbedding | DenseBase) -> LoraWeights:
        """Return the update that `part` is to a head with the embedding's weight, over `base`."""
        raise NotImplementedError

    def changed(self, part: PartT, weight: Tensor) -> Tensor:
        """Return `weight` [V, H] with `part` in it. Gradients reach the part."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight [V, H] with the active part in it, for code that uses it as a head.

        It is computed each time. Gradients reach the part.
        """
        own = _dense(self.current_module())
        return own if self.active is None else self.changed(self.active, own)


class LoraEmbedding(AttachedEmbedding[LoraPart], LoraLayer):
    """An embedding with LoRA: base(ids) + scaling * A^T[ids] B^T, lora_A [r, V], lora_B [H, r]."""

    endings = ("lora_embedding_A", "lora_embedding_B")

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.part_of(name)
        found = {
            self.endings[0]: part.lora_A,
            self.endings[1]: part.lora_B,
            "lora_magnitude_vector": part.magnitude,
        }
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    def update_of_head(self, part: LoraPart, base: HeadOfEmbedding | DenseBase) -> LoraWeights:
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
        gain = (part.magnitude / self.column_norms(part)).to(y.dtype)
        return (y + part.scaling * F.linear(low, B.to(y.dtype))) * gain

    @torch.no_grad()
    def column_norms(self, part: LoraPart) -> Tensor:
        """Return the length of each column of W + s (B A)^T, [H], from products of rank r."""
        W = _dense(self.base)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, sB = part.lora_A.to(W.dtype), part.lora_B.to(W.dtype) * part.scaling
        square = torch.linalg.vector_norm(W, dim=0).square()
        square += 2 * (sB * (A @ W).t()).sum(1) + (sB * (sB @ (A @ A.t()))).sum(1)
        return square.clamp(min=0).sqrt()

    def changed(self, part: LoraPart, weight: Tensor) -> Tensor:
        A, B = part.pair()
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = torch.addmm(weight.to(wide), A.t().to(wide), B.t().to(wide), alpha=part.scaling)
        if part.magnitude is not None:  # the lengths count as constants, as in PEFT
            found = found * (part.magnitude / found.detach().norm(dim=0))
        return found.to(weight.dtype)

    @torch.no_grad()
    def make_merged(self, weight: Tensor | None) -> nn.Module:
        own = _dense(self.base)
        found = self.changed(self.part, own if weight is None else weight)
        return _like(self.base, found.to(own.dtype))


class RowsPart(Part):
    """Trained rows [n, H] of an embedding for the tokens `ids` [n], n of V.

    `slots` [V] holds the index of each token's row, or -1 for a token without one. `slot_of` holds
    the indices of the n tokens as a mapping, which costs no transfer from the device.
    """

    ids: Tensor
    slots: Tensor

    def __init__(self, config: LoraConfig, ids: Tensor, rows: Tensor, vocabulary: int):
        super().__init__(config)
        self.rows = nn.Parameter(rows)
        slots = torch.full((vocabulary,), -1, device=rows.device)
        slots[ids] = torch.arange(len(ids), device=rows.device)
        self.slot_of = {token: slot for slot, token in enumerate(ids.tolist())}
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)


class TokenRows(AttachedEmbedding[RowsPart]):
    """An embedding with trained rows for some tokens; a tied head has them too."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.part_of(name).rows}

    def compute(self, part: RowsPart, ids: Tensor) -> Tensor:
        y, slots = self.base(ids), part.slots[ids]
        padding_token = _padding(self.base)
        padding = None if padding_token is None else part.slot_of.get(padding_token)
        rows = _look_up(self.base, part.rows, slots.clamp(min=0), padding).to(y.dtype)
        return torch.where((slots >= 0)[..., None], rows, y)

    def original_rows(self, ids: Tensor) -> Tensor:
        """Return the rows of tokens `ids` as the base has them, fp32 [n, H]."""
        if isinstance(self.base, nn.Embedding):
            return self.base.weight.detach()[ids].float()
        return self.base(ids).float()

    def update_of_head(self, part: RowsPart, base: HeadOfEmbedding | DenseBase) -> LoraWeights:
        """Return an update with a one-hot B; A is how far the rows have moved."""
        one_hot = (
            part.slots[:, None] == torch.arange(len(part.ids), device=part.ids.device)
        ).float()
        return LoraWeights(base, part.rows - self.original_rows(part.ids), one_hot, 1.0)

    def changed(self, part: RowsPart, weight: Tensor) -> Tensor:
        return weight.index_copy(0, part.ids, part.rows.to(weight.dtype))

    @torch.no_grad()
    def make_merged(self, weight: Tensor | None) -> nn.Module:
        own = _dense(self.base)
        own = own if weight is None else weight.to(own.dtype)
        return _like(self.base, self.changed(self.part, own))


class HeadRowsPart(LowRankPart):
    """Trained rows [n, H] of a head's weight for the tokens `ids` [n], n of V.

    They are an update B A: A is how far the rows have moved from `start` [n, H], B is one-hot.
    """

    ids: Tensor
    start: Tensor
    one_hot: Tensor

    def __init__(self, config: LoraConfig, ids: Tensor, rows: Tensor, vocabulary: int):
        super().__init__(config, len(ids), 1.0, 0.0)
        self.rows = nn.Parameter(rows.clone())
        one_hot = torch.zeros(vocabulary, len(ids), device=rows.device)
        one_hot[ids, torch.arange(len(ids), device=rows.device)] = 1
        for name, tensor in {"ids": ids, "start": rows, "one_hot": one_hot}.items():
            self.register_buffer(name, tensor, persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.rows - self.start, self.one_hot


class HeadRows(LowRankLinear[HeadRowsPart]):
    """A head, not tied to an embedding, with trained rows for some tokens."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.part_of(name).rows}

    @torch.no_grad()
    def make_merged(self, weight: Tensor | None) -> nn.Module:
        own = self.base.dequantize() if weight is None else weight
        found = own.index_copy(0, self.part.ids, self.part.rows.to(own.dtype))
        return self.make_plain(found.to(self.base.dequantize().dtype), self.base.bias)


class TiedHead(Attached[nn.Module]):
    """A linear layer that shares the weight of an adapted embedding, and changes with it.

    It has no parts of its own. It computes with whichever part the embedding has active.
    """

    base: nn.Linear
    embedding: AttachedEmbedding[Any] | SavedModule

    def __init__(self, base: nn.Linear, embedding: Attached[Any]):
        super().__init__(base)
        # Not by setattr: torch would register it, and its parameters would have two names.
        self.__dict__["embedding"] = embedding

    def has_parts(self) -> bool:
        return self.embedding.has_parts()

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {}

    def compute_inactive(self, x: Tensor) -> Tensor:
        """Compute as a head always does: no part of its own is ever active."""
        if self.by_rows:
            raise LorakitError("adapter_rows: an adapted head that is tied has one adapter for all")
        embedding = self.embedding
        if embedding.active is None:
            return self.current_module()(x)
        if isinstance(embedding, SavedModule):
            return F.linear(x, _weight(embedding.active), self.base.bias)
        _frozen(self.base.weight)
        return lora_linear(x, embedding.update_of_head(embedding.active, DenseBase(self.base)))

    def make_merged(self, weight: Tensor | None) -> nn.Module:
        """Return a head with the very tensor that is the merged embedding's weight."""
        merged = self.embedding.merged
        assert merged is not None
        other = with_weight(self.base, _weight(merged))
        other.weight = _weight(merged)
        return other
