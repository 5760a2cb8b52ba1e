"""BERTScore (Zhang et al. 2020, arXiv:1904.09675) over the hidden states of a lorakit model.

Each token is the hidden state that a model has at its place. A token of one text is matched with
the token of the other that it is most like, by the cosine:

    recall    = sum over reference tokens x of  w(x) max over prediction tokens y of cos(x, y)
    precision = sum over prediction tokens y of w(y) max over reference tokens x of cos(x, y)
    F1        = 2 precision recall / (precision + recall)

The weights w sum to 1 in a text. They are equal, or follow idf(x) = log((n + 1) / (d + 1)), where
d of the n references hold the token. Special tokens, such as BOS, are read and not matched.

The published numbers are of encoders such as RoBERTa. A decoder sees what is to the left of a token
alone, so numbers of one model compare with numbers of the same model and layer, not with those.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError, check
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import Example
from lorakit.evaluation.metrics import check_texts
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer

Texts = Sequence[str]


class BertScore(NamedTuple):
    """The scores of pairs of texts; a text without tokens has 0."""

    precision: Tensor
    """How well the prediction's tokens are found in the reference, fp32 [n]."""
    recall: Tensor
    """How well the reference's tokens are found in the prediction, fp32 [n]."""
    f1: Tensor
    """The harmonic mean of both, fp32 [n]."""


def bert_score(
    model: Decoder,
    tok: Tokenizer,
    predictions: Texts,
    references: Texts,
    *,
    layer: int | None = None,
    idf: bool = False,
    baseline: tuple[float, float, float] | None = None,
    batch_size: int = 8,
) -> BertScore:
    """Score predictions by the similarity of their tokens to those of references.

    Args:
        model: The model whose hidden states are compared.
        tok: The model's tokenizer.
        predictions: Texts that a model wrote.
        references: As many texts that it should have written.
        layer: The block after which the hidden states are taken, from 1 on; None takes the final,
            normalized ones.
        idf: Weigh tokens by how few of the references hold them.
        baseline: What unrelated texts score, as precision, recall and F1. Scores s become
            (s - b) / (1 - b). None leaves them as they are.
        batch_size: Texts in a batch.

    Returns:
        Precision, recall and F1 of each pair.

    Raises:
        LorakitError: The lists differ in length or are empty, the model has no such layer, a text
            is longer than the model is meant for, or baseline holds a number from 1 on.
    """
    check(batch_size > 0, "bert_score: batch_size must be at least 1")
    check_texts(predictions, references)
    layers = model.config.num_hidden_layers
    if layer is not None and not 1 <= layer <= layers:
        raise LorakitError(f"bert_score: layer is {layer}; the model has layers 1 to {layers}")
    if baseline is not None and max(baseline) >= 1:
        raise LorakitError(f"bert_score: baseline is {baseline}; each must be below 1")
    encoded = {text: tok.encode(text) for text in [*predictions, *references]}
    special = {i for i, added in tok.backend.get_added_tokens_decoder().items() if added.special}
    weights = _weights(references, encoded) if idf else None
    kept = {t: [i for i, x in enumerate(ids) if x not in special] for t, ids in encoded.items()}
    states = _states(model, encoded, kept, layer, batch_size)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        shares = [
            _shares([encoded[text][i] for i in kept[text]], weights)
            for text in (prediction, reference)
        ]
        rows.append(match(states[prediction], states[reference], *shares))
    scores = torch.tensor(rows, dtype=torch.float32)
    if baseline is not None:
        floor = torch.tensor(baseline)
        scores = (scores - floor) / (1 - floor)
    return BertScore(*scores.unbind(1))


def match(
    predicted: Tensor, expected: Tensor, of_predicted: Tensor, of_expected: Tensor
) -> tuple[float, float, float]:
    """Return precision, recall and F1 of two texts.

    Args:
        predicted: The prediction's hidden states, fp32 [P, H].
        expected: The reference's hidden states, fp32 [R, H].
        of_predicted: The weights of the prediction's tokens, fp32 [P], which sum to 1.
        of_expected: The weights of the reference's tokens, fp32 [R], which sum to 1.

    Returns:
        The three numbers; all are 0 if a text has no tokens.
    """
    if not len(predicted) or not len(expected):
        return 0.0, 0.0, 0.0
    cosines = torch.nn.functional.normalize(predicted, dim=-1)
    cosines = cosines @ torch.nn.functional.normalize(expected, dim=-1).T
    precision = float(of_predicted @ cosines.amax(1))
    recall = float(of_expected @ cosines.amax(0))
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def _weights(references: Texts, encoded: dict[str, list[int]]) -> dict[int | None, float]:
    """Return the idf of each token of the references, and under None that of any other."""
    found = Counter(token for text in references for token in set(encoded[text]))
    rows = len(references)
    idf: dict[int | None, float] = {t: math.log((rows + 1) / (d + 1)) for t, d in found.items()}
    return idf | {None: math.log(rows + 1)}


def _shares(tokens: list[int], weights: dict[int | None, float] | None) -> Tensor:
    """Return weights of tokens that sum to 1; equal ones if every token is in every reference."""
    if weights is None:
        shares = torch.ones(len(tokens))
    else:
        shares = torch.tensor([weights.get(token, weights[None]) for token in tokens])
        if not shares.sum():
            shares = torch.ones(len(tokens))
    return shares / shares.sum()


@torch.no_grad()
def _states(
    model: Decoder,
    encoded: dict[str, list[int]],
    kept: dict[str, list[int]],
    layer: int | None,
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the hidden states of the kept tokens of each text, fp32 [tokens, H], on the host."""
    limit = model.config.context_length - model.beginning.length
    longest = max(map(len, encoded.values()))
    if longest > limit:
        raise LorakitError(f"bert_score: a text has {longest} tokens; the model reads {limit}")
    texts = sorted((text for text in encoded if encoded[text]), key=lambda t: len(encoded[t]))
    states = {text: torch.zeros(0, model.config.hidden_size) for text in encoded}
    taken: list[Tensor] = []
    hook = None
    if layer is not None:
        # A block returns x, and what the next one has to add to it.
        hook = model.model.layers[layer - 1].register_forward_hook(
            lambda _, inputs, outputs: taken.append(outputs[0] + outputs[1])
        )
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            rows = [Example(encoded[text], encoded[text]) for text in batch]
            mask = real_tokens(rows).to(model.device) if model.config.by_length else None
            hidden = model.hidden_states(collate(rows)[0].to(model.device), attention_mask=mask)
            if hook is not None:
                hidden = taken.pop()
            for text, of_text in zip(batch, hidden.float().cpu(), strict=True):
                states[text] = of_text[kept[text]]
    finally:
        model.train(was_training)
        if hook is not None:
            hook.remove()
    return states
