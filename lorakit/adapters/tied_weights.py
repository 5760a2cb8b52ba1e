"""Find the layers that share one weight: an embedding and the output heads tied to it.

Two layers are tied if they hold the same tensor. A lorakit decoder may also have no head of its
own: then it multiplies with the embedding itself. An adapter that changes the embedding has to
change all of them, or they would no longer be one weight. An adapter of PEFT may also change the
head alone. The decoder then gets a head of its own, with the embedding's weight, while an adapter
is on it. If such an adapter is merged, the two are one weight no more.

The functions take the modules of a model by name, an adapted module as one (`Plan.layers`).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.embeddings import LoraEmbedding, TiedHead, TokenRows
from lorakit.adapters.layers.whole_modules import SavedModule, TrainedBias
from lorakit.adapters.layers.wrapper import Attached
from lorakit.config.errors import LorakitError
from lorakit.models.classifier import is_tied
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import (
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    packed_layer,
)

Layers = Mapping[str, nn.Module]


def original(module: nn.Module) -> nn.Module:
    """Return the module that a wrapper stands for; any other module itself."""
    return module.original if isinstance(module, Attached) else module


def is_embedding(module: nn.Module) -> bool:
    """Return whether `module` is an embedding, dense or packed, adapted or not."""
    if isinstance(module, (SavedModule, TrainedBias)):
        module = module.base
    if isinstance(module, Attached):
        return isinstance(module, (LoraEmbedding, TokenRows))
    return isinstance(module, (nn.Embedding, PackedEmbedding))


def heads_of_embedding(model: nn.Module, layers: Layers, embedding: nn.Module) -> list[str] | None:
    """Return the linear layers of `model` that share the weight of `embedding`.

    The list is empty where a decoder uses the embedding itself as its head. None means that nothing
    shares the weight, or that `embedding` is no embedding. Raises LorakitError for another
    embedding with the same weight: only one embedding and its heads are adapted together.
    """
    plain = original(embedding)
    if not isinstance(plain, (nn.Embedding, PackedWeight)):
        return None
    weight = _weight(plain)
    sharing: dict[str, nn.Module] = {}
    if weight is not None:  # a parametrized layer computes its weight, and shares none
        sharing = {name: other for name, other in layers.items() if _weight(other) is weight}
    for name, other in sharing.items():
        if is_embedding(other) and original(other) is not plain:
            raise LorakitError(
                f"attach: {name} is another embedding with the same weight, which would not be "
                "adapted; lorakit adapts an embedding together with its heads, not several "
                "embeddings"
            )
    apart = next((n for n, each in sharing.items() if isinstance(each, AttachedLinear)), None)
    if apart is not None:
        raise LorakitError(
            f"attach: {apart} shares the embedding's weight, and another adapter changes it by "
            "itself; detach that one first"
        )
    heads = [name for name, m in sharing.items() if isinstance(m, (nn.Linear, TiedHead))]
    for each in model.modules():
        if (
            isinstance(each, Decoder)
            and is_tied(each)
            and original(each.model.embed_tokens) is plain
        ):
            return heads
    return heads or None


def head_of_tied_decoder(model: nn.Module) -> nn.Linear | PackedLinear | None:
    """Return a head with the embedding's very weight, for a decoder that has none of its own.

    None means that `model` is no decoder, or has a head.
    """
    if not isinstance(model, Decoder) or not is_tied(model):
        return None
    embedding = original(model.model.embed_tokens)
    assert isinstance(embedding, (nn.Embedding, PackedEmbedding))
    rows, columns = embedding.num_embeddings, embedding.embedding_dim
    empty = nn.Linear(columns, rows, bias=False, device="meta", dtype=model.dtype)
    head: nn.Module = empty
    if isinstance(embedding, PackedEmbedding):
        head = packed_layer(empty, embedding.config)
    assert isinstance(head, (nn.Linear, PackedLinear))
    head._parameters.update(embedding._parameters)
    return head.train(model.training)


def embedding_of_head(layers: Layers, head: nn.Module) -> str | None:
    """Return the name of the embedding that shares the weight of the linear layer `head`."""
    weight = _weight(head)
    if weight is None or not isinstance(head, nn.Linear):
        return None
    found = (n for n, m in layers.items() if is_embedding(m) and _weight(m) is weight)
    return next(found, None)


def _weight(module: nn.Module) -> Tensor | None:
    return original(module)._parameters.get("weight")
