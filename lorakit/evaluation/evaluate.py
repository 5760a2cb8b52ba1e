"""The loss of rows, and scores of what the model makes of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError, check
from lorakit.config.objectives import PAIRS, Objective
from lorakit.config.training import OverLength, TrainConfig, TrainOn
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import (
    IGNORE,
    AnyExample,
    JudgedExample,
    LabelledExample,
    PairExample,
)
from lorakit.data.examples import Examples, encode_rows
from lorakit.data.rows import RowSource
from lorakit.evaluation.classes import check_labels, head_scores
from lorakit.evaluation.score import check_rows, score_rows
from lorakit.evaluation.share import ALL, Share
from lorakit.models.classifier import Classifier
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def evaluate(
    model: Decoder,
    tok: Tokenizer,
    data: RowSource | Examples,
    *,
    batch_size: int = 8,
    max_seq_length: int = 1024,
    over_length: OverLength = "truncate",
    train_on: TrainOn = "completion",
    metrics: str | Iterable[str] = (),
) -> dict[str, float]:
    """Return the mean loss of a model on rows, and scores of its own completions of them.

    A model with a head for classes has none: it is scored by the labels of rows, or as a reward
    model by which of two answers it finds the better one. Of a language model every row is
    completed greedily after its whole prompt, whatever over_length says.

    Args:
        model: The model, with or without an adapter.
        tok: The model's tokenizer.
        data: A file of rows or an iterable of them, as `read_rows` takes it, or what `encode_rows`
            made of them with the same settings.
        batch_size: Rows in a batch.
        max_seq_length: The most tokens of a row.
        over_length: What happens to a longer row, as `encode_rows` takes it.
        train_on: Which tokens are labels, as `encode_rows` takes it.
        metrics: The names of the metrics to score completions by: accuracy, macro_f1, weighted_f1,
            exact_match, partial_match, entity_f1, rouge_l, bleu, chrf. Without one, nothing is
            completed.

    Returns:
        "loss" in nats per label token, its "perplexity", "mean_token_accuracy", the share of labels
        that are the likeliest token, "entropy" of the predictions at the labels in nats, the
        numbers of "label_tokens" and "rows", and each metric by its name, as
        `lorakit.metrics.score` returns it. Of classes "loss", "accuracy", "macro_f1" and "rows";
        of numbers "loss", "mean_absolute_error", "pearson" and "rows"; of pairs "loss",
        "preference_accuracy", "reward_margin" and "rows".

    Raises:
        LorakitError: The rows cannot be read, encoded or scored, a metric is unknown, a prompt
            leaves no room for a completion, or batch_size is below 1.
    """
    check(isinstance(batch_size, int) and batch_size > 0, "evaluate: batch_size must be at least 1")
    config = TrainConfig(max_seq_length=max_seq_length, over_length=over_length, train_on=train_on)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if isinstance(model, Classifier):
        if metrics:
            raise LorakitError(
                "evaluate: metrics are of completions, and a model with a head for classes makes "
                "none; its accuracy comes without asking"
            )
        config = replace(config, objective=_objective(model.classifier, data))
        return head_scores(model, encode_for(model, tok, data, config), batch_size)
    examples = encode_for(model, tok, data, config)
    check_rows(model, tok, examples.rows, metrics)
    result = text_loss(model, examples, batch_size)
    return result | score_rows(model, tok, examples.rows, metrics, batch_size)


def _objective(head: ClassifierConfig, data: RowSource | Examples) -> Objective:
    """Return what a head for classes is scored by: a single number that says no more by pairs."""
    if isinstance(data, Examples):
        return "reward" if data.margins else "classification"
    return "reward" if head.rewards else "classification"


def encode_for(
    model: Decoder,
    tok: Tokenizer,
    rows: RowSource | Examples,
    config: TrainConfig,
    what: str = "the rows",
) -> Examples:
    """Return the examples of rows, which `model` can learn from with the objective of `config`.

    Raises LorakitError if they cannot be read or encoded, were encoded with other settings, hold a
    token outside of the model's vocabulary, or do not fit the objective; messages call them `what`.
    """
    names = ("max_seq_length", "over_length", "train_on")
    settings = {name: getattr(config, name) for name in names}
    if isinstance(rows, Examples):
        examples = rows
        for name, value in settings.items():
            made_with = getattr(examples.encoder, name)
            if made_with != value:
                raise LorakitError(
                    f"{what} were encoded with {name}={made_with!r}, and the config says "
                    f"{value!r}: encode them with its settings"
                )
    else:
        format = "classification" if config.objective == "classification" else None
        empty = config.skip_empty
        examples = encode_rows(rows, tok, format=format, skip_empty=empty, **settings)
    tok.check_fits([examples.largest_id], model.config.vocab_size)
    check_kind(examples, config, what)
    if model.config.classifier is not None:
        check_labels(model.config.classifier, examples)
    return examples


_WANTED = {"grpo": "prompt", "kto": "label", "classification": "class"}
"""What rows of an objective have; those of the others are pairs, or have an answer."""


def check_kind(examples: Sequence[AnyExample], config: TrainConfig, what: str) -> None:
    """Raise LorakitError unless examples, called `what`, fit the objective of `config`."""
    wanted = "pair" if config.pairs else _WANTED.get(config.objective, "answer")
    if _kind(examples) != wanted:
        raise LorakitError(
            f"objective {config.objective!r} does not fit {what}: {', '.join(PAIRS)} and reward "
            "need `chosen` and `rejected`, kto a `label` that is true or false, sft and "
            "distillation rows with one answer, perhaps read with `format: messages`, grpo prompts "
            "alone, and classification a `label`, read with `format: classification`"
        )


def _kind(examples: Sequence[AnyExample]) -> str:
    """Return what rows have: a "pair" of answers, an "answer", one with a "label", and so on."""
    first = examples[0]
    if isinstance(first, LabelledExample):
        return "class"
    if isinstance(first, PairExample):
        return "pair"
    if isinstance(first, JudgedExample):
        return "label"
    return "answer" if any(label != IGNORE for label in first.labels) else "prompt"


def text_loss(
    model: Decoder, examples: Examples, batch_size: int, share: Share = ALL
) -> dict[str, float]:
    """Return the mean loss of examples over their label tokens, as `evaluate` does.

    Every process returns it, and computes its `share` of the batches.
    """

    def summed_loss(batch: Sequence[AnyExample]) -> tuple[Tensor, ...]:
        rows = [example.answers[0] for example in batch]
        ids, labels = collate(rows)
        mask = real_tokens(rows).to(model.device) if model.config.by_length else None
        ids, statistics = ids.to(model.device), torch.zeros(2, device=model.device)
        loss, n = model.loss(ids, labels, attention_mask=mask, statistics=statistics)
        return loss, n, *statistics.unbind()

    sums = summed_over(model, examples, batch_size, summed_loss, share)
    total, count, right, entropy = sums
    mean = total / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),  # beyond lies infinity
        "mean_token_accuracy": right / count,
        "entropy": entropy / count,
        "label_tokens": int(count),
        "rows": len(examples),
    }


@torch.no_grad()
def summed_over(
    model: Decoder,
    examples: Examples,
    batch_size: int,
    sums_of: Callable[[Sequence[AnyExample]], tuple[Tensor, ...]],
    share: Share = ALL,
) -> list[float]:
    """Return the sums of each result [] of `sums_of` over batches of examples of like length.

    A process computes its `share` of the batches, and all add all results in the same order. The
    model is in evaluation mode meanwhile, and back in its mode afterwards.
    """
    found = list[list[float]]()
    ordered = sorted(range(len(examples)), key=examples.lengths.__getitem__)
    starts = share.of(range(0, len(ordered), batch_size))
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(starts, desc="evaluating", unit="batch", disable=None, leave=False):
            batch = [examples[i] for i in ordered[start : start + batch_size]]
            found.append([each.item() for each in sums_of(batch)])
    finally:
        model.train(was_training)
    # not by `sum`, whose bits depend on the version of Python
    return [reduce(add, each, 0.0) for each in zip(*share.collect(found), strict=True)]
