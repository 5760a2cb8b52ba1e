"""BERTScore (Zhang et al. 2020, arXiv:1904.09675) over the hidden states of a model.

Each token is the hidden state that a model has at its place. A token of one text is matched with
the token of the other that it is most like, by the cosine:

    recall    = sum over reference tokens x of  w(x) max over prediction tokens y of cos(x, y)
    precision = sum over prediction tokens y of w(y) max over reference tokens x of cos(x, y)
    F1        = 2 precision recall / (precision + recall)

The weights w sum to 1 in a text. They are equal, or follow idf(x) = log((n + 1) / (d + 1)), where
d of the n references hold the token.

The published numbers are of encoders such as RoBERTa, which transformers computes (encoder.py). A
decoder is computed here. It sees what is to the left of a token alone, and its special tokens, such
as BOS, are read and not matched. Numbers of one model and layer compare with each other alone.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError, check
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import Example
from lorakit.evaluation.encoder import TextEncoder
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


class _Reads(Protocol):
    """What `bert_score` asks of a model and its tokenizer; `TextEncoder` has it too."""

    layers: int
    width: int
    unmatched: set[int]  # tokens that are read alone
    silent: set[int]  # tokens that may be matched, and weigh nothing

    def encode(self, text: str) -> list[int]: ...

    def states(self, rows: Sequence[list[int]], layer: int | None) -> Tensor: ...


def bert_score(
    model: Decoder | TextEncoder,
    tok: Tokenizer | None,
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
        model: The model whose hidden states are compared, or what `load_encoder` returns.
        tok: The model's tokenizer; None of an encoder, which has its own.
        predictions: Texts that a model wrote.
        references: As many texts that it should have written.
        layer: The block after which the hidden states are taken, from 1 on; None takes the final
            ones, of a decoder normalized. bert-score takes 17 of roberta-large.
        idf: Weigh tokens by how few of the references hold them.
        baseline: What unrelated texts score, as precision, recall and F1. Scores s become
            (s - b) / (1 - b). None leaves them as they are.
        batch_size: Texts in a batch.

    Returns:
        Precision, recall and F1 of each pair.

    Raises:
        LorakitError: The lists differ in length or are empty, the model has no such layer, or no
            tok, a text is longer than a decoder is meant for, or baseline has a number from 1 on.
    """
    check(batch_size > 0, "bert_score: batch_size must be at least 1")
    check_texts(predictions, references)
    reader = _reader(model, tok)
    if layer is not None and not 1 <= layer <= reader.layers:
        raise LorakitError(
            f"bert_score: layer is {layer}; the model has layers 1 to {reader.layers}"
        )
    if baseline is not None and max(baseline) >= 1:
        raise LorakitError(f"bert_score: baseline is {baseline}; each must be below 1")
    encoded = {text: reader.encode(text) for text in [*predictions, *references]}
    weights = _weights(references, encoded) if idf else None
    kept = {
        text: [i for i, token in enumerate(ids) if token not in reader.unmatched]
        for text, ids in encoded.items()
    }
    states = _states(reader, encoded, kept, layer, batch_size)
    shares = {
        text: _shares([encoded[text][i] for i in places], weights, reader.silent)
        for text, places in kept.items()
    }
    rows = []
    for pair in zip(predictions, references, strict=True):
        rows.append(match(*(states[text] for text in pair), *(shares[text] for text in pair)))
    scores = torch.tensor(rows, dtype=torch.float32)
    if baseline is not None:
        floor = torch.tensor(baseline)
        scores = (scores - floor) / (1 - floor)
    return BertScore(*scores.unbind(1))


def _reader(model: Decoder | TextEncoder, tok: Tokenizer | None) -> _Reads:
    if isinstance(model, TextEncoder):
        return model
    if tok is None:
        raise LorakitError("bert_score: tok is the tokenizer of the model; encoders have one")
    return _DecoderReader(model, tok)


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
        The three numbers; all are 0 if a text has no token that weighs anything.
    """
    if not of_predicted.any() or not of_expected.any():
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


def _shares(tokens: list[int], weights: dict[int | None, float] | None, silent: set[int]) -> Tensor:
    """Return weights of tokens that sum to 1; equal ones if every token is in every reference."""
    equal = torch.tensor([0.0 if token in silent else 1.0 for token in tokens])
    shares = equal
    if weights is not None:
        shares = equal * torch.tensor([weights.get(token, weights[None]) for token in tokens])
        shares = shares if shares.any() else equal
    return shares / shares.sum() if shares.any() else shares


def _states(
    reader: _Reads,
    encoded: dict[str, list[int]],
    kept: dict[str, list[int]],
    layer: int | None,
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the hidden states of the kept tokens of each text, fp32 [tokens, H], on the host."""
    texts = sorted((text for text in encoded if encoded[text]), key=lambda t: len(encoded[t]))
    states = {text: torch.zeros(0, reader.width) for text in encoded}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        found = reader.states([encoded[text] for text in batch], layer).cpu()
        for text, of_text in zip(batch, found, strict=True):
            states[text] = of_text[kept[text]]
    return states


class _DecoderReader:
    """A decoder, whose special tokens are read and not matched."""

    def __init__(self, model: Decoder, tok: Tokenizer):
        self.model, self.tok = model, tok
        self.layers, self.width = model.config.num_hidden_layers, model.config.hidden_size
        added = tok.backend.get_added_tokens_decoder()
        self.unmatched = {token for token, each in added.items() if each.special}
        self.silent = set[int]()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises LorakitError if there are too many."""
        ids = self.tok.encode(text)
        limit = self.model.config.context_length - self.model.beginning.length
        if len(ids) > limit:
            raise LorakitError(f"bert_score: a text has {len(ids)} tokens; the model reads {limit}")
        return ids

    @torch.no_grad()
    def states(self, rows: Sequence[list[int]], layer: int | None) -> Tensor:
        """Return the hidden states of rows of tokens, fp32 [B, T, H], padded on the right."""
        model, examples = self.model, [Example(row, row) for row in rows]
        mask = real_tokens(examples).to(model.device) if model.config.by_length else None
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
            ids = collate(examples)[0].to(model.device)
            hidden = model.hidden_states(ids, attention_mask=mask)
        finally:
            model.train(was_training)
            if hook is not None:
                hook.remove()
        return (taken.pop() if taken else hidden).float()
