"""Rows as a model sees them, their loss, and scores of what the model makes of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lorakit.config.errors import LorakitError, check
from lorakit.config.training import TrainConfig
from lorakit.data.encode import Examples, PairExample, encode_rows
from lorakit.data.rows import read_rows
from lorakit.evaluation.score import check_rows, score_rows
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.losses.batch import summed_loss

Rows = str | Path | Iterable[Mapping[str, Any]]


def evaluate(
    model: Decoder,
    tok: Tokenizer,
    data: Rows,
    *,
    batch_size: int = 8,
    max_seq_length: int = 1024,
    over_length: str = "truncate",
    train_on: str = "completion",
    metrics: str | Iterable[str] = (),
) -> dict[str, float]:
    """Loss (nats per label token), perplexity, and the numbers of label tokens and rows.

    metrics: what to score the model's own completions by, of the names in metrics.py. Every row
    is completed greedily, after its whole prompt, whatever over_length says. Raises LorakitError
    for an unknown name, and a prompt that leaves no room for a completion.
    """
    check(isinstance(batch_size, int) and batch_size > 0, "evaluate: batch_size must be at least 1")
    config = TrainConfig(max_seq_length=max_seq_length, over_length=over_length, train_on=train_on)
    rows, metrics = read_rows(data), [metrics] if isinstance(metrics, str) else list(metrics)
    examples = encode(model, tok, rows, config)
    check_rows(model, tok, rows, metrics)
    result = loss_of(model, examples, batch_size)
    return result | score_rows(model, tok, rows, metrics, batch_size)


@torch.no_grad()
def loss_of(
    model: Decoder, examples: Examples, batch_size: int, config: TrainConfig | None = None
) -> dict[str, float]:
    """Of rows the mean loss over their label tokens; of pairs over the pairs, with `config`'s
    objective.
    """
    plain = TrainConfig() if config is None else config
    plain = replace(plain, packing=False, label_smoothing_factor=0.0, z_loss=0.0)
    total, count = 0.0, 0
    ordered = sorted(range(len(examples)), key=examples.lengths.__getitem__)
    starts = range(0, len(ordered), batch_size)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(starts, desc="evaluating", unit="batch", disable=None, leave=False):
            batch = [examples[i] for i in ordered[start : start + batch_size]]
            loss, n = summed_loss(model, batch, plain)
            total, count = total + loss.item(), count + n.item()
    finally:
        model.train(was_training)
    if plain.objective != "sft":
        pairs = len(examples)
        return {"loss": total / pairs, "preference_accuracy": count / pairs, "rows": pairs}
    mean = total / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),  # beyond lies infinity
        "label_tokens": count,
        "rows": len(examples),
    }


def encode(
    model: Decoder, tok: Tokenizer, rows: Rows, config: TrainConfig, what: str = "the rows"
) -> Examples:
    examples = encode_rows(
        read_rows(rows),
        tok,
        max_seq_length=config.max_seq_length,
        over_length=config.over_length,
        train_on=config.train_on,
    )
    tok.check_fits([examples.largest_id], model.config.vocab_size)
    if isinstance(examples[0], PairExample) != (config.objective != "sft"):
        raise LorakitError(
            f"objective {config.objective!r} does not fit {what}: dpo and orpo need `chosen` and "
            "`rejected`, sft rows without them"
        )
    return examples
