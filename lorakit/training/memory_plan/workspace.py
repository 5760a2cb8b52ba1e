"""Memory that operations of torch take for themselves on a GPU, which no tensor shows.

It is torch's arithmetic, told again: sizes follow from shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.kernels import dispatch, pretend

FP32 = 4  # bytes


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Sequence[int]:
    """Return what FlashAttention 2 takes in backward, for q [B, H, T, D]; mha_bwd in flash_api.cpp.

    These are the sums of dy y; dq in fp32, once per split of the keys, since lorakit asks for the
    same bits every time; and dk and dv of every query head.
    """
    if pretend.kind_of(q.device) != "cuda":
        return ()
    (B, H, T, D), (Hk, S) = q.shape, k.shape[1:3]
    rows = -(-T // 128) * 128
    width = -(-D // 32) * 32 if D <= 192 else 256
    splits = -(-dispatch.multiprocessors(q.device) // (B * H))
    sizes = [B * H * rows * FP32, splits * B * rows * H * width * FP32]
    of_heads = B * S * H * D * q.itemsize
    return [*sizes, of_heads, of_heads] if Hk != H else sizes


def cublas(capability: tuple[int, int]) -> int:
    """Return the bytes that cuBLAS gets from torch for each thread that multiplies.

    They are torch's default (ATen/cuda/CublasHandlePool.cpp): 32 MiB on sm_90 and sm_100, and else
    two pieces of 4 MiB and eight of 16 KiB.
    """
    return 32 << 20 if capability in ((9, 0), (10, 0)) else (2 * 4096 + 8 * 16) << 10


WORKSPACES: dict[Any, Callable[..., Sequence[int]]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
}
