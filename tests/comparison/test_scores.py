"""Scores over seeds, their intervals and their differences, against draws by hand."""

import math
import random

import numpy as np
import pytest

import lorakit as lk
from lorakit.comparison.scores import (
    difference,
    measure_losses,
    measure_means,
    measure_texts,
    pooled,
    together,
)


def answers(rng, rows, share):
    return ["y" if rng.random() < share else "n" for _ in range(rows)]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "rouge_l", "entity_f1"])
def test_one_seed_is_what_the_library_says_of_two_models(metric):
    rng = random.Random(0)
    one, two, references = (answers(rng, 60, share) for share in (0.5, 0.8, 0.7))
    measure = measure_texts(metric, {"one": one, "two": two}, references)
    assert pooled(measure, ["one"]) == lk.bootstrap_interval(one, references, metric)
    found = difference(measure, [("one", "two")])
    expected = lk.compare_predictions(one, two, references, metric)
    assert found.interval == expected.difference
    assert found.p_value == expected.p_value


def test_seeds_are_drawn_beside_rows():
    """Two seeds far apart, without any luck of the rows: a resample has both, or one of them twice.

    Half of the resamples of two seeds mix them, so the middle 95% reach from one to the other.
    """
    values = {"a": [0.2] * 40, "b": [0.6] * 40}
    found = pooled(measure_means("bert_score", values), ["a", "b"])
    assert list(found) == pytest.approx([0.4, 0.2, 0.6])


def test_the_interval_over_seeds_is_that_of_two_draws():
    """numpy draws rows and seeds by itself: 4000 resamples know an end to some hundredths of it."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50)) + np.array([[0.0], [0.3], [0.6]])
    found = pooled(measure_means("m", {str(i): list(v) for i, v in enumerate(values)}), list("012"))
    drawn = []
    for _ in range(4000):
        rows, seeds = rng.integers(50, size=50), rng.integers(3, size=3)
        drawn.append(values[seeds][:, rows].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (
        pytest.approx(low, abs=0.05 * (high - low)),
        pytest.approx(high, abs=0.05 * (high - low)),
    )


def test_a_difference_that_other_seeds_turn_round_is_noise():
    """One of two pairs of seeds is better by much, the other worse: the rows alone see a winner."""
    rng = random.Random(1)
    base = [rng.random() for _ in range(80)]
    values = {
        "a0": base,
        "a1": base,
        "b0": [v + 0.5 for v in base],
        "b1": [v - 0.2 for v in base],
    }
    measure = measure_means("m", values)
    found = difference(measure, [("a0", "b0"), ("a1", "b1")])
    assert found.interval.value == pytest.approx(0.15)
    assert found.p_value < 0.05
    assert found.within_noise
    assert not difference(measure, [("a0", "b0"), ("a1", "b0")]).within_noise


def test_equal_models_are_told_apart_no_more_often_than_the_level_says():
    """100 comparisons of equal models with two seeds each: at most 5 + 4 deviations."""
    rng, found = random.Random(2), 0
    for _ in range(100):
        values = {name: [rng.random() for _ in range(40)] for name in ("a", "b", "c", "d")}
        found += not difference(measure_means("m", values), [("a", "b"), ("c", "d")]).within_noise
    assert found <= 14


def test_perplexity_and_bits_per_byte():
    rows = [[6.0, 3, 8], [2.0, 5, 4], [4.0, 2, 6]]
    both = {"a": rows, "b": [[2 * nats, n, size] for nats, n, size in rows]}
    perplexity, bits = (measure_losses(name, both) for name in ("perplexity", "bits_per_byte"))
    assert pooled(perplexity, ["a"]).value == pytest.approx(math.exp(12 / 10))
    assert pooled(bits, ["b"]).value == pytest.approx(24 / math.log(2) / 18)
    assert (perplexity.better, measure_means("m", {"a": [1.0]}).better) == ("lower", "higher")
    nothing = measure_losses("perplexity", {"a": rows, "b": [[math.nan, 1, 1]] * 3})
    found = difference(nothing, [("a", "b")])
    assert (found.p_value, found.within_noise) == (1, True)


def test_measures_of_runs_together_are_one_measure():
    rng = random.Random(3)
    texts, references = {n: answers(rng, 30, 0.6) for n in "ab"}, answers(rng, 30, 0.6)
    whole = measure_texts("accuracy", texts, references)
    parts = [measure_texts("accuracy", {n: t}, references) for n, t in texts.items()]
    assert difference(together(parts), [("a", "b")]) == difference(whole, [("a", "b")])
