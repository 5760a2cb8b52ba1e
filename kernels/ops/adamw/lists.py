"""What a compiled step over lists of tensors is handed: addresses and numbers."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .state import BLOCK, Moment8bit


def fits(*lists: list[Tensor], alignment: int) -> bool:
    """Whether all are fp32, dense, on so many bytes and of one device, and those that go together
    of one shape.
    """
    device = lists[0][0].device
    dense = all(_dense(t, torch.float32, device, alignment) for tensors in lists for t in tensors)
    return dense and all(len({t.shape for t in group}) == 1 for group in zip(*lists, strict=True))


def fits_8bit(
    params: list[Tensor], grads: list[Tensor], *moments: list[Moment8bit], alignment: int
) -> bool:
    """`fits` of params and grads, and of 8-bit moments that are as long as they have to be."""
    return fits(params, grads, alignment=alignment) and all(
        moment.codes.numel() == p.numel()
        and moment.absmax.numel() == -(-p.numel() // BLOCK)
        and _dense(moment.codes, torch.uint8, p.device, alignment)
        and _dense(moment.absmax, torch.float32, p.device, alignment)
        for of_all in moments
        for p, moment in zip(params, of_all, strict=True)
    )


def _dense(t: Tensor, dtype: torch.dtype, device: torch.device, alignment: int) -> bool:
    aligned = t.is_contiguous() and t.data_ptr() % alignment == 0
    return aligned and t.dtype == dtype and t.device == device


def work(groups: list[tuple[Tensor, ...]], values: int) -> tuple[Tensor, Tensor]:
    """Two tables, int64, on the device of the tensors. A row of the first has the addresses of a
    group, a parameter before others, and the parameter's length; one of the second says a row of
    the first, and which piece of so many values.
    """
    device = groups[0][0].device
    rows = [[*(t.data_ptr() for t in group), group[0].numel()] for group in groups]
    # from pinned memory, or the host would wait for all that the device has to do before
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    lengths = tuple(row[-1] for row in rows)
    return table.to(device, non_blocking=True), _pieces(lengths, values, device)


@functools.lru_cache(maxsize=64)  # groups of parameters, or pages with a part of one
def _pieces(lengths: tuple[int, ...], values: int, device: torch.device) -> Tensor:
    counts = (torch.tensor(lengths, device="cpu") + values - 1) // values
    tensor = torch.arange(len(lengths), device="cpu").repeat_interleave(counts)
    piece = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    table = torch.stack([tensor, piece], dim=1)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


class Options(NamedTuple):
    """Of a step, which is counted from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def numbers(options: Options) -> tuple[float, ...]:
    """decay, beta1, rest1, beta2, rest2, rate, correction, eps"""
    step, lr, (beta1, beta2), eps, weight_decay = options
    correction = 1 / math.sqrt(1 - beta2**step)
    rate = lr / (1 - beta1**step)
    return 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, rate, correction, eps


def changed(params: list[Tensor], *states: list[Tensor] | list[Moment8bit]) -> None:
    """Tells autograd, as an operation of torch's would."""
    torch.autograd.graph.increment_version(params)
    for state in states:
        parts = [part for s in state for part in (s if isinstance(s, Moment8bit) else (s,))]
        torch.autograd.graph.increment_version(parts)
