"""Carried out of lorakit/optim.py."""

import math

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.training import SCHEDULES


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
    """The rate of step 0 <= step < total: a linear warm-up to `peak`, then by kind, as transformers
    has it. With `done` from 0 at the end of the warm-up W to 1 at `total`:

        constant, constant_with_warmup   peak
        linear                           peak (1 - done)
        cosine                           peak (1 + cos(pi done)) / 2
        cosine_with_min_lr               the same from peak to min_lr_ratio peak
        cosine_with_restarts             num_cycles of cosine, each from peak to 0
        inverse_sqrt                     peak sqrt(W / step); without a warm-up
                                         peak sqrt(10,000 / (10,000 + step))

    W is warmup_steps, or ceil(warmup_ratio * total). The rates of the warm-up are peak / W, 2 peak
    / W and so on to peak: the first step does something, which in transformers it does not.

    Raises LorakitError for another kind.
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


def _half_cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2
