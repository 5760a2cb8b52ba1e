"""A model's own completions of rows, scored against theirs.

The completions are the likeliest tokens, one after another, up to one token more than the longest
completion of the rows has: what goes on beyond every reference is wrong already.
"""

from collections.abc import Sequence

from lorakit.config.errors import LorakitError
from lorakit.config.training import check_metrics
from lorakit.data.encode import ALPACA, ALPACA_WITH_INPUT, TODAY, as_chat
from lorakit.data.schemas import Chat, Choice, Instruction, Row, Text
from lorakit.evaluation.metrics import score
from lorakit.inference.generate import generate_batch
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def score_rows(
    model: Decoder, tok: Tokenizer, rows: Sequence[Row], metrics: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Metrics by name (see metrics.py) of greedy completions, `batch_size` rows at a time; of rows
    that `check_rows` has seen.
    """
    if not metrics:
        return {}
    asked = [_asked(tok, row) for row in rows]
    predictions = generate_batch(
        model,
        tok,
        [_prompt_ids(tok, prompt) for prompt, _ in asked],
        max_new_tokens=_longest(tok, rows),
        batch_size=batch_size,
        progress=True,
    )
    return score(predictions, [reference for _, reference in asked], metrics)


def check_rows(model: Decoder, tok: Tokenizer, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Raise LorakitError for an unknown name of a metric, and for a row whose prompt is empty, or
    leaves no room for the longest completion within the positions the model is meant for.
    """
    check_metrics(metrics)
    if not metrics:
        return
    limit, new = model.config.context_length, _longest(tok, rows)
    for row in rows:
        length = len(_prompt_ids(tok, _asked(tok, row)[0]))
        if not 0 < length <= limit - new:
            raise LorakitError(
                f"{row.place}: to score completions of up to {new} tokens, a prompt must have 1 to "
                f"{limit - new} tokens, not {length}"
            )


def _prompt_ids(tok: Tokenizer, prompt: str | list[dict]) -> list[int]:
    """As the model is trained on it, the date in the template included."""
    if isinstance(prompt, str):
        return tok.encode(prompt)
    return tok.apply_chat_template(prompt, add_generation_prompt=True, strftime_now=TODAY.strftime)


def _longest(tok: Tokenizer, rows: Sequence[Row]) -> int:
    """Tokens of the longest completion, and one for the end."""
    references = (_asked(tok, row)[1] for row in rows)
    return 1 + max(len(tok.encode(text, add_special_tokens=False)) for text in references)


def _asked(tok: Tokenizer, row: Row) -> tuple[str | list[dict], str]:
    """What the model is to continue, text or messages, and what it should say: of a chat the last
    turn of the assistant.
    """
    if isinstance(row, Choice):
        return _asked(tok, row.chosen)
    if isinstance(row, Instruction):
        if tok.chat_template is not None:
            return _asked(tok, as_chat(row))
        prompt = ALPACA_WITH_INPUT if row.input else ALPACA
        return prompt.format(instruction=row.instruction, input=row.input), row.output
    if isinstance(row, Chat):
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        answers = turns and turns[-1] > 0 and row.messages[turns[-1]].get("content")
        if not answers or row.tools is not None:
            raise LorakitError(
                f"{row.place}: only a chat without tools that holds an answer in text to something "
                "is scored"
            )
        return row.messages[: turns[-1]], row.messages[turns[-1]]["content"]
    if isinstance(row, Text):
        raise LorakitError(f"{row.place}: plain text has no completion to score")
    return row.prompt, row.completion
