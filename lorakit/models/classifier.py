"""A decoder with a head that tells a class, or a number, of a whole row.

    logits = score h[last]        score: [H -> C], h the final, normalized hidden states

`last` is the last token of a row or packed document that is not the padding token, as in
transformers' `ForSequenceClassification`. So a row that ends with an end token is read at the token
before it where the model pads with that token. A model without a padding token is read at the last
token.

The head is a module of its own, `score`, under its published name. It stays in fp32: it is small,
and steps of a learning rate of 1e-4 are lost in bfloat16. It is neither quantized nor adapted; an
adapter trains a copy of it whole (`modules_to_save`), as PEFT's SEQ_CLS does. There is no
`lm_head`, and the logits of the vocabulary are never computed.

Shapes: B rows, T positions, n rows or documents, C outputs, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.cache import Cache
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder

NO_TOKENS = "the model has a head for classes: it tells no next token, and so writes no text"


class Score(nn.Module):
    """A linear layer [C, H] in fp32, which `.to(dtype)` does not round."""

    def __init__(self, hidden_size: int, outputs: int, device: str | None = None):
        super().__init__()
        empty = torch.empty(outputs, hidden_size, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(empty)
        if not empty.is_meta:
            self.weight.data.copy_(self.drawn())

    def drawn(self) -> Tensor:
        """Draw a weight as transformers does: normal, with a standard deviation of 0.02."""
        empty = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu")
        return nn.init.normal_(empty, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the outputs, fp32 [..., C], of hidden states [..., H]."""
        return F.linear(hidden.float(), self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype.itemsize < before.dtype.itemsize:
            self.weight.data = before.to(self.weight.device)
        return self


class Classifier(Decoder):
    """A model that tells a class or a number; see the module and `Decoder`.

    Attributes:
        score: The head.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score: nn.Module = Score(config.hidden_size, len(self.classifier.labels))

    @property
    def classifier(self) -> ClassifierConfig:
        """What the outputs of the head are."""
        assert self.config.classifier is not None
        return self.config.classifier

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs of the head, fp32 [n, C], of rows or packed documents.

        Args:
            input_ids: int64 [B, T].
            attention_mask: See `Decoder`.
            cu_seqlens: See `Decoder`; n is the number of documents then, and else B.
            cache: See `Decoder`.
            last: The position of the last token of each, int64 [n], counted through all rows, as
                `last_tokens` finds it; None finds it on the device. Padding on the right then needs
                no attention_mask.

        Raises:
            LorakitError: As the class says.
        """
        hidden = self.hidden_states(
            input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens, cache=cache
        )
        if last is None:
            last = self._last(input_ids, attention_mask, cu_seqlens)
        outputs: Tensor = self.score(hidden.flatten(0, 1)[last])
        return outputs

    def _head_layer(self) -> nn.Module:
        raise LorakitError(NO_TOKENS)

    def frozen_head(self) -> None:
        """Return None: no frozen product ends in the head."""

    def _last(
        self, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Return the positions that are read, int64 [n], counted through all rows."""
        B, T = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:  # those of this call are the last ones
            real &= attention_mask[:, -T:].bool()
        if self.config.pad_token_id is not None:
            real &= input_ids != self.config.pad_token_id
        places = torch.arange(B * T, device=input_ids.device).view(B, T)
        if cu_seqlens is None:
            return torch.where(real, places, places[:, :1]).amax(-1)
        parts = pairwise(cu_seqlens.tolist())
        return torch.stack([torch.where(real[0, a:b], places[0, a:b], a).amax() for a, b in parts])


def with_head(
    config: ModelConfig, head: ClassifierConfig, where: str
) -> tuple[ModelConfig, LazyTensor]:
    """Return the config of a model with a new head, and the weight that the head starts with.

    Raises LorakitError if the model, whose files are `where`, has a head for classes already.
    """
    if config.classifier is not None:
        names = ", ".join(config.classifier.labels[:20])
        raise LorakitError(f"{where} has a head for classes, {names}: leave out classifier")
    score = Score(config.hidden_size, len(head.labels), "meta")
    drawn = LazyTensor(tuple(score.weight.shape), score.drawn)
    return replace(config, classifier=head), drawn


def decoder_of(config: ModelConfig) -> Decoder:
    """Return a model of this config, with the head that it says, and without values."""
    return Decoder(config) if config.classifier is None else Classifier(config)


def is_tied(model: Decoder) -> bool:
    """Return whether the embedding is the output head too."""
    return model.lm_head is None and model.config.classifier is None


def classifier_in(model: Decoder, what: str) -> Classifier:
    """Return the model, which has a head for classes. `what` names the caller.

    Raises LorakitError if it has none.
    """
    if not isinstance(model, Classifier):
        raise LorakitError(
            f"{what}: a head for classes is wanted, and the model has one for tokens: load it with "
            "load_model(..., classifier=...)"
        )
    return model


def last_tokens(rows: Sequence[Sequence[int]], padding: int | None, stride: int | None) -> Tensor:
    """Return where the head reads rows that become a batch, int64 [n].

    Args:
        rows: The tokens of each row.
        padding: The padding token of the model, at which nothing is read.
        stride: The length that all rows are padded to on the right; None packs them into one row.
    """
    found, start = [], 0
    for ids in rows:
        last = next((t for t in reversed(range(len(ids))) if ids[t] != padding), 0)
        found.append(start + last)
        start += len(ids) if stride is None else stride
    return torch.tensor(found)
