"""The names of the metrics that completions are scored by."""

from collections.abc import Iterable

from lorakit.config.errors import LorakitError, nearest

METRICS = (
    "accuracy",
    "macro_f1",
    "weighted_f1",
    "exact_match",
    "partial_match",
    "entity_f1",
    "rouge_l",
    "bleu",
    "chrf",
)


def check_metrics(names: Iterable[str]) -> None:
    """Raise LorakitError, with the nearest valid name, unless each is one of METRICS."""
    for name in names:
        if name not in METRICS:
            raise LorakitError(
                f"unknown metric {name!r}{nearest(name, METRICS)}; beside loss and perplexity "
                f"there are {', '.join(METRICS)}"
            )
