"""How much each column of a weight matters: llama.cpp's importance matrix.

A quantization makes errors in W, and what they do to W x depends on x: an error in column c counts
with x_c squared. So the mean of x_c^2 over some tokens, for each column of each linear layer, tells
the search for scales where to be exact. The rows that a model is trained on are the natural text
for it. Of an expert the tokens count that were routed to it.

    sums     sum of x_c^2 over the tokens, fp32 [E or 1, in], by the weight's name in GGUF files
    counts   the tokens, fp32 [E or 1]

Files are llama-imatrix's: both tensors under the weight's name, with .in_sum2 and .counts.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.config.errors import LorakitError, check
from lorakit.data.examples import Examples, encode_rows
from lorakit.data.rows import RowSource
from lorakit.export.weights import modules_with_adapters
from lorakit.files.gguf import NewTensor, data_length, fp32_reader, read_header, write_gguf
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.gguf_names import dialect_of, stored_name
from lorakit.models.packed_layers import PackedLinear
from lorakit.models.tokenizer import Tokenizer

_CHUNK = 512  # tokens of a row, as llama-imatrix has it
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """How much each column of each weight matters."""

    sums: dict[str, Tensor]
    """The sums of x_c^2 by the weights' names in GGUF files, fp32 [E or 1, in]."""
    counts: dict[str, Tensor]
    """The tokens that they are over, fp32 [E or 1]."""

    def columns(self, name: str, shape: tuple[int, ...], experts: int) -> Tensor | None:
        """Return how much each column of a weight matters.

        Args:
            name: The weight's name in GGUF files.
            shape: Its shape, [out, in]; of experts, that of one of them.
            experts: The number of experts, or 1.

        Returns:
            The mean squares, fp32 [experts, in]; ones for an expert that no token was routed to.
            None if nothing is known of the weight.

        Raises:
            LorakitError: They are of another model: the number of columns or of experts differs.
        """
        if name not in self.sums:
            return None
        sums, counts = self.sums[name], self.counts[name]
        if sums.shape != (experts, shape[-1]) or counts.shape != (experts,):
            raise LorakitError(
                f"imatrix: {name} is {tuple(sums.shape)}, the model's weight has {experts} times "
                f"{shape[-1]} columns: it is of another model"
            )
        return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), 1.0)

    def save(self, path: str | Path) -> None:
        """Write a file that llama.cpp's tools read too.

        Args:
            path: The file, such as imatrix.gguf. Its directory is made if it is missing.

        Raises:
            OSError: The disk is full.
        """
        path = as_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = []
        for name in self.sums:
            counts = self.counts[name][:, None]
            for end, values in ((_SUMS, self.sums[name]), (_COUNTS, counts)):
                data = partial(_bytes, values)
                tensors.append(NewTensor(name + end, tuple(values.shape), "F32", data))
        metadata = {
            "general.architecture": "imatrix",
            "general.type": "imatrix",
            "imatrix.chunk_size": _CHUNK,
        }
        write_gguf(path, metadata, tensors)


def _bytes(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return values.float().contiguous().view(torch.uint8).numpy()


def load_importance(path: str | Path) -> Importance:
    """Read how much each column of each weight matters.

    Args:
        path: A file of `Importance.save`, or of llama.cpp's llama-imatrix in GGUF.

    Returns:
        The importance.

    Raises:
        LorakitError: The file is missing, damaged, or no importance matrix.
    """
    path = as_path(path)
    if not path.is_file():
        raise LorakitError(f"{path} does not exist")
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise LorakitError(f"{path} is no importance matrix: its general.type is not 'imatrix'")
    sums, counts = {}, {}
    for key in header.tensors:
        name = key.removesuffix(_SUMS)
        if name == key:
            continue
        if name + _COUNTS not in header.tensors:
            raise LorakitError(f"{path}: tensor {name}{_COUNTS} is missing")
        values = []
        for end in (_SUMS, _COUNTS):
            info = header.tensors[name + end]
            values.append(fp32_reader(path, info, data_length(path, name + end, info))())
        counts[name] = values[1].flatten()
        sums[name] = values[0].reshape(len(counts[name]), -1)
        fits = sums[name].isfinite().all() and (sums[name] >= 0).all() and counts[name].min() >= 0
        check(bool(fits), f"{path}: tensor {name}{_SUMS} holds NaN, infinite or negative values")
    check(bool(sums), f"{path}: the file holds no importance")
    return Importance(sums, counts)


# ---- measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def importance(
    model: Decoder, tok: Tokenizer, rows: RowSource, *, tokens: int = 65536
) -> Importance:
    """Measure how much each column of each weight matters, on rows of text.

    The rows are joined into pieces of 512 tokens, as llama-imatrix does with a text.

    Args:
        model: The model, with or without an adapter. It computes in its own dtype.
        tok: Its tokenizer.
        rows: A file of rows or an iterable of them, as `read_rows` takes it. The rows of a training
            are the natural choice; {"text": ...} is a row too.
        tokens: The most tokens to read.

    Returns:
        The importance, for `export_gguf`.

    Raises:
        LorakitError: The rows cannot be read or encoded, hold no token, or `tokens` is below 1.
    """
    check(isinstance(tokens, int) and tokens > 0, "importance: tokens must be at least 1")
    longest = model.config.context_length
    examples = encode_rows(rows, tok, max_seq_length=longest, train_on="all", skip_empty=True)
    check(len(examples) > 0, "importance: the rows hold no token")
    tok.check_fits([examples.largest_id], model.config.vocab_size)
    pieces = list(_pieces(examples, min(_CHUNK, longest), tokens))
    watch = _Watch(model)
    was_training = model.training
    model.eval()
    try:
        for piece in tqdm(pieces, "importance", unit="piece", disable=None, leave=False):
            model.hidden_states(torch.tensor([piece], device=model.device))
    finally:
        model.train(was_training)
        watch.remove()
    return watch.importance()


def _pieces(examples: Examples, length: int, tokens: int) -> Iterator[list[int]]:
    """Yield the first `tokens` token ids of all examples, `length` at a time."""
    piece: list[int] = []
    for example in examples:
        ids = example.answers[0].input_ids[:tokens]
        tokens -= len(ids)
        piece += ids
        while len(piece) >= length:
            yield piece[:length]
            piece = piece[length:]
        if tokens == 0:
            break
    if piece:
        yield piece


class _Watch:
    """Add up the squares of what the linear layers of a model's blocks read."""

    def __init__(self, model: Decoder):
        _, dialect = dialect_of(model.config)
        self.sums: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.counts: dict[str, dict[int, int]] = defaultdict(dict)
        self.hooks = []
        for name, module in modules_with_adapters(model):
            kinds = (nn.Linear, PackedLinear, AttachedLinear)
            if isinstance(module, kinds) and name.startswith("model.layers."):
                stored, expert = stored_name(f"{name}.weight", dialect)
                place = stored, expert or 0
                self.sums[stored][place[1]] = torch.zeros(module.in_features, dtype=torch.float64)
                self.counts[stored][place[1]] = 0
                self.hooks.append(module.register_forward_pre_hook(partial(self._take, place)))

    def _take(self, place: tuple[str, int], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stored, expert = place
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        self.sums[stored][expert] += x.square().sum(0).double().cpu()
        self.counts[stored][expert] += len(x)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def importance(self) -> Importance:
        """Return what was added up."""
        sums = {
            name: torch.stack([of[e] for e in sorted(of)]).float() for name, of in self.sums.items()
        }
        counts = {
            name: torch.tensor([of[e] for e in sorted(of)]).float()
            for name, of in self.counts.items()
        }
        return Importance(sums, counts)
