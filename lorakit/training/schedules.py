"""Learning-rate schedules: a linear warm-up, then one of seven curves, as transformers has them.

W is the number of steps of the warm-up. After it `done` goes from 0 to 1 at the end of the run:

    constant, constant_with_warmup   peak
    linear                           peak (1 - done)
    cosine                           peak (1 + cos(pi done)) / 2
    cosine_with_min_lr               as cosine, but from peak to min_lr_ratio peak
    cosine_with_restarts             num_cycles times cosine, each from peak to 0
    inverse_sqrt                     peak sqrt(W / step); without a warm-up
                                     peak sqrt(10,000 / (10,000 + step))

The rates of the warm-up are peak / W, 2 peak / W and so on to peak. So the first step learns
something, which in transformers it does not. A rate is a function of the step alone, and a
checkpoint saves nothing of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.training import SCHEDULES, TrainConfig


def learning_rate(
    kind: str,
    step: int,
    total: int,
    peak: float,
    warmup_ratio: float = 0.0,
    *,
    warmup_steps: int | None = None,
    min_lr_ratio: float = 0.0,
    num_cycles: int = 1,
) -> float:
    """Return the learning rate of a step, by a formula of the module's docstring.

    Args:
        kind: The name of the schedule.
        step: The number of the step, from 0 to total - 1.
        total: The number of steps of the run.
        peak: The largest rate.
        warmup_ratio: The steps of the warm-up as a part of all steps; W is rounded up.
        warmup_steps: W itself; None takes warmup_ratio.
        min_lr_ratio: The last rate of cosine_with_min_lr, as a part of peak.
        num_cycles: How often cosine_with_restarts goes down.

    Returns:
        The rate, above 0 and at most peak.

    Raises:
        LorakitError: There is no schedule of that name.
    """
    if kind not in SCHEDULES:
        raise LorakitError(
            f"no schedule is called {kind!r}{nearest(kind, SCHEDULES)}; there are "
            f"{', '.join(SCHEDULES)}"
        )
    warmup = math.ceil(warmup_ratio * total) if warmup_steps is None else warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * (1 - done)
    if kind == "cosine":
        return peak * _half_cosine(done)
    if kind == "cosine_with_min_lr":
        return peak * (_half_cosine(done) * (1 - min_lr_ratio) + min_lr_ratio)
    if kind == "cosine_with_restarts":
        return peak * _half_cosine(num_cycles * done % 1)
    if kind == "inverse_sqrt":
        scale = warmup or 10_000
        return peak / math.sqrt((step - warmup + scale) / scale)
    return peak


def scheduled_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the rate of step 1, 2, ... to total by the schedule of a config."""
    return learning_rate(
        config.lr_scheduler_type,
        step - 1,
        total,
        config.peak_learning_rate,
        config.warmup_ratio,
        warmup_steps=config.warmup_steps,
        min_lr_ratio=config.min_lr_ratio,
        num_cycles=config.num_cycles,
    )


def _half_cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


class Rates(Sequence[list[float]]):
    """The rates of every group in steps of a run, each computed when it is asked for.

    Args:
        steps: The numbers of the steps.
        rate: The scheduled rate of a step, by its number.
        shares: The share of it that each group takes.
    """

    def __init__(self, steps: range, rate: Callable[[int], float], shares: Sequence[float]):
        self.steps, self.rate, self.shares = steps, rate, list(shares)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: Any) -> Any:
        rate = self.rate(self.steps[i])
        return [rate * share for share in self.shares]
