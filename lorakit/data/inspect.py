"""What training data looks like to the model, and what is wrong with it: `lorakit data`.

`show_rows` and `lint_rows` use the Encoder that training uses, so they show what is learned. The
lint reads the rows once. It keeps a digest of 16 bytes and the length of each row, and the short
answers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainOn
from lorakit.data.encode import IGNORE, Encoder, Example, PairExample
from lorakit.data.schemas import Chat, Choice, OneAnswer, Row
from lorakit.data.texts import answer_of, texts_of, words_digest
from lorakit.models.tokenizer import Tokenizer

LEARNED, MASKED, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"
SHORT = 40  # an answer of more characters is not taken for a class
CLASSES = 1000  # the most short answers that are counted
LISTED = 10  # how many of them are shown
BARS, WIDTH = 10, 40  # of the histogram


def show_rows(
    rows: Sequence[Row],
    tok: Tokenizer,
    count: int = 3,
    *,
    train_on: TrainOn = "completion",
    color: bool = False,
) -> str:
    """Return the tokens of the first rows as text, with their labels marked.

    Bars stand between the tokens. White space and control characters are made visible.

    Args:
        rows: Rows, as `read_rows` returns them.
        tok: The model's tokenizer.
        count: How many rows to show.
        train_on: Which tokens are labels, as `encode_rows` takes it.
        color: Mark labels by terminal colours. False puts them in double brackets.

    Returns:
        For each row a line with its place and its numbers of tokens and labels, then its tokens.

    Raises:
        LorakitError: A row cannot be learned from, or train_on is unknown.
    """
    encoder = Encoder(tok, train_on=train_on)
    shown = []
    for row in rows[:count]:
        answers: list[OneAnswer] = [row.chosen, row.rejected] if isinstance(row, Choice) else [row]
        for each in answers:
            example = encoder(each)
            assert isinstance(example, Example)  # one answer, and no limit to its length
            ids, labels = example
            learned = sum(label != IGNORE for label in labels)
            head = f"{each.place}: {len(ids)} tokens, {learned} of them labels"
            shown.append(f"{head}\n{_colored(tok, ids, labels, color)}\n")
    return "\n".join(shown)


def _colored(tok: Tokenizer, ids: list[int], labels: list[int], color: bool) -> str:
    out, learned = [], False
    for text, label in _pieces(tok, ids, labels):
        if color:
            # a line break would carry the colour on to the edge of the terminal
            start = LEARNED if label else MASKED
            lines = _visible(text).split("\n")
            out += ["\n".join(f"{start}{line}{PLAIN}" for line in lines), "|"]
            continue
        if label != learned:
            out.append("[[" if label else "]]")
            learned = label
        elif out:
            out.append("|")
        out.append(_visible(text))
    return "".join(out).removesuffix("|") + ("]]" if learned else "")


def _pieces(tok: Tokenizer, ids: list[int], labels: list[int]) -> Iterable[tuple[str, bool]]:
    """Yield the text of each token and whether it is a label.

    Tokens that are one character together are joined. A token is decoded after itself, because
    some tokenizers leave out its space at the start of a text.
    """
    held: list[int] = []
    for i, token in enumerate(ids):
        held.append(token)
        alone = tok.decode(held, skip_special_tokens=False)
        text = tok.decode(held * 2, skip_special_tokens=False)[len(alone) :]
        learned = labels[i] != IGNORE
        last = i + 1 == len(ids) or (labels[i + 1] != IGNORE) != learned
        if "\ufffd" not in text or len(held) == 4 or last:
            yield text, learned
            held = []


def _visible(text: str) -> str:
    shown = text.replace(" ", "·").replace("\n", "↵\n").replace("\t", "→")
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)


@dataclass
class LintReport:
    """What `lint_rows` found. As text it is a summary with the first few of each finding."""

    max_seq_length: int
    """Largest number of tokens of a row; a longer one counts as too long."""
    rows: int = 0
    """Number of rows, those that cannot be used included."""
    labels: int = 0
    """Number of label tokens of all rows."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of rows of each length in tokens; two answers count together."""
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Place of each row that repeats an earlier one, and the place of that one."""
    empty: list[str] = field(default_factory=list)
    """Places of turns without text."""
    over_long: list[str] = field(default_factory=list)
    """Places and lengths of rows that are longer than max_seq_length."""
    unusable: list[str] = field(default_factory=list)
    """Errors of rows that cannot be read, or cannot be learned from."""
    classes: Counter[str] = field(default_factory=Counter)
    """Short answers that several rows give, and how many rows give each."""

    def __str__(self) -> str:
        tokens = sum(length * n for length, n in self.lengths.items())
        lines = [f"{self.rows:,} rows, {tokens:,} tokens, {self.labels:,} of them labels"]
        if self.lengths:
            lines += ["", *self._histogram()]
        if self.classes:
            lines += ["", *self._balance()]
        lines.append("")
        repeated = [f"{place} repeats {first}" for place, first in self.duplicates]
        for what, found in [
            ("rows that repeat an earlier one, but for white space", repeated),
            ("turns without text", self.empty),
            (f"rows longer than max_seq_length={self.max_seq_length}", self.over_long),
            ("rows that cannot be used", self.unusable),
        ]:
            lines.append(f"{what}: {len(found):,}")
            lines += [f"  {line}" for line in found[:5]]
            lines += [f"  and {len(found) - 5:,} more"] if len(found) > 5 else []
        return "\n".join(lines)

    def _histogram(self) -> list[str]:
        lengths = sorted(self.lengths.elements())
        middle, high = lengths[len(lengths) // 2], lengths[-(-95 * len(lengths) // 100) - 1]
        span = f"{lengths[0]:,} to {lengths[-1]:,}"
        head = f"tokens per row: {span}, median {middle:,}, 95% up to {high:,}"
        step = -(-(lengths[-1] + 1 - lengths[0]) // BARS)
        counts = Counter((length - lengths[0]) // step for length in lengths)
        lines = []
        for bar in range(max(counts) + 1):
            start, n = lengths[0] + bar * step, counts[bar]
            drawn = "#" * -(-WIDTH * n // max(counts.values()))
            lines.append(f"  {start:>7,} to {start + step - 1:>7,}  {drawn:{WIDTH}}  {n:,}")
        return [head, *lines]

    def _balance(self) -> list[str]:
        lines = [f"short answers that repeat: {len(self.classes)}"]
        for text, n in self.classes.most_common(LISTED):
            lines.append(f"  {n / self.rows:6.1%}  {_visible(text)}")
        return lines


def lint_rows(
    rows: Sequence[Row],
    tok: Tokenizer,
    *,
    max_seq_length: int = 1024,
    train_on: TrainOn = "completion",
    errors: Sequence[str] = (),
) -> LintReport:
    """Return what one should know about rows before training on them.

    Args:
        rows: Rows, as `read_rows` returns them.
        tok: The model's tokenizer.
        max_seq_length: The number of tokens above which a row is reported as long.
        train_on: Which tokens are labels, as `encode_rows` takes it.
        errors: The errors of rows that `read_rows` left out; they count as unusable rows.

    Returns:
        A LintReport: lengths, duplicates, empty turns, long and unusable rows, repeated answers.

    Raises:
        LorakitError: train_on is unknown.
    """
    encoder = Encoder(tok, train_on=train_on)
    report = LintReport(max_seq_length, rows=len(errors), unusable=list(errors))
    first_with: dict[bytes, int] = {}  # digest -> number of the first such row
    answers: Counter[str] = Counter()
    for number, row in enumerate(rows):
        report.rows += 1
        digest = words_digest(*texts_of(row))
        if digest in first_with:
            report.duplicates.append((row.place, rows[first_with[digest]].place))
        first_with.setdefault(digest, number)
        report.empty += _empty_turns(row)
        answer = answer_of(row)
        if len(answer) <= SHORT and (answer in answers or len(answers) < CLASSES):
            answers[answer] += 1
        try:
            example = encoder(row)
        except LorakitError as error:
            report.unusable.append(str(error))
            continue
        assert example is not None  # no limit to its length, so it is not dropped
        _count(report, row.place, example)
    report.classes = Counter({text: n for text, n in answers.items() if n > 1})
    return report


def _count(report: LintReport, place: str, example: Example | PairExample) -> None:
    """Add the lengths and labels of a row to the report."""
    report.lengths[len(example.input_ids)] += 1
    report.labels += sum(label != IGNORE for each in example.answers for label in each.labels)
    length = max(len(each.input_ids) for each in example.answers)
    if length > report.max_seq_length:
        report.over_long.append(f"{place}: {length:,} tokens")


def _empty_turns(row: Row) -> list[str]:
    if isinstance(row, Choice):
        return _empty_turns(row.chosen) + _empty_turns(row.rejected)
    if isinstance(row, Chat):
        return [
            f"{row.place}, message {i} ({m['role']:.20})"
            for i, m in enumerate(row.messages)
            if not re.search(r"\S", m.get("content") or "") and not m.get("tool_calls")
        ]
    named = zip(row._fields, row[:-1], strict=False)
    wanted = [(name, text) for name, text in named if name != "input"]
    return [f"{row.place}, {name}" for name, text in wanted if not text.strip()]
