"""Turns rows into token ids and labels.

    input_ids   prompt ... | completion ... | end token | prompt ... | completion ... | end token
    labels      -100   ... | completion ... | end token | -100   ... | completion ... | end token

A chat is rendered once by the model's own template and tokenized whole, so that its ids are those
of `tok.apply_chat_template`. A token is labelled if some of it was written in a turn that is to be
learned (chat_spans.py). A prompt and its completion are tokenized whole too, as one text, and a
token is labelled if some of it belongs to the completion. So a token that spans the border, such as
" cold" of "hot is " and "cold", is learned whole. Generation starts from the tokens of the prompt
alone and cannot make such a token, so these rows are counted. The end token is labelled by its
place, not its id: a model that pads with its end token still learns to stop.

A text may be cut into windows of at most W tokens, each an example of its own:

    text        0 1 2 3 4 5 6 7 8 9        W = 4, of which window i begins with token 3 i
    windows     0 1 2 3 | 3 4 5 6 | 6 7 8 9

Nothing predicts the first token of an example. So a window begins with the last token of the one
before, and every token of the text but its first is learned once.

What becomes of the examples of many rows is in examples.py.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.labels import Label
from lorakit.config.training import OVER_LENGTH, TRAIN_ON, OverLength, TrainOn
from lorakit.data.chat_spans import Render, RenderedChat
from lorakit.data.instructions import as_chat_or_pair
from lorakit.data.messages import is_learned
from lorakit.data.schemas import (
    Chat,
    Choice,
    Instruction,
    Judged,
    Labelled,
    OneAnswer,
    Prompt,
    Row,
    Text,
    answers_of,
)
from lorakit.data.truncate import Uncut, cut, cuts_of, first_kept, without_oldest
from lorakit.models.chat_template import Messages
from lorakit.models.tokenizer import Tokenizer

IGNORE = -100
# The date that a template prints as today's, so that a run can be repeated. Llama 3.1's template
# falls back on it too.
TODAY = datetime(2024, 7, 26)
_ENDS_PROMPTS = (
    "the tokenizer puts its end token after every text, so also after a prompt that is to be "
    "continued; turn that off in the tokenizer (add_eos_token)"
)


class Example(NamedTuple):
    """The tokens of a row, and as many labels: the token itself, or IGNORE if it is not learned."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answers(self) -> tuple["Example", ...]:
        """The rows that the example takes in a batch: itself."""
        return (self,)


class PairExample(NamedTuple):
    """The examples of a better and a worse answer, and how much better the first one is."""

    chosen: Example
    rejected: Example
    margin: float = 0.0

    @property
    def answers(self) -> tuple[Example, ...]:
        """The rows that the example takes in a batch: the better answer, then the worse one."""
        return (self.chosen, self.rejected)

    @property
    def input_ids(self) -> list[int]:
        """The tokens of both, one after the other."""
        return self.chosen.input_ids + self.rejected.input_ids


class JudgedExample(NamedTuple):
    """The example of an answer that is good (desirable) or bad."""

    answer: Example
    desirable: bool

    @property
    def answers(self) -> tuple[Example, ...]:
        """The rows that the example takes in a batch: its answer."""
        return (self.answer,)

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the answer and its prompt."""
        return self.answer.input_ids


class LabelledExample(NamedTuple):
    """The example of a text that is to be told apart, no token of which is learned."""

    text: Example
    label: Label

    @property
    def answers(self) -> tuple[Example, ...]:
        """The rows that the example takes in a batch: its text."""
        return (self.text,)

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the text."""
        return self.text.input_ids


AnyExample = Example | PairExample | JudgedExample | LabelledExample


def count_labels(example: AnyExample) -> int:
    """Return how many label tokens the answers of an example have."""
    return sum(label != IGNORE for row in example.answers for label in row.labels[1:])


class Encoder:
    """Makes the examples of rows. `long` counts the rows over `max_seq_length`.

    `joined` counts the completions that begin within a token of their prompt.
    The docstring of `encode_rows` explains the arguments; max_seq_length None cuts nothing. Raises
    LorakitError if over_length or train_on is none of their words.
    """

    def __init__(
        self,
        tok: Tokenizer,
        *,
        max_seq_length: int | None = None,
        over_length: OverLength = "truncate",
        train_on: TrainOn = "completion",
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
        if max_seq_length is not None and max_seq_length < 2:
            raise LorakitError("max_seq_length must be at least 2")
        self.tok, self.train_on = tok, train_on
        self.max_seq_length, self.over_length = max_seq_length, over_length
        self.long = self.joined = 0
        self.end = [] if tok.eos_token_id is None else [tok.eos_token_id]
        added = tok.backend.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self._end_tokens = special | set(self.end)
        self._marks = [token.content for token in added.values() if token.special]
        # The roles of messages that the template was seen to show whole, by its variables.
        self._shown_roles: dict[str, set[tuple[Any, ...]]] = {}

    def examples(self, row: Row) -> Sequence[AnyExample]:
        """Return the examples of a row: one, none if it is dropped, or the windows of a text.

        Raises LorakitError as a call does.
        """
        limit = self.max_seq_length
        if self.over_length == "split" and limit is not None and isinstance(row, Text):
            ids = self._tokens(row).input_ids
            with _at(row.place):
                self._check_bos(ids)
                _check(ids, ids)
            self.long += len(ids) > limit
            starts = range(0, len(ids) - 1, limit - 1)
            windows = [ids[start : start + limit] for start in starts]
            return [Example(window, window) for window in windows]
        example = self(row)
        return [] if example is None else [example]

    def __call__(self, row: Row) -> AnyExample | None:
        """Return the example of a row, of at most max_seq_length tokens; None if it is dropped.

        Raises LorakitError for a row from which the model would learn nothing, or something wrong.
        """
        if isinstance(row, Prompt):
            return self._prompt(row)
        if isinstance(row, Labelled):
            return self._labelled(row)
        answers = answers_of(row)
        uncut = [self._tokens(each) for each in answers]
        for each, whole in zip(answers, uncut, strict=True):
            with _at(each.place):
                self._check_bos(whole.input_ids)
        longest, limit = max(len(each.input_ids) for each in uncut), self.max_seq_length
        if limit is not None and longest > limit:
            self.long += 1
            if self.over_length == "raise":
                raise LorakitError(
                    f"{row.place}: {longest} tokens, more than max_seq_length={limit}; "
                    "raise it, or set over_length to truncate or drop"
                )
            if self.over_length == "split":
                raise LorakitError(
                    f"{row.place}: {longest} tokens, more than max_seq_length={limit}, and "
                    "over_length split cuts texts alone; set it to truncate or drop"
                )
            if self.over_length == "drop":
                return None
            uncut = self._shortened(answers, uncut, limit)
            start = max(first_kept(each, limit) for each in uncut)  # one prompt for both answers
            uncut = [cut(each, start, limit) for each in uncut]
        examples = []
        for each, (ids, labels, _, _) in zip(answers, uncut, strict=True):
            with _at(each.place):
                _check(ids, labels)
            examples.append(Example(ids, labels))
        if isinstance(row, Choice):
            return PairExample(examples[0], examples[1], row.margin or 0.0)
        return JudgedExample(examples[0], row.desirable) if isinstance(row, Judged) else examples[0]

    def _prompt(self, row: Prompt) -> Example | None:
        """Return the example of a prompt, which has no label; None if it is dropped.

        No prompt is cut: its answer would be to another one.
        """
        with _at(row.place):
            if isinstance(row.prompt, str):
                ids = self.tok.encode(row.prompt)
                if self.end and ids[-1:] == self.end != self.tok.encode(row.prompt, False)[-1:]:
                    raise LorakitError(_ENDS_PROMPTS)
            else:
                variables = {"strftime_now": TODAY.strftime, **(row.variables or {})}
                ids = self.tok.apply_chat_template(
                    row.prompt, add_generation_prompt=True, tools=row.tools, **variables
                )
            self._check_bos(ids)
            limit = self.max_seq_length
            if limit is not None and len(ids) > limit:
                self.long += 1
                if self.over_length == "drop":
                    return None
                raise LorakitError(
                    f"a prompt of {len(ids)} tokens, more than max_seq_length={limit}; raise it, "
                    "or set over_length to drop"
                )
            return Example(ids, [IGNORE] * len(ids))

    def _labelled(self, row: Labelled) -> LabelledExample | None:
        """Return the example of a text with a class; None if it is dropped.

        It has the tokens that the tokenizer gives the text, and no end token after them. A text
        that is too long loses its end, and a chat its start: the head reads the last token.
        """
        text, limit, head = row.text, self.max_seq_length, 0
        with _at(row.place):
            if isinstance(text, Chat):
                shown = self._renders(text)[0](text.messages)
                ids = self.tok.encode(shown, add_special_tokens=False)
                head = int(ids[:1] == [self.tok.bos_token_id])
            else:
                ids = self.tok.encode("".join(text[:-1]))
            self._check_bos(ids)
            if not ids:
                raise LorakitError("the text has no token")
            if limit is not None and len(ids) > limit:
                self.long += 1
                if self.over_length == "drop":
                    return None
                if self.over_length != "truncate":
                    raise LorakitError(
                        f"{len(ids)} tokens, more than max_seq_length={limit}; raise it, or set "
                        "over_length to truncate or drop"
                    )
                rest = limit - head
                ids = ids[:head] + ids[-rest:] if isinstance(text, Chat) else ids[:limit]
        return LabelledExample(Example(ids, [IGNORE] * len(ids)), row.label)

    def _tokens(self, row: OneAnswer) -> Uncut:
        with _at(row.place):
            if isinstance(row, Instruction):
                row = as_chat_or_pair(row, chat=self.tok.chat_template is not None)
            if isinstance(row, Chat):
                return self._chat(row)
            if isinstance(row, Text):
                ids = self._ended(self.tok.encode(row.text))
                return Uncut(ids, ids, 0, 0)
            return self._pair(row.prompt, row.completion)

    def _ended(self, ids: list[int]) -> list[int]:
        """Return the tokens with an end token after them, which some rows hold already."""
        return ids if ids[-1:] == self.end else ids + self.end

    def _pair(self, prompt: str, completion: str) -> Uncut:
        text, border = prompt + completion, len(prompt)
        ids, offsets = self.tok.encode_with_offsets(text, add_special_tokens=True)
        if self.end and ids[-1:] == self.end and offsets[-1][0] == len(text):
            raise LorakitError(_ENDS_PROMPTS)
        tokens = range(len(ids))
        head = next((t for t in tokens if offsets[t][1] > 0), len(ids))
        first = next((t for t in tokens if offsets[t][1] > border), len(ids))
        if first == len(ids) or offsets[first][0] > border:
            # The normalizer took the first character, perhaps into the one before (NFC: e + ◌́ = é),
            # whose tokens then are other ones.
            alone = self.tok.encode(prompt)
            while first > head and offsets[first - 1][1] == border and ids[:first] != alone[:first]:
                first -= 1
        if first < len(ids) and offsets[first][0] < border:
            self.joined += 1
        ids = self._ended(ids)
        labels = ids if self.train_on == "all" else [IGNORE] * first + ids[first:]
        return Uncut(ids, labels, head, first)

    def _chat(self, row: Chat) -> Uncut:
        chat = RenderedChat(self._renders(row), row.messages, self._marks)
        what = chat.left_out(self._shown_roles.setdefault(repr(row.variables), set()))
        if what is not None:
            raise LorakitError(
                f"the chat template leaves out {what}; take that out of the row, or use a template "
                "that shows it"
            )
        text = chat.text
        ids, offsets = self.tok.encode_with_offsets(text)
        head = int(ids[:1] == [self.tok.bos_token_id])
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        starts, ends = [a for a, _ in offsets], [b for _, b in offsets]

        def tokens_of(i: int) -> range:
            start, end = chat.span(i)
            return range(bisect_right(ends, start), bisect_left(starts, end))

        if self.train_on == "all":
            chat.check_shown(turns)
            if turns and turns[-1] == len(row.messages) - 1:
                self._to_end_token(text, ids, offsets, range(len(ids)), turns[-1])
            masked = {t for i in turns if not is_learned(row.messages[i]) for t in tokens_of(i)}
            labels = [IGNORE if t in masked else token for t, token in enumerate(ids)]
            return Uncut(ids, labels, head, head)
        turns = [i for i in turns if i >= row.first]
        if self.train_on == "last_turn":
            turns = turns[-1:]
        turns = [i for i in turns if is_learned(row.messages[i])]
        if not turns:
            raise LorakitError("no turn of the assistant is there to learn")
        labels, first = [IGNORE] * len(ids), len(ids)
        for i in turns:
            within = self._to_end_token(text, ids, offsets, tokens_of(i), i)
            first = min(first, within[0])
            for t in within:
                labels[t] = ids[t]
        return Uncut(ids, labels, head, first)

    def _renders(self, row: Chat) -> list[Render]:
        """Return what renders messages: with the tools of a chat, and if it has some, without."""
        variables = {"strftime_now": TODAY.strftime, **(row.variables or {})}

        def with_tools(messages: Messages, generation_prompt: bool = False) -> str:
            return self.tok.apply_chat_template(
                messages, False, generation_prompt, tools=row.tools, **variables
            )

        def without(messages: Messages, generation_prompt: bool = False) -> str:
            return self.tok.apply_chat_template(messages, False, generation_prompt, **variables)

        return [with_tools] if row.tools is None else [with_tools, without]

    def _to_end_token(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], tokens: range, i: int
    ) -> range:
        """Return the tokens of message `i` without the white space after its end token.

        Raises LorakitError if there is no end token.
        """
        while tokens and ids[tokens[-1]] not in self._end_tokens:
            if text[slice(*offsets[tokens[-1]])].strip():
                break
            tokens = tokens[:-1]
        if not tokens or ids[tokens[-1]] not in self._end_tokens:
            shown = text[: offsets[tokens[-1]][1]] if tokens else ""
            mark = re.search(r"<[^<>\s]+>$", shown)
            why = f", as {mark[0]!r} is no special token" if mark else ", or masks it"
            raise LorakitError(
                f"the chat template puts no end token after message {i}{why}: the model would not "
                "learn to stop; end the turn with {{ eos_token }}, as chat_template: zephyr does"
            )
        return tokens

    def _shortened(self, rows: Sequence[OneAnswer], uncut: list[Uncut], limit: int) -> list[Uncut]:
        """Return the tokens of a chat, or of both chats of a pair, without the oldest exchanges.

        As few exchanges go as will do, and never the last answer. Each that goes makes a chat
        shorter, so their number is found by bisection.
        """
        chats = [row for row in rows if isinstance(row, Chat)]
        cuts = [cuts_of(row) for row in chats]
        most = min(map(len, cuts)) if len(chats) == len(rows) else 0
        if not most:
            return uncut

        def without(exchanges: int) -> list[Chat]:
            both = zip(chats, cuts, strict=True)
            return [without_oldest(row, places[exchanges - 1]) for row, places in both]

        def fits(exchanges: int) -> bool:
            try:
                texts = [self._renders(row)[0](row.messages) for row in without(exchanges)]
            except LorakitError:
                return True  # where it is refused
            return all(len(self.tok.encode(t, add_special_tokens=False)) <= limit for t in texts)

        fewest = bisect_left(range(1, most), True, key=fits) + 1
        return [self._tokens(row) for row in without(fewest)]

    def _check_bos(self, ids: list[int]) -> None:
        bos = self.tok.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise LorakitError(
                f"starts with {self.tok.special_tokens['bos_token']} twice: the text holds one and "
                "the tokenizer or the template adds one; take it out of the text"
            )


def _check(ids: list[int], labels: list[int]) -> None:
    if len(ids) < 2:
        raise LorakitError("only one token; there is no next one to learn")
    if all(label == IGNORE for label in labels[1:]):
        raise LorakitError("all labels are masked; there is nothing to learn")


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of the row before each error of the block."""
    try:
        yield
    except LorakitError as error:
        raise LorakitError(f"{place}: {error}") from None
