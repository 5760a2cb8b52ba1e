"""Philox4x32-10 and its dropout in plain torch: words of 32 bits lie in int64."""

import torch
from torch import Tensor

LANES = 1024
WORD = 0xFFFFFFFF
# of the paper's sections 3.3 and 3.4; the second pair are the golden ratio and sqrt(3) - 1
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counters: tuple[Tensor, ...], key: int) -> tuple[Tensor, ...]:
    """Return the four words that Philox makes of four, all int64 of one shape, under a key."""
    c0, c1, c2, c3 = counters
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # all 64 bits; the sign is one
        c0, c1, c2, c3 = (
            ((second >> 32) & WORD) ^ c1 ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def dropout(x: Tensor, threshold: int, scale: float, seed: int, counter: Tensor) -> Tensor:
    """Return x, contiguous, times `scale` where its word is below the threshold, else 0."""
    blocks = -(-x.numel() // (4 * LANES))
    calls = torch.arange(blocks * LANES, device=x.device)
    low, high = (counter & WORD).expand_as(calls), ((counter >> 32) & WORD).expand_as(calls)
    words = torch.stack(philox((calls, torch.zeros_like(calls), low, high), seed))
    words = words.view(4, blocks, LANES).transpose(0, 1).reshape(-1)[: x.numel()].view(x.shape)
    return (x * scale).masked_fill_(words >= threshold, 0)
