"""The examples of rows: encoded once, and kept as compactly as their tokens allow.

    memory                      the tokens of all examples, one after the other, int32
    ------------------------    --------------------------------------------------------
    starts   0  5  9  ...  ->   n | t t ~t ~t | n | ~t t ~t | n | ...
    lengths  4  3
    numbers  0  2               the number of each example's row

n is the number of tokens of the first answer, which is all of them unless the row has two. Of an
answer that is said to be good or bad n is below 0: -2 or -1. A token
t that is learned is written as it is, one that is not as ~t, which is below 0: so a token and its
label take 4 bytes together. Up to IN_MEMORY bytes stay in memory; more go to an unnamed temporary
file, in the directory that TMPDIR names. So the rows may be more than memory holds. A row costs 24
bytes of memory in any case, and no step of a run reads or encodes it again.
"""

import logging
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

from lorakit.config.errors import LorakitError
from lorakit.config.labels import Label
from lorakit.config.training import OverLength, TrainOn
from lorakit.data.encode import (
    IGNORE,
    AnyExample,
    Encoder,
    Example,
    JudgedExample,
    LabelledExample,
    PairExample,
)
from lorakit.data.rows import RowSource, place_of, unread_rows
from lorakit.data.schemas import Row
from lorakit.models.tokenizer import Tokenizer

log = logging.getLogger("lorakit")

IN_MEMORY = 1 << 26  # bytes; the tokens of about 60 MB of English text


class Examples(Sequence[AnyExample]):
    """The examples of rows, without those that `encoder` drops; a text may have several.

    `lengths` holds the number of tokens of each, `largest_id` the largest token id of all, and
    `labels` the class of each, if rows have one, or `margins` how much better the better answer is.
    Raises LorakitError if there is no room for the temporary file.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder):
        self.rows, self.encoder = rows, encoder
        self.largest_id = -1
        self.labels: list[Label] = []
        self.margins = array("d")
        self.numbers, self.lengths, self._starts = array("q"), array("l"), array("q")
        self._tokens = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._tokens.close)
        end = 0
        for number, row in enumerate(rows):
            for example in encoder.examples(row):
                length, tokens = _packed(example)
                self.numbers.append(number)
                self.lengths.append(length)
                self._starts.append(end)
                if isinstance(example, LabelledExample):
                    self.labels.append(example.label)
                if isinstance(example, PairExample):
                    self.margins.append(example.margin)
                self.largest_id = max(self.largest_id, max(example.input_ids))
                with _room():
                    end += self._tokens.write(tokens)
        with _room():
            self._tokens.flush()
        if any(beside and len(beside) < len(self) for beside in (self.labels, self.margins)):
            raise LorakitError("rows of several kinds are mixed; a run learns one kind")

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> AnyExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[AnyExample]: ...

    def __getitem__(self, index: int | slice) -> AnyExample | list[AnyExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # an IndexError, or a number from 0 on
        self._tokens.seek(self._starts[index])
        example = _unpacked(self._tokens.read(_SIZE * (1 + self.lengths[index])))
        if self.labels:
            return LabelledExample(example.answers[0], self.labels[index])
        if isinstance(example, PairExample):
            return example._replace(margin=self.margins[index])
        return example

    def place(self, index: int) -> str:
        """Return where the row of an example came from, as "train.jsonl line 3"."""
        return place_of(self.rows, self.numbers[index])


@contextmanager
def _room() -> Iterator[None]:
    """Turn an error of the temporary file into one sentence."""
    try:
        yield
    except OSError as error:
        raise LorakitError(
            f"the tokens of the rows cannot be written to {tempfile.gettempdir()}: "
            f"{error.strerror}; TMPDIR may name a directory with more room"
        ) from None


_SIZE = array("i").itemsize  # 4 bytes


def _packed(example: AnyExample) -> tuple[int, bytes]:
    """Return the number of tokens of an example, and its tokens and labels as bytes."""
    answers = example.answers
    numbers = array("i", [len(answers[0].input_ids)])
    if isinstance(example, JudgedExample):
        numbers[0] = -1 - example.desirable
    for ids, labels in answers:
        numbers.extend(~t if label == IGNORE else t for t, label in zip(ids, labels, strict=True))
    return len(numbers) - 1, numbers.tobytes()


def _unpacked(data: bytes) -> AnyExample:
    numbers = array("i", data).tolist()
    first, tokens = numbers[0], numbers[1:]
    if first < 0:
        return JudgedExample(_example(tokens), first == -2)
    chosen = _example(tokens[:first])
    if first == len(tokens):
        return chosen
    return PairExample(chosen, _example(tokens[first:]))


def _example(tokens: list[int]) -> Example:
    return Example([max(t, ~t) for t in tokens], [t if t >= 0 else IGNORE for t in tokens])


def encode_rows(
    rows: RowSource,
    tok: Tokenizer,
    *,
    max_seq_length: int,
    over_length: OverLength = "truncate",
    train_on: TrainOn = "completion",
    format: str | None = None,
    skip_empty: bool = False,
) -> Examples:
    """Return token ids and labels of rows, at most `max_seq_length` tokens each.

    The rows of a file are read, checked and encoded in one pass. Warnings of the logger "lorakit"
    count the rows that are longer, and the completions whose first token starts in the prompt. Such
    a token is learned whole.

    Args:
        rows: Rows, as `read_rows` returns or takes them.
        tok: The model's tokenizer. Its chat template renders chats and instructions.
        max_seq_length: The most tokens that an example may have.
        over_length: What happens to a longer row. "truncate" cuts it at the start of the prompt,
            where its first special tokens stay, and at the end of the completion only if that
            alone is too long; a chat loses its oldest exchanges first, and text is cut at its end.
            "drop" leaves the row out. "raise" raises an error. "split" cuts a text into examples
            of at most max_seq_length tokens, and raises an error for rows of other formats.
        train_on: Which tokens are labels. "completion" takes every turn of the assistant of a
            chat, "last_turn" only its last one, and "all" takes every token.
        format: The format of rows that are not read yet, as `read_rows` takes it.
        skip_empty: Leave out rows with an empty answer, as `read_rows` does.

    Returns:
        A sequence of examples, each with lists input_ids and labels, or with two such examples,
        chosen and rejected, for a row with two answers. Its `lengths` are their numbers of tokens,
        its `rows` the rows. `train` and `evaluate` take it as data.

    Raises:
        LorakitError: The rows cannot be read; a row starts with two BOS tokens, has no label, holds
            a message that the template leaves out, or would not teach the model to stop; every row
            is dropped; over_length or train_on is none of these words; or max_seq_length is below
            2.
    """
    encoder = Encoder(
        tok, max_seq_length=max_seq_length, over_length=over_length, train_on=train_on
    )
    if not encoder.end:
        log.warning("lorakit: the tokenizer has no end token; the model will not learn to stop")
    examples = Examples(unread_rows(rows, format=format, skip_empty=skip_empty), encoder)
    count = len(examples.rows)
    if not count:
        raise LorakitError("there are no rows to encode")
    if not examples:
        raise LorakitError(
            f"all {count} rows are longer than max_seq_length={max_seq_length} and were dropped"
        )
    _warn(encoder, count)
    return examples


def _warn(encoder: Encoder, count: int) -> None:
    """Say how many of `count` rows the encoder has cut, dropped or joined."""
    if encoder.long:
        log.warning(
            "lorakit: %d of %d rows are longer than max_seq_length=%d and were %s",
            encoder.long,
            count,
            encoder.max_seq_length,
            {"drop": "dropped", "split": "cut into several"}.get(encoder.over_length, "truncated"),
        )
    if encoder.joined:
        log.warning(
            "lorakit: %d completions begin within a token of their prompt, which generation cannot "
            "make; put the space between them into the completion",
            encoder.joined,
        )
