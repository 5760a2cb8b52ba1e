"""A model run on rows without being in memory as a whole.

Each block is read when all rows have come to it, and forgotten when they have passed it. Memory
holds a block, the activations of the rows, and in the end the head. The weights are read once,
which pays for many rows at a time, and not for text that grows by a token.
"""

import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import IGNORE, Example
from lorakit.export.weights import DenseModel
from lorakit.models.decoder import Decoder


def run_blockwise(dense: DenseModel, texts: list[Example]) -> tuple[Decoder, Tensor, Tensor]:
    """Run a model on rows, reading each block when its turn comes.

    Args:
        dense: The model's weights, on disk or elsewhere.
        texts: The rows, as one batch.

    Returns:
        A model whose head alone is there; the hidden states fp32 [n, H] of the positions that have
        a label, row by row; and the labels int64 [n].
    """
    model = _empty(dense)
    layers = {f"model.layers.{i}": block for i, block in enumerate(model.model.layers)}
    parts = {
        "model.embed_tokens": model.model.embed_tokens,
        **layers,
        "model.norm": model.model.norm,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(partial(_read_part, name, dense))
        part.register_forward_hook(_forget)
    ids, labels = collate(texts)
    mask = real_tokens(texts) if dense.config.by_length else None
    hidden = model.hidden_states(ids, attention_mask=mask)[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORE
    head = "model.embed_tokens" if model.lm_head is None else "lm_head"
    _fill(model.get_submodule(head), f"{head}.", dense)
    return model, hidden[counted], targets[counted]


def whole_model(dense: DenseModel) -> Decoder:
    """Return the model with all its weights in memory, in fp32."""
    model = _empty(dense)
    _fill(model, "", dense)
    return model


def _empty(dense: DenseModel) -> Decoder:
    """Return the model on the meta device, where it takes no memory."""
    tied = "lm_head.weight" not in dense.tensors
    with torch.device("meta"):
        return Decoder(replace(dense.config, tie_word_embeddings=tied)).eval()


def _fill(part: nn.Module, prefix: str, dense: DenseModel) -> None:
    """Read the weights of a module in fp32; their names begin with `prefix`."""
    for name, _ in list(part.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(dense.tensors[prefix + name].read().cpu().float(), requires_grad=False)
        setattr(part.get_submodule(owner), leaf, value)


def _read_part(name: str, dense: DenseModel, part: nn.Module, _: Any) -> None:
    _fill(part, f"{name}.", dense)


def _forget(part: nn.Module, *_: Any) -> None:
    part.to_empty(device="meta")


def fp32_bytes(dense: DenseModel) -> int:
    """Return the memory that a model's weights take in fp32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in dense.tensors.values())


def free_bytes() -> int:
    """Return how much memory is free, as far as the system says it."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
