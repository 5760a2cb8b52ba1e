"""Encoders for BERTScore, such as RoBERTa: transformers computes them (extra `eval`).

Texts become tokens as in the package bert-score, so that the numbers are the same: blanks at both
ends go, the models that tell a word by the space before it get one before the first, and what a
model cannot read is cut off. The special tokens at both ends may be matched, but weigh nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.hub import resolve
from lorakit.files.local import read_json
from lorakit.models.families import FAMILIES, WRAPPERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_UNBOUNDED = 10**6  # transformers has 10^30 where a tokenizer does not say what its model reads
_BEFORE_WORDS = 2  # RoBERTa leaves its first positions empty


class TextEncoder:
    """An encoder of texts and its tokenizer, as `bert_score` takes them.

    Args:
        model: The model of transformers, in evaluation mode.
        tok: Its tokenizer.
    """

    def __init__(self, model: "PreTrainedModel", tok: "PreTrainedTokenizerBase"):
        self.model, self.tok = model, tok
        says: dict[str, Any] = model.config.to_dict()
        self.layers = int(says.get("num_hidden_layers") or says.get("num_layers") or 0)
        self.width = int(model.config.hidden_size)
        longest = tok.model_max_length
        if longest > _UNBOUNDED:
            longest = says.get("max_position_embeddings", _UNBOUNDED) - _BEFORE_WORDS
        self.longest = int(longest)
        self.unmatched, self.silent = set[int](), {tok.cls_token_id, tok.sep_token_id}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, the special ones included."""
        return list(self.tok(text.strip(), truncation=True, max_length=self.longest)["input_ids"])

    @torch.no_grad()
    def states(self, rows: Sequence[list[int]], layer: int | None) -> Tensor:
        """Return the hidden states of rows of tokens, fp32 [B, T, H], padded on the right.

        Args:
            rows: The tokens of each text.
            layer: The layer after which they are taken, from 1 on; None takes the last.
        """
        width, device = max(map(len, rows)), self.model.device
        ids = torch.full((len(rows), width), self.tok.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        options = {"attention_mask": mask.to(device), "output_hidden_states": True}
        found = self.model(ids.to(device), **options)
        states: Tensor = found.hidden_states[-1 if layer is None else layer]
        return states.float()


def load_encoder(
    path_or_hub_id: str | Path, *, device: str | torch.device | None = None
) -> TextEncoder:
    """Load an encoder for `bert_score`, in fp32.

    Args:
        path_or_hub_id: A Hugging Face directory or a Hub id. Of a model with an encoder and a
            decoder, such as T5, the encoder is taken.
        device: The device to put the model on. None takes the GPU if torch has one, else the CPU.

    Returns:
        The encoder with its tokenizer.

    Raises:
        LorakitError: transformers is not installed, or cannot read the files.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise LorakitError(
            "an encoder needs the package transformers: pip install 'lorakit[eval]'"
        ) from None
    path = resolve(path_or_hub_id, _FILES)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tok = AutoTokenizer.from_pretrained(path, local_files_only=True, add_prefix_space=True)
        model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise LorakitError(f"{path}: transformers cannot read this encoder: {reason}") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return TextEncoder(model.eval().to(device), tok)


def is_encoder(path_or_hub_id: str | Path) -> bool:
    """Return whether a model is none that lorakit computes itself, by its config.json."""
    path = resolve(path_or_hub_id, _FILES)
    if path.is_file() or not (path / "config.json").exists():
        return False
    return read_json(path / "config.json").get("model_type") not in [*FAMILIES, *WRAPPERS]
