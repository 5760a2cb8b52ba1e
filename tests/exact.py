"""What ops compute, spelled out for fp64."""

import torch


def exact_norm(x, w, offset):
    return (offset + w) * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def exact_turn(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.double()[:, :, None], sin.double()[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
