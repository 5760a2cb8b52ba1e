"""A model's own completions of rows, scored against theirs.

The completions are the likeliest tokens, one after another, up to one token more than the longest
completion of the rows has: what goes on beyond every reference is wrong already.
"""

from collections.abc import Sequence

from .config import LorakitError, check_metrics
from .data import Row
from .generation import generate_batch
from .metrics import score
from .model import Decoder
from .tokenizer import Tokenizer


def score_rows(
    model: Decoder, tok: Tokenizer, rows: Sequence[Row], metrics: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Metrics by name (see metrics.py) of greedy completions, `batch_size` rows at a time.

    Raises LorakitError for an unknown name, and as `check_rows` does.
    """
    if not metrics:
        return {}
    check_rows(model, tok, rows, metrics)
    predictions = generate_batch(
        model,
        tok,
        [row.prompt for row in rows],
        max_new_tokens=_longest(tok, rows),
        batch_size=batch_size,
        progress=True,
    )
    return score(predictions, [row.completion for row in rows], metrics)


def check_rows(model: Decoder, tok: Tokenizer, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Raise LorakitError for an unknown name of a metric, and for a row whose prompt is empty, or
    leaves no room for the longest completion within the positions the model is meant for.
    """
    check_metrics(metrics)
    if not metrics:
        return
    limit, new = model.config.context_length, _longest(tok, rows)
    for row in rows:
        length = len(tok.encode(row.prompt))
        if not 0 < length <= limit - new:
            raise LorakitError(
                f"{row.place}: to score completions of up to {new} tokens, a prompt must have 1 to "
                f"{limit - new} tokens, not {length}"
            )


def _longest(tok: Tokenizer, rows: Sequence[Row]) -> int:
    """Tokens of the longest completion, and one for the end."""
    return 1 + max(len(tok.encode(row.completion, add_special_tokens=False)) for row in rows)
