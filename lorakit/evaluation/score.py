"""A model's own completions of rows, scored against theirs.

A completion takes the likeliest token each time, up to one token more than the longest completion
of the rows has: a text that goes on beyond every reference is wrong already.
"""

from array import array
from collections.abc import Sequence
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.data.encode import TODAY
from lorakit.data.instructions import as_chat_or_pair
from lorakit.data.schemas import Chat, Choice, Instruction, Judged, Labelled, Prompt, Row, Text
from lorakit.evaluation.metrics import check_usable, score
from lorakit.evaluation.share import ALL, Share
from lorakit.inference.generate import generate_batch
from lorakit.models.chat_template import Messages
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def score_rows(
    model: Decoder,
    tok: Tokenizer,
    rows: Sequence[Row],
    metrics: Sequence[str],
    batch_size: int,
    share: Share = ALL,
) -> dict[str, float]:
    """Return metrics by name (see metrics.py) of greedy completions of rows.

    `batch_size` rows are completed at a time. They are rows that `check_rows` has accepted. A
    process completes its `share` of them, and every process returns the scores of all.
    """
    return score_and_show(model, tok, rows, metrics, 0, batch_size, share)[0]


def score_and_show(
    model: Decoder,
    tok: Tokenizer,
    rows: Sequence[Row],
    metrics: Sequence[str],
    samples: int,
    batch_size: int,
    share: Share = ALL,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return metrics as `score_rows` does, and how the first `samples` rows were completed.

    A sample says the number of its row, the prompt, the reference and the completion, and the
    `label` of a row that has a good or a bad answer. Without metrics only those rows are completed.
    Metrics leave out rows whose answer is a bad one.
    """
    asked_for = rows if metrics else rows[:samples]
    if not len(asked_for):
        return {}, []
    predictions, references = predict_rows(model, tok, asked_for, batch_size, share)
    shown = [
        {"row": i, "prompt": asked(tok, rows[i])[0], "reference": reference, "completion": text}
        | _label(rows[i])
        for i, (text, reference) in enumerate(zip(predictions, references, strict=True))
        if i < samples
    ]
    if not metrics:
        return {}, shown
    good = [i for i, row in enumerate(rows) if not is_bad(row)]
    return score([predictions[i] for i in good], [references[i] for i in good], metrics), shown


def _label(row: Row) -> dict[str, bool]:
    return {"label": row.desirable} if isinstance(row, Judged) else {}


def is_bad(row: Row) -> bool:
    """Return whether a row says that its answer is a bad one, to which no model should come."""
    return isinstance(row, Judged) and not row.desirable


def predict_rows(
    model: Decoder, tok: Tokenizer, rows: Sequence[Row], batch_size: int, share: Share = ALL
) -> tuple[list[str], list[str]]:
    """Return greedy completions of rows that `check_rows` has accepted, and the rows' own.

    A process completes its `share` of the rows, and every process returns the texts of all.
    """
    pairs = [asked(tok, row) for row in rows]
    references = [reference for _, reference in pairs]
    predictions = generate_batch(
        model,
        tok,
        [_prompt_ids(tok, prompt) for prompt, _ in share.of(pairs)],
        max_new_tokens=1 + max(_length(tok, reference) for reference in references),
        batch_size=batch_size,
        progress=True,
    )
    return share.collect(predictions), references


def check_rows(model: Decoder, tok: Tokenizer, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Raise LorakitError if rows cannot be scored by `metrics`.

    A metric may be unknown, a row may have nothing to complete, and a prompt may be empty, or leave
    no room for the longest completion within the positions that the model is meant for.
    """
    check_usable(metrics)
    if not metrics:
        return
    new, lengths = 1, array("l")
    for row in rows:
        prompt, reference = asked(tok, row)
        new = max(new, 1 + _length(tok, reference))
        lengths.append(len(_prompt_ids(tok, prompt)))
    room = model.config.context_length - new
    for number, length in enumerate(lengths):
        if not 0 < length <= room:
            raise LorakitError(
                f"{rows[number].place}: to score completions of up to {new} tokens, a prompt must "
                f"have 1 to {room} tokens, not {length}"
            )


def check_good(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Raise LorakitError if metrics are wanted of rows whose answers are all bad ones."""
    if metrics and all(map(is_bad, rows)):
        raise LorakitError(f"{', '.join(metrics)}: every row has a bad answer, and none is scored")


def _prompt_ids(tok: Tokenizer, prompt: str | Messages) -> list[int]:
    """Return a prompt as the model is trained on it, the date in the template included."""
    if isinstance(prompt, str):
        return tok.encode(prompt)
    ids = tok.apply_chat_template(prompt, add_generation_prompt=True, strftime_now=TODAY.strftime)
    assert not isinstance(ids, str)  # it was tokenized
    return ids


def _length(tok: Tokenizer, completion: str) -> int:
    """Return the number of tokens of a completion, without the one for its end."""
    return len(tok.encode(completion, add_special_tokens=False))


def asked(tok: Tokenizer, row: Row) -> tuple[str | Messages, str]:
    """Return what the model is to continue, text or messages, and what it should say.

    In a chat it should say the last turn of the assistant. Raises LorakitError for a row without
    such an answer.
    """
    if isinstance(row, Choice):
        return asked(tok, row.chosen)
    if isinstance(row, Judged):
        return asked(tok, row.answer)
    if isinstance(row, Instruction):
        return asked(tok, as_chat_or_pair(row, chat=tok.chat_template is not None))
    if isinstance(row, Chat):
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        answers = turns and turns[-1] > 0 and row.messages[turns[-1]].get("content")
        if not answers or row.tools is not None or row.variables is not None:
            raise LorakitError(
                f"{row.place}: only a chat without tools and chat_template_kwargs that holds an "
                "answer in text to something is scored"
            )
        return row.messages[: turns[-1]], row.messages[turns[-1]]["content"]
    if isinstance(row, Text):
        raise LorakitError(f"{row.place}: plain text has no completion to score")
    if isinstance(row, Prompt | Labelled):
        what = "a prompt alone" if isinstance(row, Prompt) else "a text with a class"
        raise LorakitError(f"{row.place}: {what} has no completion to score by")
    return row.prompt, row.completion
