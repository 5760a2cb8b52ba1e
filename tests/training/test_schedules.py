"""The learning rate of every step: its definition, and transformers' schedules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.training import SCHEDULES
from lorakit.training.schedules import learning_rate

FALLING = [kind for kind in SCHEDULES if kind != "cosine_with_restarts"]


@given(st.sampled_from(FALLING), st.integers(1, 500), st.floats(0, 1))
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
    floor = {"warmup_steps": 10, "min_lr_ratio": 0.2}
    assert learning_rate("cosine_with_min_lr", 60, 110, 2.0, **floor) == pytest.approx(1.2)
    again = {"warmup_steps": 10, "num_cycles": 4}
    for step in (10, 35, 60, 85):
        assert learning_rate("cosine_with_restarts", step, 110, 2.0, **again) == 2.0
        assert learning_rate("cosine_with_restarts", step + 24, 110, 2.0, **again) < 0.01
    assert learning_rate("inverse_sqrt", 40, 110, 2.0, warmup_steps=10) == pytest.approx(1.0)
    assert learning_rate("inverse_sqrt", 30_000, 60_000, 2.0) == pytest.approx(1.0)


THEIRS = {
    "constant": ("get_constant_schedule", {}),
    "constant_with_warmup": ("get_constant_schedule_with_warmup", {}),
    "linear": ("get_linear_schedule_with_warmup", {}),
    "cosine": ("get_cosine_schedule_with_warmup", {}),
    "cosine_with_min_lr": (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": "min_lr_ratio"},
    ),
    "cosine_with_restarts": (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_cycles": "num_cycles"},
    ),
    "inverse_sqrt": ("get_inverse_sqrt_schedule", {}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 100),
    floor=st.floats(0, 1),
    n=st.integers(1, 5),
)
def test_the_rates_of_transformers(kind, total, warmup, floor, n):
    """Step by step; in the warm-up theirs of the next step, as their first is 0. Their "constant"
    has none.
    """
    optimization = pytest.importorskip("transformers.optimization")
    name, renamed = THEIRS[kind]
    warmup = 0 if kind == "constant" else min(warmup, total - 1)
    options = {"min_lr_ratio": floor, "num_cycles": n}
    known = {"num_warmup_steps": warmup, "num_training_steps": total}
    if kind in ("constant", "constant_with_warmup", "inverse_sqrt"):
        del known["num_training_steps"]
    if kind == "constant":
        del known["num_warmup_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = getattr(optimization, name)(
        optimizer, **known, **{new: options[ours] for new, ours in renamed.items()}
    ).lr_lambdas[0]
    for step in range(total):
        rate = learning_rate(kind, step, total, 3.0, 0.5, warmup_steps=warmup, **options)
        expected = 3.0 * theirs(step + 1 if step < warmup else step)
        # in fp64; near the end of a cosine 1 + cos(x) leaves absolute digits alone, and a restart
        # that falls between two numbers is at one of its ends
        inside = abs(n * (step - warmup) / max(1, total - warmup) % 1 - 0.5) < 0.5 - 1e-9
        if kind != "cosine_with_restarts" or inside:
            assert rate == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_its_public_name():
    assert lk.optim.learning_rate is learning_rate


def test_a_schedule_by_another_name():
    with pytest.raises(lk.LorakitError, match=r"called 'cosin' \(did you mean 'cosine'\?\)"):
        learning_rate("cosin", 0, 10, 1.0)
