"""The rotation against products with complex numbers in fp64."""

import torch

from lorakit import kernels


def test_rope_turns_each_pair_by_its_angle():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    angles = torch.randn(2, 5, 4)
    for x, out in zip((q, k), kernels.rope(q, k, angles.cos(), angles.sin()), strict=True):
        # a rotation in the plane of (x_j, x_{j+D/2}) is a product with e^{i angle}
        pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]
        truth = torch.cat([turned.real, turned.imag], -1)
        assert (out - truth).abs().max() < 1e-6  # a few roundings of values near 1


def test_rope_keeps_scores_relative():
    """The score of q at s and k at t depends on s - t only."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    freqs = torch.rand(8).double()

    def score(s, t):
        tables = lambda p: ((p * freqs).cos()[None, None], (p * freqs).sin()[None, None])  # noqa: E731
        a, _ = kernels.rope(q, k, *tables(s))
        _, b = kernels.rope(q, k, *tables(t))
        return (a * b).sum()

    assert abs(score(9, 4) - score(25, 20)) < 1e-5  # rotated in fp32
