"""The maths of some ops in fp64, and the error budget of an op."""

import torch


def exact_norm(x, w, offset):
    return (offset + w) * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def exact_turn(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.double()[:, :, None], sin.double()[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def within_budget(ours, same_dtype, truth):
    """The error budget of an op that should be as good as torch in the same dtype."""
    eps = torch.finfo(ours.dtype).eps
    allowed = 2 * (same_dtype.double() - truth).abs().max() + eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= allowed


def value_and_grads(f, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
