"""Scores of generated texts against references: bleu and chrf in [0, 100], others in [0, 1].

`score` compares predictions with as many references, by the metrics of these names:

    exact_match    share of predictions that are the reference; space around it may differ
    partial_match  share of exact matches, and of texts that hold the reference's words in a row
    rouge_l        mean ROUGE-L F1 over words
    accuracy       share of predictions that are the reference's label
    macro_f1       mean over the labels that occur in either list of the F1 of each
    weighted_f1    mean of the same, weighted by how often each label is the reference
    entity_f1      F1 of entities, counted over all texts together
    bleu           BLEU of all texts together, as sacrebleu computes it
    chrf           chrF2 of all texts together, as sacrebleu computes it

A label is the whole text, without case and the space around it. Words are runs of letters and
digits in lower case.

    F1 = 2 tp / (2 tp + fp + fn), or 0 if nothing is counted, as scikit-learn and seqeval have it

Entities are read from one of two forms, which the reference decides:

    B-PER I-PER O B-LOC      one BIO tag per word; an entity is a type with its first and last place
    PER: Ann Lee; LOC: Rome  a type, a colon, and a text; semicolons or line breaks between entities

In the first form a word that is no tag counts as O, and an I- that continues no entity of its type
begins one (CoNLL's rule). In the second form an entity counts as often as it occurs, and a part
without a colon is no entity.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.metrics import check_metrics
from lorakit.evaluation.translation import bleu, check_sacrebleu, chrf

__all__ = [
    "accuracy",
    "bleu",
    "check_usable",
    "chrf",
    "entity_f1",
    "exact_match",
    "macro_f1",
    "mean_rouge_l",
    "partial_match",
    "rouge_l",
    "score",
    "weighted_f1",
]

Texts = Sequence[str]
TAG = re.compile(r"O|[BI]-\S+")


def score(predictions: Texts, references: Texts, metrics: str | Iterable[str]) -> dict[str, float]:
    """Return metrics of predictions[i] against references[i].

    Args:
        predictions: Texts that a model wrote.
        references: As many texts that it should have written.
        metrics: The name of a metric, or several names: accuracy, macro_f1, weighted_f1,
            exact_match, partial_match, entity_f1, rouge_l, bleu, chrf. The module's docstring
            defines them.

    Returns:
        The value of each metric by its name: of bleu and chrf in [0, 100], of others in [0, 1].

    Raises:
        LorakitError: A name is unknown, a metric needs a package that is missing, there are no
            texts, or the lists differ in length.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    check_usable(metrics)
    check_texts(predictions, references)
    return {name: SCORES[name](predictions, references) for name in metrics}


def check_usable(metrics: Iterable[str]) -> None:
    """Raise LorakitError unless each name is that of a metric whose package is installed."""
    metrics = list(metrics)
    check_metrics(metrics)
    if "bleu" in metrics or "chrf" in metrics:
        check_sacrebleu()


def check_texts(predictions: Texts, references: Texts) -> None:
    """Raise LorakitError unless there are as many predictions as references, and any."""
    if len(predictions) != len(references) or not references:
        raise LorakitError(
            f"score: {len(predictions)} predictions and {len(references)} references; give as many "
            "of one as of the other, and at least one"
        )


# ---- metrics of whole texts ----


def exact_match(predictions: Texts, references: Texts) -> float:
    """Return the share of pairs that are equal. Space around the texts may differ."""
    return _mean(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))


def partial_match(predictions: Texts, references: Texts) -> float:
    """Return the share of exact matches and of predictions that hold the reference's words.

    The words must stand in the prediction in a row.
    """
    return _mean(
        p.strip() == r.strip() or _holds(_words(p), _words(r))
        for p, r in zip(predictions, references, strict=True)
    )


def mean_rouge_l(predictions: Texts, references: Texts) -> float:
    """Return the mean of `rouge_l`."""
    return _mean(rouge_l(p, r) for p, r in zip(predictions, references, strict=True))


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L F1 (Lin 2004), from the longest common subsequence of the texts' words.

    Precision is its length over the number of words of the prediction, recall the same over the
    reference's, and F1 their harmonic mean. Words are runs of letters and digits in lower case.

    Args:
        prediction: The text that a model wrote.
        reference: The text that it should have written.

    Returns:
        F1 in [0, 1]; 0 for two texts without words.
    """
    a, b = _words(prediction), _words(reference)
    common = _longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _holds(words: list[str], part: list[str]) -> bool:
    places = range(len(words) - len(part) + 1)
    return bool(part) and any(words[i : i + len(part)] == part for i in places)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    best = [0] * (len(b) + 1)  # best[j] counts for the words of a so far and the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]


# ---- metrics of labels ----


def accuracy(predictions: Texts, references: Texts) -> float:
    """Return the share of pairs with one label: the text without case and space around it."""
    pairs = zip(predictions, references, strict=True)
    return _mean(label(p) == label(r) for p, r in pairs)


def macro_f1(predictions: Texts, references: Texts) -> float:
    """Return the mean F1 of the labels that occur, as predictions or references."""
    return _mean(_f1_of_labels(predictions, references).values())


def weighted_f1(predictions: Texts, references: Texts) -> float:
    """Return the mean F1 of the labels, each counted as often as it is the reference."""
    f1 = _f1_of_labels(predictions, references)
    return _mean(f1[label(r)] for r in references)


def label(text: str) -> str:
    """Return the label that a text is: without case and the space around it."""
    return text.strip().casefold()


def _f1_of_labels(predictions: Texts, references: Texts) -> dict[str, float]:
    pairs = [(label(p), label(r)) for p, r in zip(predictions, references, strict=True)]
    hits = Counter(p for p, r in pairs if p == r)
    predicted, true = Counter(p for p, _ in pairs), Counter(r for _, r in pairs)
    labels = sorted(predicted | true)  # sorted: the sum of floats is the same in every process
    return {name: _f1(hits[name], predicted[name], true[name]) for name in labels}


def _f1(hits: int, predicted: int, true: int) -> float:
    return 2 * hits / (predicted + true) if hits else 0.0


# ---- metrics of entities ----


def entity_f1(predictions: Texts, references: Texts) -> float:
    """Return the micro-averaged F1 of entities, read from BIO tags or from "type: text".

    Each reference decides which form it and its prediction have.
    """
    counts = map(entity_counts, predictions, references)
    hits, predicted, true = (sum(each) for each in zip(*counts, strict=True))
    return _f1(hits, predicted, true)


def entity_counts(prediction: str, reference: str) -> tuple[int, int, int]:
    """Return how many entities both texts hold, how many the prediction, and the reference."""
    tagged = all(map(TAG.fullmatch, reference.split()))
    read: Callable[[str], Counter[Any]] = _tagged_entities if tagged else _written_entities
    found, wanted = read(prediction), read(reference)
    return (found & wanted).total(), found.total(), wanted.total()


def _tagged_entities(text: str) -> Counter[tuple[str, int, int]]:
    """Count (type, first place, place after the last) of the entities in BIO tags."""
    entities, kind, start = [], None, 0
    for place, word in enumerate([*text.split(), "O"]):
        tag, _, name = word.partition("-") if TAG.fullmatch(word) else ("O", "", "")
        goes_on = tag == "I" and name == kind
        if kind is not None and not goes_on:
            entities.append((kind, start, place))
            kind = None
        if tag != "O" and not goes_on:
            kind, start = name, place
    return Counter(entities)


def _written_entities(text: str) -> Counter[tuple[str, str]]:
    """Count (type, text) of every "type: text" between semicolons or line breaks."""
    pairs = (part.partition(":") for part in re.split(r"[;\n]", text))
    stripped = ((kind.strip(), words.strip()) for kind, _, words in pairs)
    return Counter((kind, words) for kind, words in stripped if kind and words)


SCORES: dict[str, Callable[[Texts, Texts], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "weighted_f1": weighted_f1,
    "exact_match": exact_match,
    "partial_match": partial_match,
    "entity_f1": entity_f1,
    "rouge_l": mean_rouge_l,
    "bleu": bleu,
    "chrf": chrf,
}
