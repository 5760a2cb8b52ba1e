"""What follows from where rows begin and end: next tokens, padding, the noise of NEFTune."""

import torch
from torch import Tensor


def neftune_noise(x: Tensor, alpha: float, cu_seqlens: Tensor | None) -> Tensor:
    """Return uniform noise for embeddings x [B, T, H], up to alpha / sqrt(T H).

    T is the length of the row, or of each packed document.
    """
    noise = torch.empty_like(x).uniform_(-alpha, alpha)
    length = x.new_tensor(x.shape[1])
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().to(x.device)
        length = lengths.repeat_interleave(lengths)[:, None].to(x.dtype)
    return noise / (length * x.shape[2]).sqrt()


def before_padding(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return which positions lie before a last run of tokens 0 without labels: bool [B, T]."""
    kept = (input_ids != 0) | (labels != -100)
    return kept.flip(-1).cummax(-1).values.flip(-1)


def next_tokens(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the label that each position predicts, int64 [B, T].

    The last position of a row, and of a packed document, predicts nothing, which is -100.
    """
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = -100
    if cu_seqlens is not None:
        targets[:, cu_seqlens[1:].long() - 1] = -100
    return targets
