"""Training rows: from text with the fields `prompt` and `completion` to token ids and labels.

    input_ids   prompt ... | completion ... | end token
    labels      -100   ... | completion ... | end token

Prompt and completion are tokenized apart, so that the cut between them is where the rows put it,
and where generation will put it. The end token is labelled by its place, not its id: a model that
pads with its end token still learns to stop.
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import LorakitError, nearest
from .tokenizer import Tokenizer

log = logging.getLogger("lorakit")

IGNORE = -100
FIELDS = ("prompt", "completion")


class Row(NamedTuple):
    """A text row and where it came from ("train.jsonl line 3", "row 3")."""

    prompt: str
    completion: str
    place: str


class Example(NamedTuple):
    input_ids: list[int]
    labels: list[int]


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a JSONL file, or of any iterable of mappings; other fields are ignored.

    Raises LorakitError for a missing file, a line that is no JSON object, a row without both fields
    as non-empty completion text, or no rows at all.
    """
    name = f"{source}" if isinstance(source, (str, Path)) else "data"
    rows = [_row(value, place) for value, place in _values(source)]
    if not rows:
        raise LorakitError(f"{name} holds no rows")
    return rows


def _values(source: str | Path | Iterable) -> Iterator[tuple[Any, str]]:
    if not isinstance(source, (str, Path)):
        for i, value in enumerate(source):
            yield value, f"row {i}"
        return
    path = Path(source).expanduser()
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115, closed below
    except FileNotFoundError:
        raise LorakitError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise LorakitError(f"{path} is a directory; a JSONL file is wanted") from None
    except ValueError as error:  # a null byte
        raise LorakitError(f"{source!r} is no path: {error}") from None
    with file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path} line {number}"), f"{path} line {number}"
        except UnicodeDecodeError as error:
            raise LorakitError(f"{path} is not UTF-8 text: {error}") from None


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LorakitError(f"{place} is not valid JSON: {error}") from None


def _row(value: Any, place: str) -> Row:
    if isinstance(value, Row):
        return value
    if not isinstance(value, Mapping):
        raise LorakitError(
            f"{place} must be an object with 'prompt' and 'completion', not {value!r}"
        )
    for name in FIELDS:
        if name not in value:
            raise LorakitError(f"{place}: field {name!r} is missing{nearest(name, value)}")
        if not isinstance(value[name], str):
            raise LorakitError(f"{place}: field {name!r} must be text, not {value[name]!r}")
    if not value["completion"]:
        raise LorakitError(f"{place}: the completion is empty, there is nothing to learn")
    return Row(value["prompt"], value["completion"], place)


def encode_rows(
    rows: Iterable[Row], tok: Tokenizer, *, max_seq_length: int, over_length: str = "truncate"
) -> list[Example]:
    """Token ids and labels of rows, at most `max_seq_length` tokens each.

    A longer row is, by `over_length`: "truncate": cut at the start of the prompt (its first special
    tokens stay), and at the end of the completion only if that alone is too long; "drop": left out;
    "raise": an error. Raises LorakitError too if every row is dropped.
    """
    examples, rows, long = [], list(rows), 0
    end = [] if tok.eos_token_id is None else [tok.eos_token_id]
    if not end:
        log.warning("lorakit: the tokenizer has no end token; the model will not learn to stop")
    for row in rows:
        try:
            prompt = tok.encode(row.prompt)
            completion = tok.encode(row.completion, add_special_tokens=False) + end
        except LorakitError as error:
            raise LorakitError(f"{row.place}: {error}") from None
        length = len(prompt) + len(completion)
        if length > max_seq_length:
            long += 1
            if over_length == "raise":
                raise LorakitError(
                    f"{row.place} has {length} tokens, more than max_seq_length={max_seq_length}; "
                    "raise it, or set over_length to truncate or drop"
                )
            if over_length == "drop":
                continue
            start = len(prompt) - len(tok.encode(row.prompt, add_special_tokens=False))
            before = max(start, 1)  # a label needs a token before it
            completion = completion[: max_seq_length - before]
            room = max_seq_length - start - len(completion)
            prompt = prompt[:start] + prompt[len(prompt) - room :]
        if len(prompt) + len(completion) < 2:
            raise LorakitError(f"{row.place} has one token; there is no next one to learn")
        examples.append(Example(prompt + completion, [IGNORE] * len(prompt) + completion))
    if long and examples:
        done = "dropped" if over_length == "drop" else "truncated"
        log.warning(
            "lorakit: %d of %d rows are longer than max_seq_length=%d and were %s",
            long,
            len(rows),
            max_seq_length,
            done,
        )
    if not examples:
        raise LorakitError(
            f"all {len(rows)} rows are longer than max_seq_length={max_seq_length} and were dropped"
        )
    return examples


def batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of one epoch's batches: shuffled, yet rows of like length together.

    Rows are shuffled, sorted by length within groups of 16 batches, cut, and the batches shuffled:
    the order is random across groups, while a batch holds little padding. Depends on seed and epoch
    only.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    group = 16 * batch_size
    cut = []
    for i in range(0, len(order), group):
        chunk = sorted(order[i : i + group], key=lengths.__getitem__)
        cut += [chunk[j : j + batch_size] for j in range(0, len(chunk), batch_size)]
    rng.shuffle(cut)
    return cut


def collate(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Examples padded on the right: input_ids and labels, int64 [B, longest].

    The padding is token 0: no real token sees it, and its labels do not count.
    """
    longest = max(len(e.input_ids) for e in examples)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    ids = torch.tensor([pad(e.input_ids, 0) for e in examples])
    labels = torch.tensor([pad(e.labels, IGNORE) for e in examples])
    return ids, labels


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    packs, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for j, free in enumerate(room):
            if free >= lengths[i]:
                packs[j].append(i)
                room[j] -= lengths[i]
                break
        else:
            packs.append([i])
            room.append(budget - lengths[i])
    return packs


def collate_packed(examples):
    ids = torch.tensor([[i for e in examples for i in e.input_ids]])
    labels = torch.tensor([[i for e in examples for i in e.labels]])
    bounds = torch.tensor([0] + [len(e.input_ids) for e in examples]).cumsum(0).int()
    return ids, labels, bounds
