"""The table of a forecast: what it adds up to, and how long its bars are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.training.memory_plan.table import plan_line


def plan(resident, made, rounding=0):
    at_peak = {**resident, **made}
    peak = sum(at_peak.values())
    return lk.MemoryPlan(
        peak=peak,
        reserved=peak + rounding,
        host=0,
        when="backward",
        resident=resident,
        at_peak=at_peak,
        phases={"backward": peak},
        activations={},
        seconds=0.1,
    )


def test_the_table_as_it_is_printed():
    card = lk.Card("a GPU of 24.0 GB", 24 * 10**9, (9, 0))
    forecast = plan(
        {"packed weights": 4_400_000_000, "adapters": 160_000_000},
        {"activations": 3_000_000_000, "gradients": 160_000_000},
        rounding=80_000_000,
    )
    assert lk.plan_table(forecast, card, width=100).splitlines() == [
        "                           between steps  at the peak",
        "packed weights                    4.4 GB       4.4 GB  ########################",
        "adapters                          160 MB       160 MB  #",
        "activations                            -       3.0 GB  ################",
        "gradients                              -       160 MB  #",
        "allocator's rounding                   -        80 MB",
        "CUDA context (allowance)          600 MB       600 MB  ###",
        "together                          5.2 GB       8.4 GB",
        "                                                 35 %  of 24.0 GB",
        "each # is 187 MB",
    ]


@settings(max_examples=40)
@given(
    kept=st.lists(st.integers(1, 10**12), min_size=1, max_size=5),
    made=st.lists(st.integers(1, 10**12), max_size=3),
    memory=st.none() | st.integers(10**9, 10**12),
    width=st.integers(70, 200),
)
def test_bars_are_honest_and_lines_fit(kept, made, memory, width):
    forecast = plan(
        {f"kept {i}": size for i, size in enumerate(kept)},
        {f"made {i}": size for i, size in enumerate(made)},
    )
    card = None if memory is None else lk.Card("a GPU", memory, (9, 0))
    lines = lk.plan_table(forecast, card, width=width).splitlines()
    assert max(map(len, lines)) <= width
    whole = forecast.peak + (0 if card is None else card.context)
    lengths = {name: line.count("#") for line in lines for name in [line.split("   ")[0].strip()]}
    cells = width - max(len("CUDA context (allowance)" if card else "allocator's rounding"), 6) - 31
    for name, size in forecast.at_peak.items():
        if 1000 * size < whole:
            continue
        assert abs(lengths[name] - cells * size / whole) <= 0.5


def test_small_kinds_are_one():
    lines = lk.plan_table(plan({"weights": 10**9, "a": 300_000}, {"b": 400_000})).splitlines()
    assert lines[2].split() == ["other", "300", "kB", "700", "kB"]
    assert lines[3].split() == ["together", "1.0", "GB", "1.0", "GB"]


@pytest.mark.parametrize(
    ("size", "memory", "line"),
    [
        (7_400_000_000, 24_000_000_000, "needs 7.4 of 24.0 GB"),
        (378_000_000, 24_000_000_000, "needs 378 MB of 24.0 GB"),
        (378_000_000, 900_000_000, "needs 378 of 900 MB"),
    ],
)
def test_the_line(size, memory, line):
    assert plan_line(plan({"weights": size}, {}), memory) == f"memory: {line}, most in backward"
