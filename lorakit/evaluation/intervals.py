"""How far a score may be off: bootstrap intervals, and tests of the difference of two models.

A score of n rows is one draw of what other n rows would give. Every metric here is a function of
sums over the rows (of matches, of n-grams, of labels), so a resample is a weight for each row, and
thousands of resamples are one matrix product.

    interval    percentile bootstrap (Efron 1979): the middle share of the scores of resamples
    p-value     exact McNemar (1947) where a row is right or wrong: the rows on which the models
                differ are draws of a fair coin if neither is better;
                else approximate randomization (Noreen 1989): how often the difference is as large
                if each row's two texts are swapped at random

Both models have answered the same rows, and the rows are resampled in pairs. That finds smaller
differences than two intervals side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import check
from lorakit.evaluation.metrics import (
    SCORES,
    check_texts,
    check_usable,
    entity_counts,
    label,
)
from lorakit.evaluation.translation import bleu_counts, bleu_value, chrf_counts, chrf_value

Texts = Sequence[str]
OF_RIGHT_OR_WRONG = ("accuracy", "exact_match", "partial_match")
"""Metrics that are the share of rows which are right."""
_AT_A_TIME = 1 << 23  # numbers that the resamples of one pass hold


class Interval(NamedTuple):
    """A score, and the interval that its resamples lie in."""

    value: float
    """The score of the rows."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


class Comparison(NamedTuple):
    """Two models' scores of the same rows, and whether they differ by more than chance."""

    first: float
    """Score of the first model."""
    second: float
    """Score of the second model."""
    difference: Interval
    """Second score minus first, with the interval of resamples."""
    p_value: float
    """Probability of a difference as large if neither model were better."""
    level: float
    """The level of the interval, such as 0.95."""

    @property
    def within_noise(self) -> bool:
        """Whether chance alone gives such a difference too often: p_value > 1 - level."""
        return self.p_value > 1 - self.level

    def __str__(self) -> str:
        verdict = "the difference is within noise" if self.within_noise else "they differ"
        value, low, high = self.difference
        return (
            f"{self.first:.4f} -> {self.second:.4f}, {value:+.4f} [{low:+.4f}, {high:+.4f}], "
            f"p = {self.p_value:.3g}: {verdict}"
        )


def bootstrap_interval(
    predictions: Texts,
    references: Texts,
    metric: str,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return a score with its bootstrap interval.

    Args:
        predictions: Texts that a model wrote.
        references: As many texts that it should have written.
        metric: The name of a metric, as `lorakit.metrics.score` takes it.
        level: The share of resamples that the interval holds, above 0 and below 1.
        resamples: How many times the rows are drawn with replacement.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        The score, and both ends of the interval.

    Raises:
        LorakitError: The metric or the texts are such that `lorakit.metrics.score` refuses them, or
            level or resamples is out of range.
    """
    _check(level, resamples, metric)
    check_texts(predictions, references)
    [sums], value = statistics([predictions], references, metric)
    drawn = [value(sums(weights)) for weights in draws(len(references), resamples, seed)]
    low, high = middle(torch.cat(drawn), level)
    return Interval(SCORES[metric](predictions, references), low, high)


def compare_predictions(
    first: Texts,
    second: Texts,
    references: Texts,
    metric: str,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two models by their texts for the same rows.

    Args:
        first: Texts of one model.
        second: Texts of the other model, in the same order.
        references: As many texts that they should have written.
        metric: The name of a metric, as `lorakit.metrics.score` takes it.
        level: The share of resamples that the interval of the difference holds.
        resamples: How many times the rows are drawn with replacement, and the models swapped.
        seed: Seed of the draws; the same seed gives the same result.

    Returns:
        Both scores, their difference with its interval, and the p-value.

    Raises:
        LorakitError: The metric or the texts are such that `lorakit.metrics.score` refuses them, or
            level or resamples is out of range.
    """
    _check(level, resamples, metric)
    check_texts(first, references)
    check_texts(second, references)
    (one, two), value = statistics([first, second], references, metric)
    rows = len(references)
    drawn = [value(two(w)) - value(one(w)) for w in draws(rows, resamples, seed)]
    low, high = middle(torch.cat(drawn), level)
    scores = SCORES[metric](first, references), SCORES[metric](second, references)
    difference = scores[1] - scores[0]
    if metric in OF_RIGHT_OR_WRONG:
        p_value = mcnemar(*(by_row(texts, references, metric) for texts in (first, second)))
    else:
        p_value = randomization([(one, two)], value, difference, rows, resamples, seed)
    return Comparison(*scores, Interval(difference, low, high), p_value, level)


def _check(level: float, resamples: int, metric: str) -> None:
    check(0 < level < 1, f"intervals: level is {level}; it must be above 0 and below 1")
    check(resamples >= 1, f"intervals: resamples is {resamples}; it must be at least 1")
    check_usable([metric])


def middle(values: Tensor, level: float) -> tuple[float, float]:
    """Return the ends of the middle share of values."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = values.quantile(ends).tolist()
    return low, high


# ---- weights of the rows ----


def draws(rows: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each resample draws each row, float64 [some, rows] at a time."""
    generator = torch.Generator().manual_seed(seed)
    for count in _parts(rows, resamples):
        numbers = torch.randint(rows, (count, rows), generator=generator)
        ones = torch.ones(1, 1, dtype=torch.float64).expand(count, rows)
        yield torch.zeros(count, rows, dtype=torch.float64).scatter_add_(1, numbers, ones)


def _swaps(rows: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield 1 where a resample keeps a row's two texts and 0 where it swaps them, as `draws`."""
    generator = torch.Generator().manual_seed(seed)
    for count in _parts(rows, resamples):
        yield torch.randint(2, (count, rows), generator=generator).double()


def _parts(rows: int, resamples: int) -> list[int]:
    """Return how many resamples to take at a time."""
    most = max(1, _AT_A_TIME // rows)
    return [min(most, resamples - start) for start in range(0, resamples, most)]


# ---- what a metric sums over the rows ----

Sums = Callable[[Tensor], Tensor]
"""Weights of the rows, float64 [R, n] -> the sums of a metric, float64 [R, k]."""
Value = Callable[[Tensor], Tensor]
"""The sums of a metric, float64 [R, k] -> the metric, float64 [R]."""


def statistics(systems: list[Texts], references: Texts, metric: str) -> tuple[list[Sums], Value]:
    """Return the sums of a metric for each system's texts, and what the metric makes of them."""
    if metric in ("macro_f1", "weighted_f1"):
        names = {label(text) for texts in [*systems, references] for text in texts}
        numbers = {name: i for i, name in enumerate(sorted(names))}
        value = _macro_f1 if metric == "macro_f1" else _weighted_f1
        return [_label_sums(texts, references, numbers) for texts in systems], value
    rows_of, value = {
        "entity_f1": (_entities, _entity_f1),
        "bleu": (bleu_counts, bleu_value),
        "chrf": (chrf_counts, chrf_value),
    }.get(metric, (partial(_with_count, metric=metric), mean))
    return [row_sums(rows_of(texts, references)) for texts in systems], value


def row_sums(rows: Tensor) -> Sums:
    """Return the weighted sums of rows, float64 [n, k]."""
    return lambda weights: weights @ rows


def by_row(predictions: Texts, references: Texts, metric: str) -> Tensor:
    """Return a metric of each row alone, float64 [n]."""
    of_one = SCORES[metric]
    pairs = zip(predictions, references, strict=True)
    return torch.tensor([of_one([p], [r]) for p, r in pairs], dtype=torch.float64)


def _with_count(predictions: Texts, references: Texts, metric: str) -> Tensor:
    values = by_row(predictions, references, metric)
    return torch.stack([values, torch.ones_like(values)], dim=1)


def mean(sums: Tensor) -> Tensor:
    """Return means from the sums of values and of how many there are, [R, 2] -> [R]."""
    return sums[:, 0] / sums[:, 1]


def _entities(predictions: Texts, references: Texts) -> Tensor:
    counts = list(map(entity_counts, predictions, references))
    return torch.tensor(counts, dtype=torch.float64)


def _entity_f1(sums: Tensor) -> Tensor:
    hits, predicted, true = sums.unbind(-1)
    return _f1(hits, predicted, true)


def _label_sums(predictions: Texts, references: Texts, numbers: dict[str, int]) -> Sums:
    """Return the sums of each label's hits, predictions and references, [R, 3 * labels]."""
    predicted, true = (
        torch.tensor([numbers[label(text)] for text in texts])
        for texts in (predictions, references)
    )
    right, labels = predicted == true, len(numbers)

    def sums(weights: Tensor) -> Tensor:
        found = weights.new_zeros(len(weights), 3 * labels)
        found.index_add_(1, true, weights * right)
        found.index_add_(1, labels + predicted, weights)
        found.index_add_(1, 2 * labels + true, weights)
        return found

    return sums


def _macro_f1(sums: Tensor) -> Tensor:
    hits, predicted, true = sums.chunk(3, dim=1)
    occurs = predicted + true > 0
    return _f1(hits, predicted, true).sum(1) / occurs.sum(1)


def _weighted_f1(sums: Tensor) -> Tensor:
    hits, predicted, true = sums.chunk(3, dim=1)
    return (_f1(hits, predicted, true) * true).sum(1) / true.sum(1)


def _f1(hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    return torch.where(hits > 0, 2 * hits / (predicted + true), 0.0)


def randomization(
    pairs: Sequence[tuple[Sums, Sums]],
    value: Value,
    difference: float,
    rows: int,
    resamples: int,
    seed: int,
) -> float:
    """Return how often chance alone gives a difference as large: approximate randomization.

    The difference is the mean over the pairs. The texts of a row are swapped in all pairs at once.
    """
    as_large = 0
    for swap in _swaps(rows, resamples, seed):
        mixed = torch.zeros(len(swap), dtype=torch.float64)
        for one, two in pairs:
            mixed += value(one(swap) + two(1 - swap)) - value(two(swap) + one(1 - swap))
        # sums of the same numbers in another order are the same difference
        as_large += int(((mixed / len(pairs)).abs() >= abs(difference) - 1e-9).sum())
    return (1 + as_large) / (1 + resamples)


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Return the exact p-value of two models' right (1) and wrong (0) rows."""
    return sign_test(int((first > second).sum()), int((second > first).sum()))


def sign_test(one: int, other: int) -> float:
    """Return the two-sided p-value of so many wins of either side, which a fair coin gives too."""
    tosses, fewer = one + other, min(one, other)
    ways = term = 1  # of `tosses` fair coins, those with no head
    for heads in range(1, fewer + 1):
        term = term * (tosses - heads + 1) // heads
        ways += term
    p_value: float = 2 * ways / 2**tosses
    return min(1.0, p_value)
