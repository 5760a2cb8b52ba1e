"""Bootstrap intervals cover what they should, and tests of a difference have their size."""

import random
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.metrics import METRICS
from lorakit.evaluation import intervals

text = st.sampled_from(["a b", "a", "b c d e", "a b c d e", "B-PER I-PER O", "B-PER O O", "PER: a"])
rows = st.lists(st.tuples(text, text, text, st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=30)
@given(rows, st.sampled_from(METRICS))
def test_a_weight_is_the_number_of_times_that_a_row_counts(rows, metric):
    """The sums of weighted rows give the score of a list that holds each row so often."""
    if metric in ("bleu", "chrf"):
        pytest.importorskip("sacrebleu")
    one, two, references, weights = map(list, zip(*rows, strict=True))
    weights[0] += 1  # some row is drawn
    weighed = torch.tensor([weights], dtype=torch.float64)
    sums, value = intervals.statistics([one, two], references, metric)
    for texts, of_system in zip((one, two), sums, strict=True):
        pairs = [
            pair
            for pair, n in zip(zip(texts, references, strict=True), weights, strict=True)
            for _ in range(n)
        ]
        expected = lk.metrics.score(*map(list, zip(*pairs, strict=True)), metric)[metric]
        assert value(of_system(weighed)).item() == pytest.approx(expected, rel=1e-12)


def answers(rng, rows, share):
    """Texts that are right, which is "y", with a probability."""
    return ["y" if rng.random() < share else "n" for _ in range(rows)]


def test_intervals_cover_the_truth_as_often_as_they_say():
    """The accuracy of 200 rows of a model that is right in 70 of 100: 95% of 300 intervals.

    The count of those that cover is binomial, with a standard deviation of 3.8 of 285; a percentile
    interval of 200 rows covers some 94% (the discreteness of the mean takes a little). The bounds
    are four deviations wide on either side.
    """
    rng = random.Random(0)
    covered = 0
    for seed in range(300):
        texts = answers(rng, 200, 0.7)
        found = lk.bootstrap_interval(texts, ["y"] * 200, "accuracy", resamples=400, seed=seed)
        covered += found.low <= 0.7 <= found.high
    assert 266 <= covered <= 299


@pytest.mark.parametrize("metric", ["accuracy", "weighted_f1"])
def test_a_difference_that_is_none_is_found_no_more_often_than_the_level_says(metric):
    """200 pairs of equal models. An exact test is below its level: at most 10 + 4 deviations."""
    rng = random.Random(1)
    found = 0
    for seed in range(200):
        one, two = answers(rng, 80, 0.6), answers(rng, 80, 0.6)
        references = ["y" if i % 2 else "n" for i in range(80)]
        compared = lk.compare_predictions(one, two, references, metric, resamples=200, seed=seed)
        found += not compared.within_noise
    assert found <= 22


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "rouge_l"])
def test_a_difference_that_is_one_is_found(metric):
    rng = random.Random(2)
    one, two, references = answers(rng, 300, 0.6), answers(rng, 300, 0.9), ["y"] * 300
    compared = lk.compare_predictions(one, two, references, metric, resamples=500)
    assert not compared.within_noise
    assert 0 < compared.difference.low < compared.difference.value < compared.difference.high
    assert compared.difference.value == pytest.approx(compared.second - compared.first)
    assert str(compared).endswith(": they differ")
    again = lk.compare_predictions(one, one, references, metric, resamples=500)
    assert (again.p_value, again.difference) == (1, (0, 0, 0))
    assert str(again).endswith("the difference is within noise")


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_binomial_test(worse, better):
    """Twice the smaller tail of fair coins, as statsmodels' and R's exact tests have it."""
    one = ["y"] * worse + ["n"] * better + ["y"]
    two = ["n"] * worse + ["y"] * better + ["y"]
    found = lk.compare_predictions(one, two, ["y"] * len(one), "accuracy", resamples=1).p_value
    n, tail = worse + better, range(min(worse, better) + 1)
    assert found == min(1, 2 * sum(comb(n, k) for k in tail) / 2**n)


def test_the_paired_test_is_sacrebleus():
    """Its approximate randomization of BLEU, with other draws: 5 deviations of 1000 of them."""
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    rng = random.Random(3)
    references = [" ".join(rng.choices("abcdefgh", k=12)) for _ in range(40)]

    def noisy(share):
        return [" ".join(w if rng.random() > share else "z" for w in r.split()) for r in references]

    one, two = noisy(0.32), noisy(0.25)
    test = PairedTest([("one", one), ("two", two)], {"BLEU": BLEU()}, [references], "ar", 1000)
    _, scores = test()
    found = lk.compare_predictions(one, two, references, "bleu", resamples=1000)
    assert (found.first, found.second) == tuple(each.score for each in scores["BLEU"])
    p = scores["BLEU"][1].p_value
    assert found.p_value == pytest.approx(p, abs=5 * (2 * p * (1 - p) / 1000) ** 0.5)
    assert 0.01 < p < 0.5  # far from the ends, where any two tests agree


def test_the_same_seed_gives_the_same_interval(monkeypatch):
    texts = ["a " * (1 + i % 13) for i in range(50)]
    references = ["a " * 13] * 50
    one, two = (lk.bootstrap_interval(texts, references, "rouge_l", seed=s) for s in (0, 0))
    assert one == two != lk.bootstrap_interval(texts, references, "rouge_l", seed=1)
    monkeypatch.setattr(intervals, "_AT_A_TIME", 70)  # one resample at a time, with other draws
    found = lk.bootstrap_interval(texts, references, "rouge_l")
    # 2000 resamples know the ends of an interval of 0.13 to a few hundredths of it
    assert list(found) == pytest.approx(list(one), abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level is 1.0; it must be above 0 and below 1"),
        ({"resamples": 0}, "resamples is 0; it must be at least 1"),
        ({"metric": "exact"}, "unknown metric 'exact'"),
        ({"references": []}, "1 predictions and 0 references"),
    ],
)
def test_what_is_refused(options, message):
    options = {"predictions": ["a"], "references": ["a"], "metric": "accuracy", **options}
    with pytest.raises(lk.LorakitError, match=message):
        lk.bootstrap_interval(**options)
    predictions = options.pop("predictions")
    with pytest.raises(lk.LorakitError, match=message):
        lk.compare_predictions(predictions, predictions, **options)
