"""Scores of runs that differ in their seed alone, together, and the difference of two such groups.

    score       the mean over the seeds of the score of all test rows
    interval    percentile bootstrap: each resample draws as many rows with replacement, the same
                for all seeds, and as many seeds; so it knows of the luck of both
    p-value     approximate randomization over the rows: how often the difference is as large if the
                two groups' texts for a row are swapped at random, for all seeds at once; McNemar's
                exact test where each group has one run and a row is right or wrong

A difference is within noise if p is above 0.05, or if its interval holds 0. The first says what
other rows might give, and the second what other seeds might.

Every metric is a function of sums over rows (see evaluation/intervals.py). That includes
perplexity, exp(sum of nats / sum of tokens), bits per byte, sum of nats / (ln 2 sum of bytes), and
the mean of BERTScore.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.evaluation.intervals import (
    OF_RIGHT_OR_WRONG,
    Interval,
    Sums,
    Value,
    by_row,
    draws,
    mcnemar,
    mean,
    middle,
    randomization,
    row_sums,
    statistics,
)

LEVEL, RESAMPLES = 0.95, 2000
LOWER_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Measure:
    """A metric of several runs on the same rows."""

    metric: str
    runs: dict[str, Sums]
    """The sums of each run by its id."""
    value: Value
    rows: int
    right: dict[str, Tensor] | None = None
    """Which rows each run has right, float64 [rows]; None for a metric of another kind."""

    @property
    def better(self) -> str:
        """Which scores are better, "higher" or "lower"."""
        return "lower" if self.metric in LOWER_IS_BETTER else "higher"


class Difference(NamedTuple):
    """The second group's score minus the first one's."""

    interval: Interval
    p_value: float

    @property
    def within_noise(self) -> bool:
        """Whether other rows or other seeds could well turn it round."""
        low, high = self.interval.low, self.interval.high
        return self.p_value > 1 - LEVEL or not (low > 0 or high < 0)


def measure_texts(metric: str, predictions: dict[str, list[str]], references: list[str]) -> Measure:
    """Return a metric of the texts of runs, by their ids."""
    sums, value = statistics(list(predictions.values()), references, metric)
    right = None
    if metric in OF_RIGHT_OR_WRONG:
        right = {run: by_row(texts, references, metric) for run, texts in predictions.items()}
    return Measure(metric, dict(zip(predictions, sums, strict=True)), value, len(references), right)


def together(measures: Sequence[Measure]) -> Measure:
    """Return a metric of the runs of several measures of it, on the same rows."""
    first = measures[0]
    runs = {run: sums for each in measures for run, sums in each.runs.items()}
    right = None
    if first.right is not None:
        right = {run: rows for each in measures for run, rows in (each.right or {}).items()}
    return Measure(first.metric, runs, first.value, first.rows, right)


def measure_losses(metric: str, losses: dict[str, list[list[float]]]) -> Measure:
    """Return perplexity or bits_per_byte of runs, from [nats, tokens, bytes] of each row."""
    rows = {run: torch.tensor(values, dtype=torch.float64) for run, values in losses.items()}
    value = _perplexity if metric == "perplexity" else _bits_per_byte
    return Measure(metric, {run: row_sums(t) for run, t in rows.items()}, value, _rows(rows))


def measure_means(metric: str, values: dict[str, list[float]]) -> Measure:
    """Return the mean of a number of each row, of runs by their ids."""
    rows = {
        run: torch.tensor([[value, 1.0] for value in of_run], dtype=torch.float64)
        for run, of_run in values.items()
    }
    return Measure(metric, {run: row_sums(t) for run, t in rows.items()}, mean, _rows(rows))


def pooled(measure: Measure, runs: Sequence[str]) -> Interval:
    """Return the mean score of runs that differ in their seed, with its interval."""
    low, high = _ends(measure, len(runs), lambda weights: _scores(measure, runs, weights))
    return Interval(_score(measure, runs), low, high)


def difference(measure: Measure, pairs: Sequence[tuple[str, str]]) -> Difference:
    """Compare two groups of runs, given as (first, second) for each seed."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    value = _score(measure, second) - _score(measure, first)
    if not math.isfinite(value):
        return Difference(Interval(value, math.nan, math.nan), 1.0)

    def gained(weights: Tensor) -> Tensor:
        return _scores(measure, second, weights) - _scores(measure, first, weights)

    low, high = _ends(measure, len(pairs), gained)
    return Difference(Interval(value, low, high), _p_value(measure, pairs, value))


def _p_value(measure: Measure, pairs: Sequence[tuple[str, str]], value: float) -> float:
    """Return how often chance alone gives a difference as large."""
    if measure.right is not None and len(pairs) == 1:
        [(one, two)] = pairs
        return mcnemar(measure.right[one], measure.right[two])
    sums = [(measure.runs[one], measure.runs[two]) for one, two in pairs]
    return randomization(sums, measure.value, value, measure.rows, RESAMPLES, seed=0)


def _ends(measure: Measure, seeds: int, scores: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the ends of the interval of the mean over the seeds, both rows and seeds drawn.

    `scores` takes weights of the rows, [R, rows] -> [seeds, R].
    """
    drawn = []
    generator = torch.Generator().manual_seed(0)
    for weights in draws(measure.rows, RESAMPLES, seed=0):
        shares = _shares(seeds, len(weights), generator)
        drawn.append((scores(weights) * shares).sum(0))
    return middle(torch.cat(drawn), LEVEL)


def _score(measure: Measure, runs: Sequence[str]) -> float:
    """Return the mean score of runs on all rows."""
    whole = torch.ones(1, measure.rows, dtype=torch.float64)
    return float(_scores(measure, runs, whole).mean())


def _scores(measure: Measure, runs: Sequence[str], weights: Tensor) -> Tensor:
    """Return the scores of runs under weights of the rows, [R, rows] -> [runs, R]."""
    return torch.stack([measure.value(measure.runs[run](weights)) for run in runs])


def _shares(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Return the share that each seed has of each resample, float64 [seeds, resamples]."""
    chosen = torch.randint(count, (resamples, count), generator=generator)
    shares = torch.zeros(resamples, count, dtype=torch.float64)
    ones = torch.ones(resamples, count, dtype=torch.float64)
    return shares.scatter_add_(1, chosen, ones).T / count


def _rows(rows: dict[str, Tensor]) -> int:
    return len(next(iter(rows.values())))


def _perplexity(sums: Tensor) -> Tensor:
    return mean(sums).clamp(max=700).exp()  # beyond lies infinity


def _bits_per_byte(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 2].clamp(min=1) / math.log(2)
