"""Muon against torch.optim.Muon, and its orthogonal matrices against the singular values."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels.ops.adamw.remainder import joined
from lorakit.kernels.ops.muon.reference import orthogonalized

SHAPES = [(16, 40), (40, 16), (8, 8), (1, 5)]
OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def start(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def gradients(steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def torchs(params, steps):
    """Yield the matrices after each step of torch's optimizer, scaled as AdamW's steps are."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.Muon(params, **OPTIONS, adjust_lr_fn="match_rms_adamw")
    for grads in gradients(steps):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        yield [p.detach() for p in params]


def test_equals_torch_step_by_step():
    """Torch computes the quintic in bfloat16; here it is let to do so in fp32, as lorakit does."""
    params, momenta = start(), [torch.zeros(shape) for shape in SHAPES]
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        for grads, theirs in zip(gradients(20), torchs(params, 20), strict=True):
            kernels.muon_step(params, grads, momenta, **OPTIONS)
            for ours, truth in zip(params, theirs, strict=True):
                assert (ours - truth).abs().max() <= 1e-6


def test_is_near_torch_in_bfloat16():
    """Five products of 8 bits change an entry of a step, some 0.02 * 0.2, by a few percent."""
    params, momenta = start(), [torch.zeros(shape) for shape in SHAPES]
    *_, theirs = torchs(params, 5)
    for grads in gradients(5):
        kernels.muon_step(params, grads, momenta, **OPTIONS)
    for ours, truth, before in zip(params, theirs, start(), strict=True):
        assert (ours - truth).norm() <= 0.03 * (truth - before).norm()


def test_a_bfloat16_matrix_takes_the_steps_of_fp32():
    """Matrix and remainder are the number of a run in fp32, to the bit."""
    halves = start(torch.bfloat16)
    wide, few = [p.float() for p in halves], [p.clone() for p in halves]
    remainders = [torch.zeros_like(p, dtype=torch.int16) for p in halves]
    momenta = [[torch.zeros(shape) for shape in SHAPES] for _ in range(3)]
    for grads in gradients(10, torch.bfloat16):
        small = OPTIONS | {"lr": 1e-5}
        kernels.muon_step(halves, grads, momenta[0], **small, remainders=remainders)
        kernels.muon_step(wide, grads, momenta[1], **small)
        kernels.muon_step(few, grads, momenta[2], **small)
    for p, remainder, truth in zip(halves, remainders, wide, strict=True):
        assert torch.equal(joined(p, remainder), truth)
    before = start(torch.bfloat16)
    moved = [
        (p != q.to(p.dtype)).float().mean() for p, q in ((few[1], before[1]), (wide[1], before[1]))
    ]
    assert moved[0] < 0.1  # without a remainder nearly all steps are lost
    assert moved[1] == 1


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99), st.integers(-20, 20))
def test_singular_values_are_near_one(rows, columns, seed, power):
    """Whatever the scale. The quintic is at most 1.2024 on [0, 1.2024], and five of it take each
    number from 0.01 to 1 to one between 0.6818 and 1.1344; the rest is rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 2.0**power
    before = torch.linalg.svdvals(matrix.double() / matrix.double().norm())
    after = torch.linalg.svdvals(orthogonalized(matrix).double())
    assert after.max() <= 1.2025
    assert (after > 0.681).sum() >= (before > 0.01).sum()
    turned = orthogonalized(matrix.t()).t()
    assert (turned - orthogonalized(matrix)).abs().max() <= 2e-5  # another order of the sums


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_a_gradient_of_zeros_moves_nothing(shape):
    """But for the decay: no division by zero, no NaN."""
    p, mean = torch.ones(shape), torch.zeros(shape)
    kernels.muon_step([p], [torch.zeros(shape)], [mean], **OPTIONS)
    assert torch.equal(p, torch.full(shape, 1 - 0.02 * 0.1))
