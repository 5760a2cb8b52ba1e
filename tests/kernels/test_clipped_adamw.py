"""A clipped step whose numbers lie on the device: against torch's clipping and `adamw_step`, which
have them on the host.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakit import kernels
from lorakit.kernels import AdamWGroup, AdamWRow, ClippedAdamW, Moment8bit
from lorakit.kernels.ops.adamw import reference
from lorakit.kernels.ops.adamw.lists import AdamWOptions, numbers
from tests.triton_budget import random
from tests.triton_interpreter import DEVICE, on_triton

MAX_NORM = 1.0
GROUPS = [AdamWGroup(0, (0.9, 0.999), 1e-8, 0.1), AdamWGroup(0, (0.9, 0.999), 1e-8, 0.0)]
BACKENDS = {
    "reference": lambda: kernels.use_backend("reference"),
    "triton": on_triton,
}
backends = pytest.mark.parametrize("backend", BACKENDS)
seeds = st.integers(0, 2**31)


def rates(steps):
    """Return the rates of both groups for each step, as a schedule and LoRA+ have them."""
    return [[lr, 16 * lr] for lr in (1e-2 * (1 + math.cos(i)) for i in range(steps))]


def rows(sizes, seed=0, narrow=(), halves=()):
    """Rows of both groups by turns; those in `narrow` have 8-bit state, those in `halves` are bf16
    with a remainder.
    """
    found = []
    for i, n in enumerate(sizes):
        p, g, remainder = random(seed + i, n), random(seed + 100 + i, n), None
        if i in narrow:
            m, v = (Moment8bit.zeros(n, DEVICE) for _ in range(2))
        else:
            m, v = (torch.zeros(n, device=DEVICE) for _ in range(2))
        if i in halves:
            p, g = p.bfloat16(), g.bfloat16()
            remainder = torch.zeros(n, dtype=torch.int16, device=DEVICE)
        found.append(AdamWRow(i % 2, p, g, m, v, remainder))
    return found


def tensors(row):
    return [t for t in row.tensors if t is not row.grad]


def copies(some):
    def copy(x):
        if isinstance(x, Moment8bit):
            return Moment8bit(*map(torch.clone, x))
        return None if x is None else x.clone()

    return [AdamWRow(row.group, *map(copy, row[1:])) for row in some]


def set_gradients(some, seed, scale=1.0):
    for i, row in enumerate(some):
        row.grad.copy_(random(seed + i, *row.grad.shape, scale=scale))


def on_the_host(some, t, lr_of, clip=None):
    """torch's clipping, or by a given factor, and a step of each group with numbers of the host."""
    grads = [row.grad for group in (0, 1) for row in some if row.group == group]
    if clip is None:
        holders = [torch.nn.Parameter(g) for g in grads]
        for holder, g in zip(holders, grads, strict=True):
            holder.grad = g
        torch.nn.utils.clip_grad_norm_(holders, MAX_NORM)
    else:
        torch._foreach_mul_(grads, clip)
    for number, group in enumerate(GROUPS):
        options = {"step": t, "lr": lr_of[number], "betas": group.betas, "eps": group.eps}
        options["weight_decay"] = group.weight_decay
        for op, kind in (
            (kernels.adamw_step, torch.Tensor),
            (kernels.adamw_step_8bit, Moment8bit),
        ):
            mine = [r[1:5] for r in some if r.group == number and isinstance(r.exp_avg, kind)]
            if mine:
                op(*map(list, zip(*mine, strict=True)), **options)


def same(some, others, **tolerance):
    for a, b in zip(some, others, strict=True):
        for x, y in zip(tensors(a), tensors(b), strict=True):
            if tolerance:
                assert torch.allclose(x.float(), y.float(), **tolerance)
            else:
                assert torch.equal(x, y)


LOSS = torch.tensor([2.5], device=DEVICE)
SIZES = (300, 1024, 5000, 17, 9000)


def test_the_reference_has_the_bits_of_the_host_step():
    """Weight decay, LoRA+, a schedule, gradients to be clipped and not, both kinds of state."""
    some = rows(SIZES, narrow=(2, 4))
    host = copies(some)
    step = ClippedAdamW(GROUPS, rates(6), MAX_NORM, DEVICE)
    with kernels.use_backend("reference"):
        for t in range(6):
            for each in (some, host):
                set_gradients(each, 10 * t, 1.0 if t % 2 else 1e-3)
            norm = torch.cat([row.grad for row in some]).double().norm()
            told = step(some, LOSS)
            assert told[0].item() == pytest.approx(norm.item(), rel=1e-6)  # fp32 sums
            assert told[1:].tolist() == [1, -1, 2.5]
            on_the_host(host, t + 1, rates(6)[t])
    same(some, host)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), seeds, st.sampled_from([1e-4, 1.0]))
def test_the_kernels_have_the_bits_of_the_host_step(sizes, seed, scale):
    """The host's step is Triton's kernel with its own numbers, and clips by the same factor."""
    some = rows(sizes, seed, narrow=(1,))
    host = copies(some)
    step = ClippedAdamW(GROUPS, rates(2), MAX_NORM, DEVICE)
    for t in range(2):
        for each in (some, host):
            set_gradients(each, seed + 10 * t, scale)
        with on_triton():
            told = step(some, LOSS)
            on_the_host(host, t + 1, rates(2)[t], step.numbers[0, 8])
        exact = math.sqrt(sum(row.grad.double().square().sum().item() for row in some))
        unclipped = math.sqrt(sum(random(seed + 10 * t + i, n, scale=scale).double().square().sum()
                                  for i, n in enumerate(sizes)))  # fmt: skip
        assert exact == unclipped  # the gradients are as they were
        # sums in at most 40 roundings of 2^-24, of which the root has half
        assert told[0].item() == pytest.approx(exact, rel=1e-6)
        factor = min(1.0, MAX_NORM / (told[0].item() + 1e-6))
        assert step.numbers[0, 8].item() == pytest.approx(factor, rel=2e-7)  # two roundings
        assert told[1:].tolist() == [1, -1, 2.5]
    same(some, host)


@backends
@settings(max_examples=20)
@given(st.integers(0, 5000), st.integers(1, 12), st.floats(1e-7, 1), st.floats(0, 1))
def test_numbers_are_those_of_the_host(backend, before, steps, lr, decay):
    """They are the same bits, after skipped steps too: rates go on, and bias corrections wait."""
    groups = [AdamWGroup(before, (0.9, 0.999), 1e-8, decay), AdamWGroup(3, (0.8, 0.95), 1e-6, 0.0)]
    rate = [[lr / (i + 1), 1.7 * lr / (i + 2)] for i in range(steps)]
    step = ClippedAdamW(groups, rate, MAX_NORM, DEVICE)
    some = rows([5, 4])
    taken = 0
    with BACKENDS[backend]():
        for i in range(steps):
            bad = i % 3 == 1
            step(some, torch.tensor([math.nan if bad else 1.0], device=DEVICE))
            for group, lr_now, found in zip(groups, rate[i], step.numbers, strict=True):
                now = AdamWOptions(group.step + taken + 1, lr_now, *group[1:])
                expected = torch.tensor(numbers(now), dtype=torch.float32, device=DEVICE)
                assert torch.equal(found[:8], expected)
                assert found[9] == (not bad)
            taken += not bad
    assert step.counters.tolist() == [steps, taken]


@backends
@pytest.mark.parametrize(
    ("number", "where"),
    [(math.nan, (0, 1)), (math.inf, (2, 4999)), (-math.inf, (4, 8192)), (1e30, (2, 4999))],
)
@pytest.mark.filterwarnings("ignore:.*encountered")  # numpy's
def test_a_step_that_is_not_finite_changes_nothing(backend, number, where):
    """And says which tensor was the first; 1e30 has no square."""
    some = rows(SIZES, narrow=(2,))
    step = ClippedAdamW(GROUPS, rates(3), MAX_NORM, DEVICE)
    with BACKENDS[backend]():
        step(some, LOSS)
        before = copies(some)
        place, index = where
        some[place].grad[index] = number
        some[4].grad[3] = math.nan
        told = step(some, LOSS)
        assert told[1:].tolist() == [0, place, 2.5]
        assert not told[0].isfinite()
        same(some, before)
        set_gradients(some, 5)
        several = torch.tensor([1.0, math.inf, 2.0], device=DEVICE)
        told = step(some, several)
        assert told[1:].tolist() == [0, -1, *several.tolist()]
        same(some, before)
        assert step.counters.tolist() == [3, 1]
        told = step(some, LOSS)  # beyond the last rate, which stays
        assert told[1] == 1


def test_tensors_that_do_not_fit_take_the_reference():
    """A row in bf16, one that is not on 16 bytes, a gradient with strides; the others do not."""
    odd = [
        AdamWRow(0, *(random(i, 64, 8).bfloat16() for i in (0, 1)), *torch.zeros(2, 64, 8)),
        AdamWRow(1, random(2, 9)[1:], random(3, 8), *torch.zeros(2, 8)),
        AdamWRow(0, random(4, 30, 40), random(5, 40, 30).t(), *torch.zeros(2, 30, 40)),
    ]
    odd = [AdamWRow(g, *(t.to(DEVICE) for t in each[:4])) for g, *each in odd]
    some = [*rows([500]), *odd]
    others = [*copies([some[0]]), *copies(odd)]
    steps = [ClippedAdamW(GROUPS, rates(2), MAX_NORM, DEVICE) for _ in range(2)]
    for _ in range(2):
        with on_triton():
            steps[0](some, LOSS)
        with kernels.use_backend("reference"):
            steps[1](others, LOSS)
    # of a few fp32 roundings, but for bf16 of one of bf16
    same(some[:1] + some[2:], others[:1] + others[2:], rtol=2e-6, atol=2e-6)
    same(some[1:2], others[1:2], rtol=2**-7, atol=1e-6)


@backends
def test_large_tensors_go_in_parts_with_the_same_bits(backend, monkeypatch):
    found = []
    for part in (1 << 24, 512):
        monkeypatch.setattr(reference, "PART", part)
        some = rows([1500, 600], narrow=(1,))
        some[0] = AdamWRow(0, some[0].param.bfloat16(), *some[0][2:])  # takes the reference
        step = ClippedAdamW(GROUPS, rates(2), MAX_NORM, DEVICE)
        with BACKENDS[backend]():
            step(some, LOSS)
            step(some, LOSS)
        found.append(some)
    same(*found)


@backends
def test_tables_are_made_again_only_for_other_addresses(backend):
    some = rows(SIZES)
    step = ClippedAdamW(GROUPS, rates(9), MAX_NORM, DEVICE)
    with BACKENDS[backend]():
        step(some, LOSS)
        before = dict(step.work)
        step(some, LOSS)
        assert all(step.work[name] is each for name, each in before.items())
        some[1] = AdamWRow(some[1].group, some[1].param, some[1].grad.clone(), *some[1][3:])
        step(some, LOSS)
        assert all(step.work[name] is not each for name, each in before.items())
    assert len(before) == (2 if backend == "triton" else 0)


@backends
def test_autograd_sees_the_change(backend):
    some = rows([40, 4100], narrow=(1,))
    versions = [t._version for row in some for t in tensors(row)]
    step = ClippedAdamW(GROUPS, rates(1), MAX_NORM, DEVICE)
    with BACKENDS[backend]():
        step(some, LOSS)
    assert all(
        t._version > old
        for t, old in zip((t for row in some for t in tensors(row)), versions, strict=True)
    )
