"""What a head for classes says of texts: a class with its probability, or a number."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from lorakit.config.errors import LorakitError, check
from lorakit.data.encode import Encoder
from lorakit.data.examples import Examples
from lorakit.data.formats import make_row
from lorakit.data.schemas import Labelled, Row
from lorakit.evaluation.classes import outputs_of
from lorakit.models.classifier import classifier_in
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer

Asked = str | list[Mapping[str, Any]] | Mapping[str, Any]


class Prediction(NamedTuple):
    """What a head says of a text."""

    label: str | None
    """The likeliest class; None of a head that tells a number."""
    score: float
    """The probability of that class, or the number."""
    scores: dict[str, float]
    """The probability of every class by its name; empty of a number."""


def predict(
    model: Decoder,
    tok: Tokenizer,
    rows: Iterable[Asked],
    *,
    batch_size: int = 8,
    max_seq_length: int = 1024,
) -> list[Prediction]:
    """Return what a model with a head for classes says of texts.

    Args:
        model: The model, with or without an adapter.
        tok: The model's tokenizer.
        rows: Texts, chats as lists of messages, or rows of format classification, perhaps without
            a label.
        batch_size: Rows in a batch.
        max_seq_length: The most tokens of a row. A longer text loses its end, a chat its start.

    Returns:
        A prediction for each, in their order. The reward of a reward model is a number. It reads
        texts as its training does, with the end token behind them, and chats with an answer.

    Raises:
        LorakitError: The model has no head for classes, a row cannot be read, `rows` is one text,
            or a number is below 1.
    """
    head = classifier_in(model, "predict")
    check(not isinstance(rows, str | Mapping), "predict: rows is one row; put it into a list")
    check(batch_size > 0, "predict: batch_size must be at least 1")
    asked = [_row(row, f"row {i}") for i, row in enumerate(rows)]
    if not asked:
        return []
    # a reward model learned from answers, with their end tokens
    told: list[Row] = [row.text if head.classifier.rewards else row for row in asked]
    encoder = Encoder(tok, max_seq_length=max_seq_length, train_on="last_turn")
    examples = Examples(told, encoder)
    tok.check_fits([examples.largest_id], model.config.vocab_size)
    outputs = outputs_of(head, examples, batch_size)[:, 0]
    if head.classifier.regression:
        return [Prediction(None, number, {}) for number in outputs[:, 0].tolist()]
    found = []
    for probabilities in torch.softmax(outputs, -1).tolist():
        scores = dict(zip(head.classifier.labels, probabilities, strict=True))
        label = max(scores, key=scores.__getitem__)
        found.append(Prediction(label, scores[label], scores))
    return found


def _row(asked: Any, place: str) -> Labelled:
    """Return what is asked as a row of format classification, whose label nobody reads."""
    if isinstance(asked, Labelled):
        return asked
    if isinstance(asked, str):
        asked = {"text": asked}
    elif isinstance(asked, list):
        asked = {"messages": asked}
    if not isinstance(asked, Mapping):
        raise LorakitError(f"{place} must be text, messages or fields, not {asked!r:.60}")
    row = make_row({**asked, "label": "?"}, place, "classification")
    assert isinstance(row, Labelled)
    return row
