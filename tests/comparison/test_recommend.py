"""The recommendation: each rule decides where it should, and says why."""

import pytest

from lorakit.comparison.recommend import recommend


def row(model, settings, value, *, size=100, parameters=10, seconds=5.0, better="higher"):
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "better": better}
    return {
        "model": model, "settings": settings, "scores": {"m": score}, "weights_mb": size,
        "trained_parameters": parameters, "seconds": seconds,
    }  # fmt: skip


def pair(first, second, value, noise):
    names = [dict(zip(("model", "settings"), each, strict=True)) for each in (first, second)]
    difference = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {
        "first": names[0], "second": names[1], "metric": "m", "difference": difference,
        "p_value": 0.5 if noise else 0.001, "within_noise": noise,
    }  # fmt: skip


def task(name, rows, pairs):
    return {"name": name, "metrics": ["m"], "rows": rows, "pairs": pairs, "sizes": {"test": 80}}


SMALL, LARGE = ("small", "r8"), ("large", "r8")


@pytest.mark.parametrize(("noise", "model"), [(True, "small"), (False, "large")])
def test_the_best_counts_unless_a_smaller_one_is_within_noise(noise, model):
    rows = [row(*SMALL, 0.7, size=100), row(*LARGE, 0.75, size=900)]
    found = recommend({"tasks": [task("t", rows, [pair(SMALL, LARGE, 0.05, noise)])]})
    assert (found["model"], found["settings"]) == (model, "r8")
    noise_rule = next(rule for rule in found["rules"] if rule["rule"].startswith("The best score"))
    alone = "large with r8 has 0.750, alone"
    near = "large with r8 has 0.750, within noise of it small with r8"
    assert noise_rule["says"] == f"t: {near if noise else alone}."
    too_few = "too few rows to tell any two apart"
    assert (too_few in found["rules"][1]["says"]) == noise


@pytest.mark.parametrize(
    ("cheaper", "model"),
    [({"size": 50}, "large"), ({"parameters": 5}, "large"), ({"seconds": 1.0}, "large")],
)
def test_what_is_cheapest(cheaper, model):
    """Size first, then trained parameters, then seconds; the small one is first in the table."""
    rows = [row(*SMALL, 0.7), row(*LARGE, 0.7, **cheaper)]
    found = recommend({"tasks": [task("t", rows, [pair(SMALL, LARGE, 0.0, True)])]})
    assert found["model"] == model
    assert "cheapest of 2 such" in found["text"]


def test_lower_is_better_for_some():
    rows = [row(*SMALL, 3.0, better="lower"), row(*LARGE, 2.0, better="lower")]
    found = recommend({"tasks": [task("t", rows, [pair(SMALL, LARGE, -1.0, False)])]})
    assert found["model"] == "large"


def test_the_one_that_is_good_in_most_tasks():
    rows = [row(*SMALL, 0.9), row(*LARGE, 0.5)]
    other = [row(*SMALL, 0.5), row(*LARGE, 0.9)]
    tasks = [
        task("a", rows, [pair(SMALL, LARGE, -0.4, False)]),
        task("b", other, [pair(SMALL, LARGE, 0.4, False)]),
        task("c", rows, [pair(SMALL, LARGE, -0.4, False)]),
    ]
    found = recommend({"tasks": tasks})
    assert found["text"].startswith(
        "Take small with r8: best, or within noise of the best, in 2 of"
    )


@pytest.mark.parametrize(
    ("gain", "noise", "says"),
    [
        (0.3, False, "t: +0.300 m, better."),
        (-0.3, False, "t: -0.300 m, WORSE."),
        (0.1, True, "t: no better than the untrained model, as far as the rows can tell."),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_training_must_pay(gain, noise, says, turned):
    before = ("small", "untrained")
    sides = (SMALL, before) if turned else (before, SMALL)
    pairs = [pair(*sides, -gain if turned else gain, noise)]
    rows = [row(*before, 0.5), row(*SMALL, 0.5 + gain)]
    found = recommend({"tasks": [task("t", rows, pairs)]})
    assert found["rules"][-1] == {"rule": "Training must pay.", "says": says}
    text, _, but = found["text"].partition(" But ")
    assert text == "small with r8 is the only one that is trained on every task."
    better = says.endswith(" better.")
    assert but == (
        "" if better else "on no task is it shown to be better than the untrained model."
    )


def test_nothing_can_be_said_yet():
    whole, empty = task("a", [row(*SMALL, 0.9)], []), task("b", [], [])
    found = recommend({"tasks": [whole, empty]})
    assert found["model"] is None
    assert found["text"].startswith("There is nothing to recommend")


def test_a_score_that_is_not_finite_is_never_the_best():
    bad = row(*SMALL, 0.9)
    bad["scores"]["m"] |= {"value": None, "low": None, "high": None}
    found = recommend({"tasks": [task("t", [bad, row(*LARGE, 0.1, size=900)], [])]})
    assert found["model"] == "large"
