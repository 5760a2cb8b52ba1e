"""The text model inside the files of a multimodal model.

lorakit computes the text model alone. The files of a multimodal model (Gemma 3 or Mistral Small 3
with their vision towers) hold more, and may give the text model's tensors longer names, in one of
two layouts:

    own name            transformers 4.49 and since       transformers 4.52 in memory
    model.layers.0      language_model.model.layers.0     model.language_model.layers.0
    lm_head             language_model.lm_head            lm_head

Files of Qwen2-VL and Qwen2.5-VL use the own names, beside visual.blocks.0. Adapters that were
trained on a multimodal model use these names too. This is the one place that knows such names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorakit.config.errors import LorakitError
from lorakit.models.bitsandbytes import LazyWeight

# The beginning of a text model's own name -> the beginning of its name in the files.
LAYOUTS = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)
_OWN_NAMES = {"model.": "model.", "lm_head.": "lm_head."}
# The beginnings of the other towers' names in transformers 5, where "model." may precede them.
_TOWERS = (
    *("vision_tower.", "vision_model.", "visual.", "vision_embedder.", "embed_vision."),
    *("multi_modal_projector.", "connector.", "aligner.", "qformer."),
    *("audio_tower.", "audio_model.", "embed_audio."),
)
DRAFTS = "mtp."
"""The beginning of the names of layers that draft further tokens, which nothing here computes."""
# The way back from either layout. It also fits parts of names, such as an adapter's target_modules.
_OWN = {"model.language_model.": "model.", "language_model.": ""}


def text_name(name: str) -> str:
    """Return the text model's own name of a layer or tensor that a multimodal model calls `name`.

    Any other name is returned as it is.
    """
    own = _renamed(name, _OWN)
    return name if own is None else own


def layout_of(names: Iterable[str]) -> Mapping[str, str] | None:
    """Return the first of LAYOUTS that `names` of tensors show, or None if they show none."""
    known = list(names)
    for layout in LAYOUTS:
        if any(name.startswith(layout["model."]) for name in known):
            return layout
    return None


def name_in_layout(name: str, layout: Mapping[str, str]) -> str:
    """Return the name in a layout of what the text model calls `name`."""
    found = _renamed(name, layout)
    return name if found is None else found


def in_another_tower(name: str) -> bool:
    """Return whether a layer or tensor called `name` is no part of the text model."""
    return name.removeprefix("model.").startswith(_TOWERS)


def _renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Return `name` with another beginning, or None if it begins with none of `beginnings`."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


class Surroundings(NamedTuple):
    """What the files of a multimodal model hold around the text model."""

    config: dict[str, Any]
    """The whole config.json. Its text_config is that of the text model."""
    layout: Mapping[str, str]
    """The text model's own names -> the files' names, by their beginnings."""
    tensors: dict[str, LazyWeight]
    """The tensors of the other towers, by their names in the files."""

    def file_name(self, name: str) -> str:
        """Return the name in the files of the text model's tensor `name`."""
        return name_in_layout(name, self.layout)


def split_text_model(
    tensors: Mapping[str, LazyWeight], config: dict[str, Any], where: str
) -> tuple[dict[str, LazyWeight], Surroundings]:
    """Split the tensors of a multimodal model into its text model and the rest.

    Args:
        tensors: All tensors of the files, by their names there.
        config: The contents of config.json.
        where: The files' place, for messages.

    Returns:
        The tensors of the text model under its own names, and what lies around them.

    Raises:
        LorakitError: If the files hold no text model.
    """
    layout = layout_of(tensors)
    if layout is None:
        if not any(name.startswith("model.layers.") for name in tensors):
            raise LorakitError(f"{where}: the files hold no text model")
        layout = _OWN_NAMES
    own_beginnings = {beginning: own for own, beginning in layout.items()}
    text, rest = {}, {}
    for name, tensor in tensors.items():
        own_name = _renamed(name, own_beginnings)
        if own_name is None:
            rest[name] = tensor
        else:
            text[own_name] = tensor
    return text, Surroundings(config, layout, rest)
