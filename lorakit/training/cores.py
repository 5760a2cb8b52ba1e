"""Threads of the kernels' own for the training of a model on a CPU (kernels/threads.py).

They are for a model by whose weights torch, which has one thread meanwhile, need not multiply: they
are packed in NF4 or carry LoRA, in bf16, on a processor whose products of bf16 are the kernels'.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.kernels import threads
from lorakit.kernels.ops import products
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedLinear


@contextmanager
def own_threads(model: Decoder) -> Iterator[None]:
    """Give the kernels threads of their own for steps of `model`, if they do all that is large.

    Loops then wait for no thread that has not got a processor yet, so that a step on processors
    which others use too takes as long as its share of them says. `train` does it by itself. Other
    models, and GPUs, notice nothing. torch has one thread in the block.

    Args:
        model: The model, with its adapter.

    Yields:
        Nothing; steps inside the block have the threads.
    """
    if all_by_kernels(model):
        with threads.own_threads():
            yield
    else:
        yield


def all_by_kernels(model: Decoder) -> bool:
    """Return whether the kernels multiply by every weight of the model, in both directions."""
    sample, head = torch.empty(0, dtype=model.dtype, device=model.device), model.lm_head
    if not products.available(sample):
        return False
    parts = list(model.children())
    if type(head) is nn.Linear:  # the loss takes it as it is
        if not products.takes(head.weight):
            return False
        parts.remove(head)
    return all(map(_by_kernels, parts))


def _by_kernels(module: nn.Module) -> bool:
    """Return whether the kernels multiply by every weight in `module`."""
    if isinstance(module, PackedLinear):
        return products.takes(module.quantized)
    if isinstance(module, AttachedLinear):
        update = module.fusible_update()
        return (
            update is not None and update.magnitude is None and products.takes(update.base.stored)
        )
    if isinstance(module, nn.Linear):
        return False
    return all(map(_by_kernels, module.children()))
