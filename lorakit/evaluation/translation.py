"""BLEU and chrF, computed by sacrebleu with its own settings, so that others can compare with them.

    bleu    BLEU up to 4-grams, tokenizer 13a, zero counts smoothed exponentially (Post 2018)
    chrf    chrF2: characters up to 6-grams without spaces, beta 2 (Popović 2015)

Both are in [0, 100]. They are scores of all texts together, not means over texts: n-grams are
counted over the whole list. `bleu_counts` and `chrf_counts` are what a row adds to these counts,
and `bleu_value` and `chrf_value` the scores of their sums, for intervals.py, which weighs the rows
in thousands of ways.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError

Texts = Sequence[str]
BLEU_ORDER, CHRF_ORDER = 4, 6


def check_sacrebleu() -> None:
    """Raise LorakitError if sacrebleu is not installed."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise LorakitError("bleu and chrf need sacrebleu; pip install 'lorakit[metrics]'") from None


def bleu(predictions: Texts, references: Texts) -> float:
    """Return the BLEU of all texts together, in [0, 100]."""
    from sacrebleu.metrics import BLEU

    value: float = BLEU().corpus_score(list(predictions), [list(references)]).score
    return value


def chrf(predictions: Texts, references: Texts) -> float:
    """Return the chrF2 of all texts together, in [0, 100]."""
    from sacrebleu.metrics import CHRF

    value: float = CHRF().corpus_score(list(predictions), [list(references)]).score
    return value


def bleu_counts(predictions: Texts, references: Texts) -> Tensor:
    """Return what each row adds to BLEU's counts: n-grams that match, n-grams, two lengths.

    Args:
        predictions: n texts.
        references: As many texts.

    Returns:
        Counts, float64 [n, 2 * 4 + 2].
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)  # of no effect on counts: it quiets a warning
    scores = [metric.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    rows = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]
    return torch.tensor(rows, dtype=torch.float64)


def bleu_value(sums: Tensor) -> Tensor:
    """Return BLEU in [0, 100] of sums of `bleu_counts`, [..., 2 * 4 + 2] -> [...].

    The i-th order without a match counts as half of the order before it that had none, the first
    one as half a match (exponential smoothing, Chen and Cherry 2014, method 3).
    """
    matches, totals = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    predicted, expected = sums[..., -2], sums[..., -1]
    smoothed = 0.5 ** (matches == 0).cumsum(-1)
    logs = (torch.where(matches == 0, smoothed, matches) / totals).log()
    brevity = (1 - expected / predicted).clamp(max=0)
    value = 100 * (brevity + logs.mean(-1)).exp()
    # without any match, or without an n-gram of the highest order, sacrebleu's score is 0
    return torch.where((matches.sum(-1) == 0) | (totals == 0).any(-1), 0.0, value)


def chrf_counts(predictions: Texts, references: Texts) -> Tensor:
    """Return what each row adds to chrF's counts: of each order predicted, expected and common.

    Args:
        predictions: n texts.
        references: As many texts.

    Returns:
        Counts, float64 [n, 3 * 6].
    """
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        ours, theirs = "".join(prediction.split()), "".join(reference.split())
        row = []
        for order in range(1, CHRF_ORDER + 1):
            found, wanted = _ngrams(ours, order), _ngrams(theirs, order)
            # where the reference has no n-gram of an order, the prediction's do not count
            row += [found.total() if wanted else 0, wanted.total(), (found & wanted).total()]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def chrf_value(sums: Tensor) -> Tensor:
    """Return chrF2 in [0, 100] of sums of `chrf_counts`, [..., 3 * 6] -> [...].

    Precision and recall are means over the orders that both sides have.
    """
    predicted, expected, common = sums.reshape(*sums.shape[:-1], CHRF_ORDER, 3).unbind(-1)
    counts = (predicted > 0) & (expected > 0)
    orders = counts.sum(-1).clamp(min=1)
    precision = torch.where(counts, common / predicted, 0.0).sum(-1) / orders
    recall = torch.where(counts, common / expected, 0.0).sum(-1) / orders
    divisor = 4 * precision + recall
    return torch.where(divisor > 0, 100 * 5 * precision * recall / divisor, 0.0)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
