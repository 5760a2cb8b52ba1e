"""AdamW on a GPU: all tensors in one launch.

A LoRA adapter is hundreds of tensors of some ten thousand values; a launch for each would take
longer than the arithmetic. The kernel gets a table of addresses, and a list that says which tensor
and which piece of it each program updates. 16 bytes are read and 12 written per value, once each.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8


@triton.jit
def _update(
    TENSORS, PIECES, decay, beta1, rest1, beta2, rest2, rate, correction, eps, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    entry = TENSORS + 5 * tensor
    kind = tl.pointer_type(tl.float32)
    P = tl.multiple_of(tl.load(entry).to(kind), 16)
    G = tl.multiple_of(tl.load(entry + 1).to(kind), 16)
    M = tl.multiple_of(tl.load(entry + 2).to(kind), 16)
    V = tl.multiple_of(tl.load(entry + 3).to(kind), 16)
    n = tl.load(entry + 4)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    if piece * BLOCK + BLOCK <= n:
        p, m, v = _adam(
            tl.load(P + at), tl.load(G + at), tl.load(M + at), tl.load(V + at),
            decay, beta1, rest1, beta2, rest2, rate, correction, eps,
        )  # fmt: skip
        tl.store(P + at, p)
        tl.store(M + at, m)
        tl.store(V + at, v)
    else:
        inside = at < n
        p, m, v = _adam(
            tl.load(P + at, mask=inside), tl.load(G + at, mask=inside),
            tl.load(M + at, mask=inside), tl.load(V + at, mask=inside),
            decay, beta1, rest1, beta2, rest2, rate, correction, eps,
        )  # fmt: skip
        tl.store(P + at, p, mask=inside)
        tl.store(M + at, m, mask=inside)
        tl.store(V + at, v, mask=inside)


@triton.jit
def _adam(p, g, m, v, decay, beta1, rest1, beta2, rest2, rate, correction, eps):
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - rate * m / (tl.sqrt(v) * correction + eps)
    return p, m, v


def fits(*lists: list[Tensor]) -> bool:
    """Whether the kernel can take these tensors: fp32, dense, on 16 bytes, of one device."""
    device = lists[0][0].device
    dense = all(
        t.dtype == torch.float32
        and t.is_contiguous()
        and t.data_ptr() % 16 == 0
        and t.device == device
        for tensors in lists
        for t in tensors
    )
    return dense and all(len({t.shape for t in group}) == 1 for group in zip(*lists, strict=True))


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """As reference.adamw_step, for tensors that `fits` accepts."""
    groups = zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    table = [[*(t.data_ptr() for t in tensors), tensors[0].numel()] for tensors in groups]
    table = torch.tensor(table, dtype=torch.int64, device="cpu")
    counts = (table[:, 4] + BLOCK - 1) // BLOCK
    tensor = torch.arange(len(table), device="cpu").repeat_interleave(counts)
    piece = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    pieces = torch.stack([tensor, piece], dim=1)
    device, (beta1, beta2) = params[0].device, betas
    if len(pieces):
        _update[(len(pieces),)](
            table.to(device), pieces.to(device), 1 - lr * weight_decay, beta1, 1 - beta1, beta2,
            1 - beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    for tensors in (params, exp_avgs, exp_avg_sqs):
        torch.autograd.graph.increment_version(tensors)  # as an operation of torch's would
