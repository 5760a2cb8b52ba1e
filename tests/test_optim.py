"""AdamW against torch's, its determinism, and the schedules against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.optim import learning_rate


def run(optimizer_class, steps=20, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(3, 4), (5,), ()]]
    optimizer = optimizer_class(params, lr=0.05, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


def test_equals_torch():
    ours, _ = run(lk.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)
    theirs, _ = run(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)  # 20 steps of fp32 roundings


def test_same_bits_twice():
    for a, b in zip(run(lk.optim.AdamW)[0], run(lk.optim.AdamW)[0], strict=True):
        assert torch.equal(a, b)


def test_state_dict_continues():
    straight, _ = run(lk.optim.AdamW, steps=8)
    params, optimizer = run(lk.optim.AdamW, steps=5)
    resumed = lk.optim.AdamW(params, lr=0.05, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        if step >= 5:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            resumed.step()
    for a, b in zip(straight, params, strict=True):
        assert torch.equal(a, b)


def test_finds_a_minimum():
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = lk.optim.AdamW([x], lr=0.1, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        (x - torch.tensor([1.0, 1.0])).square().sum().backward()
        optimizer.step()
    assert (x - 1).abs().max() < 1e-2


def test_refuses_bad_options():
    with pytest.raises(lk.LorakitError, match="betas"):
        lk.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(1.0, 0.9))


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 500), st.floats(0, 1))
def test_schedule(kind, total, warmup):
    """Rises to the peak, then never rises, stays within (0, peak]."""
    rates = [learning_rate(kind, step, total, 1.0, warmup) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_cosine_is_half_way_down_in_the_middle():
    assert learning_rate("cosine", 60, 110, 2.0, 10 / 110) == pytest.approx(1.0)
    assert learning_rate("linear", 60, 110, 2.0, 10 / 110) == pytest.approx(1.0)
    assert learning_rate("cosine", 0, 110, 2.0, 10 / 110) == pytest.approx(0.2)
