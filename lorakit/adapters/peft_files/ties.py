"""Heads that are tied to an adapted embedding, in PEFT's files.

Such a head computes with the embedding's weight, so it follows the embedding's adapter. PEFT gives
it a layer of its own and looks for its tensors under its own name too: the file holds them twice.
"""

from torch import nn

from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.manage import attached
from lorakit.models.classifier import is_tied
from lorakit.models.decoder import Decoder

# ending of a tied head's tensor -> that of the embedding's, and whether it lies transposed
TWINS = {
    "lora_A.weight": ("lora_embedding_B", True),
    "lora_B.weight": ("lora_embedding_A", True),
    "weight": ("weight", False),
}


def adapted_heads(model: nn.Module) -> dict[str, str]:
    """Return each head that is tied to an adapted embedding, and the embedding, by their names."""
    heads = {"lm_head", *(n for n, each in attached(model).items() if isinstance(each, TiedHead))}
    found = {head: adapted_embedding_of(model, head) for head in sorted(heads)}
    return {head: place for head, place in found.items() if place is not None}


def adapted_embedding_of(model: nn.Module, head: str) -> str | None:
    """Return the name of the adapted embedding whose weight `head` has too, if there is one."""
    wrappers = attached(model)
    if isinstance(model, Decoder) and is_tied(model) and head == "lm_head":
        return "model.embed_tokens" if "model.embed_tokens" in wrappers else None
    wrapper = wrappers.get(head)
    if isinstance(wrapper, TiedHead):
        return next(place for place, each in wrappers.items() if each is wrapper.embedding)
    return None
