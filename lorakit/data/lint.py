"""What is wrong with training data: `lorakit data lint`.

`lint_rows` uses the Encoder that training uses, so a row that it can use is one that can be learned
from. It reads the rows twice: once to encode them, and once to compare them; once more to compare
them with the rows of `against`. Each row leaves a digest of 16 bytes, its length, and its sketch of
at most 4 KB (similar.py).
"""

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tqdm import tqdm

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainOn
from lorakit.data.encode import IGNORE, AnyExample, Encoder
from lorakit.data.findings import private_kinds, repeats_question, script_of
from lorakit.data.inspect import visible
from lorakit.data.rows import place_of
from lorakit.data.schemas import Chat, Choice, Judged, Labelled, Prompt, Row
from lorakit.data.similar import check_limit, similar_rows
from lorakit.data.splitting import SelectedRows
from lorakit.data.texts import (
    answer_of,
    as_chat,
    asked_of,
    class_of,
    spoken_texts,
    texts_of,
    words_digest,
)
from lorakit.models.tokenizer import Tokenizer

SHORT = 40  # an answer of more characters is not taken for a class
CLASSES = 1000  # the most short answers that are counted
LISTED = 10  # how many of them are shown
BARS, WIDTH = 10, 40  # of the histogram
UNEVEN = 3  # times as many rows as the smallest class, for which a remedy is named
OF_CLASSES = 0.8  # the share of rows with short answers that repeat, from which these are classes


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
    near: list[str] = field(default_factory=list)
    """Sentences about rows that are nearly an earlier one, with the share that both have."""
    leaks: list[str] = field(default_factory=list)
    """Sentences about rows of the other file that ask or say what a row here does."""
    private: list[str] = field(default_factory=list)
    """Places of rows with strings of the shape of private ones, and their kinds."""
    repeating: list[str] = field(default_factory=list)
    """Places of rows whose answer holds the whole question."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Number of rows by their label of KTO, "true" or "false"."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Number of rows by the script of most of their letters, as Unicode names it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: every field by its name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in values.items()}

    def __str__(self) -> str:
        tokens = sum(length * n for length, n in self.lengths.items())
        lines = [f"{self.rows:,} rows, {tokens:,} tokens, {self.labels:,} of them labels"]
        if self.lengths:
            lines += ["", *self._histogram()]
        if self.classes:
            lines += ["", *self._balance()]
        if self.verdicts:
            lines += ["", self._verdicts()]
        if self.scripts:
            shares = (f"{name or 'none'} {n / self.rows:.1%}" for name, n in self._most_scripts())
            lines += ["", f"scripts, by rows: {', '.join(shares)}"]
        lines.append("")
        repeated = [f"{place} repeats {first}" for place, first in self.duplicates]
        for what, found in [
            ("rows that repeat an earlier one, but for white space", repeated),
            ("rows that are nearly an earlier one", self.near),
            ("rows of the other file that are known from this one", self.leaks),
            ("turns without text", self.empty),
            ("rows whose answer repeats the question", self.repeating),
            ("rows with strings that look private", self.private),
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

    def _verdicts(self) -> str:
        """Say how many answers are good and bad, and which weights even them (KTO, section 4.3)."""
        good, bad = self.verdicts["true"], self.verdicts["false"]
        line = f"labels of KTO: true {good:,}, false {bad:,}"
        if not good or not bad:
            return f"{line}; it learns from good and bad answers, and there is one kind alone"
        if max(good, bad) > min(good, bad) * 4 / 3:
            name = "desirable_weight" if good < bad else "undesirable_weight"
            line += f"; {name}: {max(good, bad) / min(good, bad):.2f} gives both the same weight"
        return line

    def _most_scripts(self) -> list[tuple[str, int]]:
        return self.scripts.most_common(LISTED)

    def _balance(self) -> list[str]:
        lines = [f"short answers that repeat: {len(self.classes)}"]
        for text, n in self.classes.most_common(LISTED):
            lines.append(f"  {n / self.rows:6.1%}  {visible(text)}")
        largest, smallest = max(self.classes.values()), min(self.classes.values())
        if self.classes.total() >= OF_CLASSES * self.rows and largest >= UNEVEN * smallest:
            lines.append(
                f"  the largest has {largest / smallest:.1f} times the rows of the smallest, and a "
                f"model that always says it is right in {largest / self.rows:.0%}: `lorakit data "
                "balance` makes them even; score such a model by macro_f1"
            )
        return lines


def lint_rows(
    rows: Sequence[Row],
    tok: Tokenizer,
    *,
    max_seq_length: int = 1024,
    train_on: TrainOn = "completion",
    errors: Sequence[str] = (),
    near: float | None = 0.8,
    against: Sequence[Row] | None = None,
) -> LintReport:
    """Return what one should know about rows before training on them.

    Args:
        rows: Rows, as `read_rows` returns them.
        tok: The model's tokenizer.
        max_seq_length: The number of tokens above which a row is reported as long.
        train_on: Which tokens are labels, as `encode_rows` takes it.
        errors: The errors of rows that `read_rows` left out; they count as unusable rows.
        near: The similarity from which rows are near duplicates, as `dedup_rows` takes it; None
            looks for none.
        against: Rows that a model is tested on. Those that the other rows give away are reported:
            the same question, and with `near` nearly the same row.

    Returns:
        A LintReport: lengths, scripts, duplicates, leaks, empty turns, private strings, answers
        that repeat the question, long and unusable rows, and classes.

    Raises:
        LorakitError: train_on is unknown, or `near` is out of its range.
    """
    if near is not None:
        check_limit(near)
    encoder = Encoder(tok, train_on=train_on)
    report = LintReport(max_seq_length, rows=len(errors), unusable=list(errors))
    first_with: dict[bytes, int] = {}  # digest -> number of the first such row
    asked: dict[bytes, int] = {}
    distinct = array("q")
    for number, row in enumerate(_with_bar(rows)):
        first = first_with.setdefault(words_digest(*texts_of(row)), number)
        if first != number:
            report.duplicates.append((row.place, place_of(rows, first)))
        else:
            distinct.append(number)
        if against is not None:
            asked.setdefault(words_digest(*asked_of(row)), number)
        _look(report, row)
        try:
            _count(report, row.place, encoder(row))
        except LorakitError as error:
            report.unusable.append(str(error))
    report.classes = Counter({text: n for text, n in report.classes.items() if n > 1})
    kept = SelectedRows(rows, distinct)
    if near is not None and distinct:
        report.near = [found.said(kept, kept) for found in similar_rows(kept, near)]
    if against is not None:
        report.leaks = _leaks(rows, kept, against, asked, near)
    return report


def _leaks(
    rows: Sequence[Row],
    distinct: SelectedRows,
    against: Sequence[Row],
    asked: dict[bytes, int],
    near: float | None,
) -> list[str]:
    """Return a sentence about each row of `against` that the others give away."""
    leaks = {}
    nothing = words_digest()
    for number, row in enumerate(against):
        digest = words_digest(*asked_of(row))
        if digest in asked and digest != nothing:
            place = place_of(rows, asked[digest])
            leaks[number] = f"{row.place} asks what {place} does"
    for found in similar_rows(distinct, near or 1.0, others=against) if distinct else []:
        leaks.setdefault(found.row, found.said(against, distinct))
    return [leaks[number] for number in sorted(leaks)]


def _look(report: LintReport, row: Row) -> None:
    """Count a row in the report, and add what its texts tell without its tokens."""
    report.rows += 1
    report.empty += _empty_turns(row)
    answer = answer_of(row)
    classes = report.classes
    if isinstance(row, Judged | Labelled):
        report.verdicts[class_of(row)] += 1
    if (
        not isinstance(row, Prompt | Labelled)
        and len(answer) <= SHORT
        and (answer in classes or len(classes) < CLASSES)
    ):
        classes[answer] += 1
    texts = "\n".join(spoken_texts(row))
    report.scripts[script_of(texts)] += 1
    kinds = private_kinds(texts)
    if kinds:
        report.private.append(f"{row.place}: {', '.join(kinds)}")
    if repeats_question(row):
        report.repeating.append(row.place)


def _with_bar(rows: Sequence[Row]) -> Any:
    return tqdm(rows, desc="checking", unit="row", total=len(rows), disable=None, leave=False)


def _count(report: LintReport, place: str, example: AnyExample | None) -> None:
    """Add the lengths and labels of a row to the report."""
    assert example is not None  # no limit to its length, so it is not dropped
    report.lengths[len(example.input_ids)] += 1
    report.labels += sum(label != IGNORE for each in example.answers for label in each.labels)
    length = max(len(each.input_ids) for each in example.answers)
    if length > report.max_seq_length:
        report.over_long.append(f"{place}: {length:,} tokens")


def _empty_turns(row: Row) -> list[str]:
    if isinstance(row, Choice):
        return _empty_turns(row.chosen) + _empty_turns(row.rejected)
    if isinstance(row, Judged):
        return _empty_turns(row.answer)
    if isinstance(row, Labelled):
        return _empty_turns(row.text)
    if isinstance(row, Prompt):
        row = as_chat(row)
    if isinstance(row, Chat):
        return [
            f"{row.place}, message {i} ({m['role']:.20})"
            for i, m in enumerate(row.messages)
            if not re.search(r"\S", m.get("content") or "") and not m.get("tool_calls")
        ]
    named = zip(row._fields, row[:-1], strict=False)
    wanted = [(name, text) for name, text in named if name != "input"]
    return [f"{row.place}, {name}" for name, text in wanted if not text.strip()]
