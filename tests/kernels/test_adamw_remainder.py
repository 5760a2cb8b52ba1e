"""Parameters in bfloat16 with a remainder: their steps are those of fp32 parameters, to the bit.

The truth is the step of an fp32 parameter with the same state and the same gradient.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import AdamWRow, ClippedAdamW, Moment8bit
from lorakit.kernels.ops.adamw import remainder as halves
from tests.kernels.test_clipped_adamw import (
    BACKENDS,
    GROUPS,
    LOSS,
    MAX_NORM,
    rates,
    rows,
    set_gradients,
    tensors,
)
from tests.triton_budget import random
from tests.triton_interpreter import DEVICE

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SIZES = (300, 1024, 5000, 17, 4096)
backends = pytest.mark.parametrize("backend", BACKENDS)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_both_halves_are_the_number(bits):
    """Any fp32 but NaN comes back to the bit, and the upper half is the nearest bf16."""
    x = torch.tensor([b - 2**31 for b in bits]).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    p, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    halves.put(x, p, low)
    assert torch.equal(halves.joined(p, low).view(torch.int32), x.view(torch.int32))
    finite = x[p.isfinite()].double()
    error = (p[p.isfinite()].double() - finite).abs()
    # no other bf16 is nearer; at a tie torch may take the other one
    nearest = (finite.float().bfloat16().double() - finite).abs()
    assert torch.equal(error, nearest)


def test_a_weight_of_a_file_is_its_own_number():
    """The remainder is 0 before the first step."""
    p = random(0, 1000).bfloat16()
    low = torch.zeros(1000, dtype=torch.int16)
    assert torch.equal(halves.joined(p, low), p.float())


def in_fp32(some):
    """Return rows of fp32 parameters with the numbers, gradients and state of rows of halves."""

    def copy(x):
        return Moment8bit(*map(torch.clone, x)) if isinstance(x, Moment8bit) else x.clone()

    return [
        AdamWRow(
            row.group, halves.joined(row.param, row.remainder), row.grad.float(),
            copy(row.exp_avg), copy(row.exp_avg_sq),
        )
        for row in some
    ]  # fmt: skip


def same_steps(some, wide):
    for row, truth in zip(some, wide, strict=True):
        assert torch.equal(halves.joined(row.param, row.remainder), truth.param)
        own, others = tensors(row)[1:-1], tensors(truth)[1:]
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@backends
def test_a_clipped_step_is_that_of_fp32(backend):
    some = rows(SIZES, narrow=(2, 4), halves=range(5))
    wide = in_fp32(some)
    steps = [ClippedAdamW(GROUPS, rates(3), MAX_NORM, DEVICE) for _ in range(2)]
    for t in range(3):
        scale = 1.0 if t % 2 else 1e-3  # clipped, and not
        set_gradients(some, 10 * t, scale)
        for row, truth in zip(some, wide, strict=True):
            truth.grad.copy_(row.grad)
        with BACKENDS[backend]():
            told, expected = (
                step(each, LOSS) for step, each in zip(steps, (some, wide), strict=True)
            )
        assert torch.equal(told, expected)
    same_steps(some, wide)


@backends
def test_a_clipped_step_that_is_not_finite_changes_nothing(backend):
    some = rows(SIZES, narrow=(2,), halves=(0, 2))
    step = ClippedAdamW(GROUPS, rates(2), MAX_NORM, DEVICE)
    with BACKENDS[backend]():
        step(some, LOSS)
        before = [t.clone() for row in some for t in tensors(row)]
        some[2].grad[4999] = torch.inf
        assert step(some, LOSS)[1:].tolist() == [0, 2, 2.5]
    assert all(
        torch.equal(a, b)
        for a, b in zip((t for row in some for t in tensors(row)), before, strict=True)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=3),
    part=st.sampled_from([256, 1 << 17]),
    in_8bit=st.booleans(),
)
def test_a_step_on_the_host_is_that_of_fp32(backend, sizes, part, in_8bit):
    """The parts that are fp32 at a time do not matter."""
    narrow = range(len(sizes)) if in_8bit else ()
    some = rows(sizes, narrow=narrow, halves=range(len(sizes)))
    some = [AdamWRow(0, *map(_on_host, row[1:])) for row in some]
    wide = in_fp32(some)
    op = kernels.adamw_step_8bit if in_8bit else kernels.adamw_step
    with pytest.MonkeyPatch.context() as patch, kernels.use_backend(backend):
        patch.setattr(halves, "PART_CPU", part)
        for t in range(2):
            *lists, remainders = (
                list(column) for column in zip(*(row[1:] for row in some), strict=True)
            )
            op(*lists, remainders=remainders, step=t + 1, **OPTIONS)
            op(*columns(row[1:-1] for row in wide), step=t + 1, **OPTIONS)
    same_steps(some, wide)


def columns(some):
    return [list(column) for column in zip(*some, strict=True)]


def _on_host(value):
    if isinstance(value, Moment8bit):
        return Moment8bit(*(t.cpu() for t in value))
    return value.cpu()


def test_strides_are_no_matter():
    p, g = random(0, 30, 40).bfloat16().t(), random(1, 30, 40).bfloat16().t()
    m, v = torch.zeros(40, 30), torch.zeros(40, 30)
    low = torch.zeros(40, 30, dtype=torch.int16)
    wide, state = p.float(), (torch.zeros(40, 30), torch.zeros(40, 30))
    kernels.adamw_step([p], [g], [m], [v], remainders=[low], step=1, **OPTIONS)
    kernels.adamw_step([wide], [g.float()], *[[t] for t in state], step=1, **OPTIONS)
    assert torch.equal(halves.joined(p, low), wide)


def test_many_small_steps_are_not_lost():
    """A thousand steps of 1e-5 of the weight: rounded to bf16 after each, nothing moves at all."""
    found = []
    for remainders in (None, [torch.zeros(8, dtype=torch.int16)]):
        p, g = torch.ones(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
        m, v = torch.zeros(8), torch.zeros(8)
        for t in range(1000):
            options = {**OPTIONS, "lr": 1e-5, "weight_decay": 0.0, "step": t + 1}
            kernels.adamw_step([p], [g], [m], [v], remainders=remainders, **options)
        found.append(p[0].item())
    assert found[0] == 1
    assert found[1] == pytest.approx(0.99, abs=2**-9)  # half a bf16 there
