"""Carried out of lorakit/adapter.py."""

from torch import Tensor, nn

from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import attached
from lorakit.adapters.methods.adalora import AdaLoraConfig
from lorakit.adapters.methods.ia3 import IA3Config
from lorakit.adapters.methods.prompts import (
    PrefixTuningConfig,
    Prompt,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from lorakit.adapters.methods.vera import VeraConfig, projection
from lorakit.adapters.peft_files.layout import PREFIX
from lorakit.config.adapters import LoraConfig
from lorakit.models.decoder import Decoder

PEFT_TYPES = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "VERA": VeraConfig,
    "ADALORA": AdaLoraConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
}
# of a tied head by its ending: that of the embedding, and whether it lies transposed
TWINS = {
    "lora_A.weight": ("lora_embedding_B", True),
    "lora_B.weight": ("lora_embedding_A", True),
    "weight": ("weight", False),
}


def key_of(place: str, each: Attached, ending: str) -> str:
    """In the file, of a tensor of the module at `place`."""
    return ending if isinstance(each, Prompt) else f"{PREFIX}{place}.{ending}"


def projection_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The matrices that all layers of a VeRA adapter share, by their key in the file."""
    shared = projection(module, name)
    return {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}


def tied_heads(module: nn.Module) -> dict[str, str]:
    """The adapted embedding of each head that is tied to one, by name."""
    heads = {"lm_head", *(n for n, each in attached(module).items() if isinstance(each, TiedHead))}
    found = {head: embedding_of(module, head) for head in sorted(heads)}
    return {head: place for head, place in found.items() if place is not None}


def embedding_of(module: nn.Module, head: str) -> str | None:
    """The name of the adapted embedding whose weight `head` has too."""
    found = attached(module)
    if isinstance(module, Decoder) and module.lm_head is None and head == "lm_head":
        return "model.embed_tokens" if "model.embed_tokens" in found else None
    if isinstance(found.get(head), TiedHead):
        embedding = found[head].embedding
        return next(place for place, each in found.items() if each is embedding)
    return None
