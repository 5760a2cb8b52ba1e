"""A model's own completions of rows, and the file that keeps them.

The file is JSONL, one row a line:

    {"prompt": "2 plus 3 is ", "reference": "5.", "prediction": "5."}

`prompt` is a text, or the messages of a chat. So scores can be computed again, and compared with
those of another model, without computing the texts once more.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.config.errors import LorakitError, check
from lorakit.data.examples import Examples
from lorakit.data.rows import RowSource, read_rows
from lorakit.data.values import parse_json
from lorakit.evaluation.score import asked, check_rows, predict_rows
from lorakit.files.local import as_path, read_text, write_text
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


class Completion(NamedTuple):
    """What a model was asked, what it should say, and what it said."""

    prompt: str | list[dict[str, Any]]
    """The prompt: a text, or the messages of a chat."""
    reference: str
    """The completion that the row has."""
    prediction: str
    """The completion that the model wrote."""


def complete_rows(
    model: Decoder, tok: Tokenizer, data: RowSource | Examples, *, batch_size: int = 8
) -> list[Completion]:
    """Let a model complete rows greedily, each after its whole prompt.

    A completion has at most one token more than the longest one of the rows.

    Args:
        model: The model, with or without an adapter.
        tok: The model's tokenizer.
        data: A file of rows or an iterable of them, as `read_rows` takes it, or what `encode_rows`
            made of them.
        batch_size: Rows in a batch.

    Returns:
        A completion for each row, in their order.

    Raises:
        LorakitError: The rows cannot be read, one of them has nothing to complete, or its prompt
            leaves no room for a completion.
    """
    check(batch_size > 0, "complete_rows: batch_size must be at least 1")
    rows = data.rows if isinstance(data, Examples) else read_rows(data)
    check(len(rows) > 0, "complete_rows: there are no rows")
    check_rows(model, tok, rows, ["exact_match"])
    predictions, _ = predict_rows(model, tok, rows, batch_size)
    pairs = (asked(tok, row) for row in rows)
    return [
        Completion(prompt, reference, prediction)
        for (prompt, reference), prediction in zip(pairs, predictions, strict=True)
    ]


def write_completions(path: str | Path, completions: Iterable[Completion]) -> Path:
    """Write completions to a JSONL file.

    Args:
        path: The file, which is replaced if it is there.
        completions: What `complete_rows` returns.

    Returns:
        The path of the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in completions)
    write_text(path, "".join(lines))
    return path


def read_completions(path: str | Path) -> list[Completion]:
    """Read completions from a JSONL file that `write_completions` has written.

    Args:
        path: The file.

    Returns:
        The completions, in their order.

    Raises:
        LorakitError: The file is missing, or a line of it holds no completion.
    """
    path = as_path(path)
    found = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        place = f"{path} line {number}"
        values = parse_json(line, place)
        if not isinstance(values, dict) or not (
            isinstance(values.get("reference"), str) and isinstance(values.get("prediction"), str)
        ):
            raise LorakitError(
                f"{place}: a completion has a text as reference and one as prediction"
            )
        found.append(
            Completion(values.get("prompt", ""), values["reference"], values["prediction"])
        )
    return found
