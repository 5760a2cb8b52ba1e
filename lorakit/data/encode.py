"""Rows to token ids and labels, and the batches they end up in.

    input_ids   prompt ... | completion ... | end token | prompt ... | completion ... | end token
    labels      -100   ... | completion ... | end token | -100   ... | completion ... | end token

Chats are rendered once by the model's own template and tokenized whole, so that their ids are those
of `tok.apply_chat_template`; a token is labelled if some of it was written in a turn that is to be
learned (turns.py). Prompts with a completion are tokenized apart, so that the cut between them is
where the rows put it, and where generation will put it. The end token is labelled by its place, not
its id: a model that pads with its end token still learns to stop.

Examples of a list of rows are held. Those of a file are made again each time they are asked for, as
its rows are read again: only their lengths are held.
"""

import logging
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.training import OVER_LENGTH, TRAIN_ON
from lorakit.data.chat_spans import check_shown, dropped, turn_span
from lorakit.data.rows import Rows
from lorakit.data.schemas import Chat, Choice, Instruction, Row, Text
from lorakit.models.tokenizer import Tokenizer

log = logging.getLogger("lorakit")

IGNORE = -100
# What a template that prints today's date prints, so that a run can be repeated: the date that
# Llama 3.1's template falls back on.
TODAY = datetime(2024, 7, 26)
# The prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), for models without a chat
# template.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Example(NamedTuple):
    input_ids: list[int]
    labels: list[int]


class PairExample(NamedTuple):
    """The examples of a better and a worse answer."""

    chosen: Example
    rejected: Example

    @property
    def input_ids(self) -> list[int]:
        """Of both, one after the other."""
        return self.chosen.input_ids + self.rejected.input_ids


class Parts(NamedTuple):
    """A row's tokens before they are cut to length. The first `head` tokens stay in any case, what
    is cut first lies between them and `prompt`, where the first label is."""

    input_ids: list[int]
    labels: list[int]
    head: int
    prompt: int


class Encoder:
    """Makes the examples of rows. `long` counts the rows over `max_seq_length`."""

    def __init__(
        self,
        tok: Tokenizer,
        *,
        max_seq_length: int | None = None,
        over_length: str = "truncate",
        train_on: str = "completion",
    ):
        if train_on not in TRAIN_ON:
            raise LorakitError(
                f"train_on is {train_on!r}{nearest(train_on, TRAIN_ON)}; "
                f"choose {', '.join(TRAIN_ON)}"
            )
        if over_length not in OVER_LENGTH:
            raise LorakitError(
                f"over_length is {over_length!r}{nearest(over_length, OVER_LENGTH)}; "
                f"choose {', '.join(OVER_LENGTH)}"
            )
        self.tok, self.train_on = tok, train_on
        self.max_seq_length, self.over_length = max_seq_length, over_length
        self.long = 0
        self.end = [] if tok.eos_token_id is None else [tok.eos_token_id]
        self.checked: set[tuple] = set()  # roles of chats of which the template drops none
        added = tok.backend.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self.end_tokens = special | set(self.end)

    def __call__(self, row: Row) -> Example | PairExample | None:
        """A row's example, of at most max_seq_length tokens; None for one that is to be dropped.

        Raises LorakitError for a row from which nothing, or something wrong, would be learned.
        """
        pair, limit = isinstance(row, Choice), self.max_seq_length
        answers = [row.chosen, row.rejected] if pair else [row]
        parts = [self._parts(each) for each in answers]
        longest = max(len(each.input_ids) for each in parts)
        if limit is not None and longest > limit:
            self.long += 1
            if self.over_length == "raise":
                raise LorakitError(
                    f"{row.place}: {longest} tokens, more than max_seq_length={limit}; "
                    "raise it, or set over_length to truncate or drop"
                )
            if self.over_length == "drop":
                return None
            parts = self._shortened(answers, parts, limit)
            start = max(_first_kept(each, limit) for each in parts)  # of a pair's prompt too
            parts = [_cut(each, start, limit) for each in parts]
        examples = []
        for each, made in zip(answers, parts, strict=True):
            with _at(each.place):
                self._check(made)
            examples.append(Example(made.input_ids, made.labels))
        return PairExample(*examples) if pair else examples[0]

    def _parts(self, row: Row) -> Parts:
        with _at(row.place):
            if isinstance(row, Instruction) and self.tok.chat_template is not None:
                row = as_chat(row)
            if isinstance(row, Chat):
                return self._chat(row)
            if isinstance(row, Instruction):
                prompt = ALPACA_WITH_INPUT if row.input else ALPACA
                prompt = prompt.format(instruction=row.instruction, input=row.input)
                return self._pair(prompt, row.output)
            if isinstance(row, Text):
                ids = self._ended(self.tok.encode(row.text))
                return Parts(ids, ids, 0, 0)
            return self._pair(row.prompt, row.completion)

    def _ended(self, ids: list[int]) -> list[int]:
        """With an end token, which some rows hold already."""
        return ids if ids[-1:] == self.end else ids + self.end

    def _pair(self, prompt: str, completion: str) -> Parts:
        before = self.tok.encode(prompt)
        plain = self.tok.encode(prompt, add_special_tokens=False)
        head = len(before) - len(plain)
        if before[head:] != plain and before[-1:] == self.end:
            raise LorakitError(
                "the tokenizer puts its end token behind every text, so also between a prompt and "
                "its completion; turn that off in the tokenizer (add_eos_token)"
            )
        after = self._ended(self.tok.encode(completion, add_special_tokens=False))
        masked = before if self.train_on == "all" else [IGNORE] * len(before)
        return Parts(before + after, masked + after, head, len(before))

    def _chat(self, row: Chat) -> Parts:
        def render(messages: list[dict], generation_prompt: bool = False) -> str:
            return self.tok.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                tools=row.tools,
                strftime_now=TODAY.strftime,
            )

        text = render(row.messages)
        self._check_roles(row, text, render)
        ids, offsets = self.tok.encode_with_offsets(text)
        head = int(ids[:1] == [self.tok.bos_token_id])

        def check_end(tokens: list[int], i: int) -> list[int]:
            """The tokens of message i without the white space behind its end token."""
            while tokens and ids[tokens[-1]] not in self.end_tokens:
                if text[slice(*offsets[tokens[-1]])].strip():
                    break
                tokens = tokens[:-1]
            if not tokens or ids[tokens[-1]] not in self.end_tokens:
                raise LorakitError(
                    f"the chat template puts no end token after message {i}, or masks it: the "
                    "model would not learn to stop; end the turn with {{ eos_token }}"
                )
            return tokens

        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        if self.train_on == "all":
            for i in turns:
                check_shown(row.messages[i], i, text)
            if turns and turns[-1] == len(row.messages) - 1:
                check_end(list(range(len(ids))), turns[-1])
            return Parts(ids, ids, head, head)
        turns = [i for i in turns if i >= row.first]
        if not turns:
            raise LorakitError("no turn of the assistant is there to learn")
        if self.train_on == "last_turn":
            turns = turns[-1:]
        starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
        labels, first = [IGNORE] * len(ids), len(ids)
        for i in turns:
            start, end = turn_span(render, row.messages, text, i)
            within = check_end([*range(bisect_right(ends, start), bisect_left(starts, end))], i)
            first = min(first, within[0])
            for t in within:
                labels[t] = ids[t]
        return Parts(ids, labels, head, first)

    def _check_roles(self, row: Chat, text: str, render: Callable[..., str]) -> None:
        """Once for all chats of the same roles: what a template shows depends on these."""
        roles = tuple((each["role"], "tool_calls" in each) for each in row.messages)
        key = (*roles, row.tools is not None)
        if key in self.checked:
            return
        what = dropped(render, row.messages, text)
        if what is not None:
            raise LorakitError(
                f"the chat template leaves out {what}; take it out of the row, or use a template "
                "that knows it"
            )
        if row.tools is not None:
            without = self.tok.apply_chat_template(
                row.messages, tokenize=False, strftime_now=TODAY.strftime
            )
            if without == text:
                raise LorakitError(
                    "the chat template leaves out the tools; take them out of the row, or use a "
                    "template that knows them"
                )
        self.checked.add(key)

    def _shortened(self, rows: Sequence[Row], parts: list[Parts], limit: int) -> list[Parts]:
        """Of a chat, or both of a pair, without the oldest exchanges: as few as will do, and never
        the last answer.
        """
        while max(len(each.input_ids) for each in parts) > limit:
            shorter = [_without_oldest(row) for row in rows]
            if None in shorter:
                break
            rows, parts = shorter, [self._parts(row) for row in shorter]
        return parts

    def _check(self, parts: Parts) -> None:
        ids, bos = parts.input_ids, self.tok.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise LorakitError(
                f"starts with {self.tok.special_tokens['bos_token']} twice: the text holds one and "
                "the tokenizer or the template adds one; take it out of the text"
            )
        if len(ids) < 2:
            raise LorakitError("only one token; there is no next one to learn")
        if all(label == IGNORE for label in parts.labels[1:]):
            raise LorakitError("all labels are masked; there is nothing to learn")


def _without_oldest(row: Row) -> Chat | None:
    """A chat without its first exchange; None where an answer to learn would go with it."""
    if not isinstance(row, Chat):
        return None
    roles = [message["role"] for message in row.messages]
    start = next((i for i, r in enumerate(roles) if r not in ("system", "developer")), 0)
    then = next((i for i in range(start + 1, len(roles)) if roles[i] == "user"), None)
    if then is None or (row.first and then > row.first) or "assistant" not in roles[then:]:
        return None
    messages = row.messages[:start] + row.messages[then:]
    return row._replace(messages=messages, first=max(row.first - (then - start), 0))


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Errors in the `with` block name the row."""
    try:
        yield
    except LorakitError as error:
        raise LorakitError(f"{place}: {error}") from None


def as_chat(row: Instruction) -> Chat:
    """An instruction as a user's message, and the output as its answer."""
    request = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    messages = [
        {"role": "user", "content": request},
        {"role": "assistant", "content": row.output},
    ]
    return Chat(messages, None, 0, row.place)


def _first_kept(parts: Parts, limit: int) -> int:
    """The first token behind the head that fits, with what is to be learned, into `limit`."""
    ids, _, head, prompt = parts
    before = max(head, min(prompt, 1))  # a label needs a token before it
    end = min(len(ids), prompt + limit - before)
    return max(head, prompt - (limit - head - (end - prompt)))


def _cut(parts: Parts, start: int, limit: int) -> Parts:
    """The head, and what follows from token `start` on, at most `limit` tokens in all."""
    ids, labels, head, prompt = parts
    kept = [*range(head), *range(start, min(len(ids), start + limit - head))]
    return Parts([ids[t] for t in kept], [labels[t] for t in kept], head, prompt - start + head)


class Examples(Sequence[Example]):
    """The examples of rows but those that `encoder` drops. `lengths` are their numbers of tokens.

    Those of rows that are held are held too, the others are made anew each time.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder):
        self.rows, self.encoder = rows, encoder
        self.held: list[Example | PairExample] | None = None if isinstance(rows, Rows) else []
        self.numbers, self.lengths = array("q"), array("l")
        for number, row in enumerate(rows):
            example = encoder(row)
            if example is not None:
                self.numbers.append(number)
                self.lengths.append(len(example.input_ids))
                if self.held is not None:
                    self.held.append(example)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if self.held is not None:
            return self.held[index]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.encoder(self.rows[self.numbers[index]])

    def place(self, index: int) -> str:
        """Where the row came from, as "train.jsonl line 3"."""
        return self.rows[self.numbers[index]].place


def encode_rows(
    rows: Iterable[Row],
    tok: Tokenizer,
    *,
    max_seq_length: int,
    over_length: str = "truncate",
    train_on: str = "completion",
) -> Examples:
    """Token ids and labels of rows, at most `max_seq_length` tokens each.

    train_on: "completion", of a chat every turn of the assistant; "last_turn", of a chat its last
    one only; "all": every token.

    A longer row is, by `over_length`: "truncate": cut at the start of the prompt (its first special
    tokens stay), and at the end of the completion only if that alone is too long; of a chat first
    the oldest exchanges go, and text is cut at its end; "drop": left out; "raise": an error.

    Raises LorakitError for a row that starts with two BOS tokens, has no label, holds a message
    that the template leaves out, or would not teach the model to stop; and if every row is dropped.
    """
    encoder = Encoder(
        tok, max_seq_length=max_seq_length, over_length=over_length, train_on=train_on
    )
    if not encoder.end:
        log.warning("lorakit: the tokenizer has no end token; the model will not learn to stop")
    rows = rows if isinstance(rows, Rows) else list(rows)
    examples = Examples(rows, encoder)
    if not examples:
        raise LorakitError(
            f"all {len(rows)} rows are longer than max_seq_length={max_seq_length} and were dropped"
        )
    if encoder.long:
        log.warning(
            "lorakit: %d of %d rows are longer than max_seq_length=%d and were %s",
            encoder.long,
            len(rows),
            max_seq_length,
            "dropped" if over_length == "drop" else "truncated",
        )
    return examples
