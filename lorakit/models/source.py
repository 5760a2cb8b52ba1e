"""The files that a model was loaded from, which it keeps in `Decoder.source`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lorakit.models.bitsandbytes import LazyWeight
from lorakit.models.multimodal import Surroundings

log = logging.getLogger("lorakit")


class Source(NamedTuple):
    """The files that a model was loaded from.

    Saving takes the tokenizer and the other towers of a multimodal model from there; merging and
    LoftQ take the dense weights that a quantized model was made from.
    """

    path: Path
    """A directory or a .gguf file."""
    surroundings: Surroundings | None
    """What the files of a multimodal model hold around the text model."""
    drafts: dict[str, LazyWeight]
    """The tensors of layers that draft further tokens (mtp), which a text model has beside it."""
    quantized: Mapping[str, int]
    """How many weights another tool quantized, by their kind; they are read as dense ones."""

    def log_quantized(self) -> None:
        """Say in the log what was quantized; called where weights are read, not where opened."""
        for kind, count in self.quantized.items():
            log.warning("lorakit: %s: read %s: %d tensors", self.path, kind, count)
