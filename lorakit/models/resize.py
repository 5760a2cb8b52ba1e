"""A larger vocabulary: more rows for a decoder's embedding, and for its head.

    embedding [V, H] -> [V', H]        head [V, H] -> [V', H], or the embedding again if it is tied

A new row starts as the mean of the old ones. transformers draws new rows from a normal distribution
around that mean (PreTrainedModel.resize_token_embeddings with mean_resizing, after
nlp.stanford.edu/~johnhew/vocab-expansion.html). The distribution is narrow, so that the two hardly
differ; the mean needs no random numbers. The logit of a new token is then the mean of all logits,
and the probabilities of the others hardly change.

A packed matrix becomes a dense one. Its old rows keep the very values that the codes stand for;
packing them again could change these.
"""

import dataclasses
import logging

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedEmbedding, PackedLinear, PackedWeight
from lorakit.models.per_layer import host_tables

log = logging.getLogger("lorakit")


def resize_embeddings(model: Decoder, vocab_size: int) -> Decoder:
    """Give a model rows for more tokens, in place.

    The new rows are the mean of the old ones. A tied head stays tied. `save_model` writes the model
    with its new size.

    Args:
        model: A lorakit decoder without adapters.
        vocab_size: The number of tokens from now on, such as `len(tok)`; at least as many as there
            are.

    Returns:
        `model`.

    Raises:
        LorakitError: `model` is no lorakit decoder, carries an adapter or has a second embedding,
            or `vocab_size` is smaller than before.
    """
    if not isinstance(model, Decoder):
        raise LorakitError("resize_embeddings: a lorakit decoder is wanted, as load_model returns")
    size = model.config.vocab_size
    if type(vocab_size) is not int or vocab_size < size:
        raise LorakitError(
            f"resize_embeddings: vocab_size must be a whole number from {size} on, the size that "
            f"the model has, not {vocab_size!r}"
        )
    if any(isinstance(each, AdaptedLayer) for each in model.modules()):
        raise LorakitError(
            "resize_embeddings: an adapter is attached; resize the model before, or detach it"
        )
    if vocab_size > size:
        add_rows(model, vocab_size - size)
    return model


@torch.no_grad()
def add_rows(
    model: Decoder, count: int, embedding: Tensor | None = None, head: Tensor | None = None
) -> None:
    """Append rows to the embedding of a decoder without adapters, and to its head.

    Args:
        model: The decoder.
        count: Number n of rows.
        embedding: The rows [n, H] of the embedding; None takes the mean of the old ones.
        head: The rows [n, H] of the head, if it has its own; None takes the mean of the old ones.

    Raises:
        LorakitError: The model has a second embedding, whose rows are in its file.
    """
    if model.mesh is not None:
        raise LorakitError("the model is sharded: give it new tokens, save it, and load it sharded")
    if host_tables(model):
        raise LorakitError(
            "the model has a second embedding (embed_tokens_per_layer), which stays in its file "
            "and gets no new rows: use tokens that it has, such as the unused ones"
        )
    model.model.embed_tokens = _longer(model.model.embed_tokens, count, embedding)
    if model.lm_head is not None:
        model.lm_head = _longer(model.lm_head, count, head)
    size = model.config.vocab_size + count
    model.config = dataclasses.replace(model.config, vocab_size=size)


def _longer(layer: nn.Module, count: int, rows: Tensor | None) -> nn.Module:
    """Return a dense layer like this embedding or head, with `count` rows more."""
    if isinstance(layer, PackedWeight):
        if not layer.weight.is_meta:  # else it is a forecast
            name = type(layer).__name__
            log.warning("lorakit: a packed %s becomes dense, for its new rows", name)
        weight, trains = layer.dequantize(), False
    else:
        assert isinstance(layer.weight, nn.Parameter)
        weight, trains = layer.weight.detach(), layer.weight.requires_grad
    if rows is None:
        rows = weight.float().mean(0, keepdim=True).expand(count, -1)
    weight = torch.cat([weight, rows.to(weight)])
    longer: nn.Module
    if isinstance(layer, (nn.Embedding, PackedEmbedding)):
        longer = nn.Embedding.from_pretrained(weight, freeze=not trains)
    else:
        assert isinstance(layer, (nn.Linear, PackedLinear))
        longer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        longer.weight = nn.Parameter(weight, requires_grad=trains)
    return longer.train(layer.training)
