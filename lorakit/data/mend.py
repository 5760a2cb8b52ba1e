"""Leaves rows out, and says which and why: duplicates, too many of a class, all but a sample.

Nothing here depends on the order of the rows but what equal rows decide: which rows are drawn
follows from a digest of their content under the seed. So the same rows in another order, or a few
more of them, give the same choice but for a few.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.rows import RowSource, fields_at, place_of, read_rows
from lorakit.data.schemas import Row
from lorakit.data.similar import check_limit, similar_rows
from lorakit.data.splitting import SelectedRows, content_digest
from lorakit.data.texts import class_of, texts_of, words_digest


class Mended(NamedTuple):
    """What `dedup_rows`, `balance_rows` and `sample_rows` return."""

    rows: SelectedRows
    """The rows that stay, in their order."""
    dropped: list[str]
    """A sentence about each row that was left out, with its place."""


def dedup_rows(source: RowSource, *, near: float | None = None) -> Mended:
    """Leave out rows that repeat an earlier one, and if asked those that are nearly like one.

    Equal are rows with the same words; white space between them does not count. Nearly equal rows
    share three words in a row with each other often enough (see similar.py); a system prompt, tools
    and what stands in most of the rows do not count there. About 1 in 100 pairs at the limit is
    missed, fewer above it.

    Args:
        source: The rows, as `read_rows` takes them.
        near: The similarity from which a row counts as a repetition, from 0.3 to 1, such as 0.8.
            None leaves out equal rows alone.

    Returns:
        The rows that stay, in their order, and what was left out.

    Raises:
        LorakitError: The rows cannot be read, or `near` is out of its range.
    """
    if near is not None:
        check_limit(near)
    rows = read_rows(source)
    first_with: dict[bytes, int] = {}
    kept, dropped = array("q"), []
    for i, row in enumerate(_with_bar(rows, "reading")):
        first = first_with.setdefault(words_digest(*texts_of(row)), i)
        if first == i:
            kept.append(i)
        else:
            dropped.append(f"{row.place} repeats {place_of(rows, first)}")
    if near is None:
        return Mended(SelectedRows(rows, kept), dropped)
    distinct = SelectedRows(rows, kept)
    similar = similar_rows(distinct, near)
    dropped += [found.said(distinct, distinct) for found in similar]
    gone = {found.row for found in similar}
    kept = array("q", (number for i, number in enumerate(kept) if i not in gone))
    return Mended(SelectedRows(rows, kept), dropped)


def balance_rows(
    source: RowSource, *, by: str | None = None, most: int | None = None, seed: int = 0
) -> Mended:
    """Leave out rows of the more frequent classes, so that no class has more than another.

    Args:
        source: The rows, as `read_rows` takes them.
        by: The field that holds the class of a row. None takes the answer for it, or the label of
            rows that say whether their answer is a good one.
        most: The most rows that a class keeps. None takes the size of the smallest class.
        seed: The seed by which the rows that stay are drawn.

    Returns:
        The rows that stay, in their order, and what was left out.

    Raises:
        LorakitError: The rows cannot be read, one lacks the field, there are no classes, or `most`
            is below 1.
    """
    if most is not None and most < 1:
        raise LorakitError(f"the most rows of a class must be at least 1, not {most}")
    rows = read_rows(source)
    members = defaultdict[str, list[int]](list)
    if by is None:
        for i, row in enumerate(_with_bar(rows, "reading")):
            members[class_of(row)].append(i)
    else:
        for i in _with_bar(range(len(rows)), "reading"):
            members[_class_of(rows, i, by)].append(i)
    alone = sum(len(numbers) == 1 for numbers in members.values())
    if len(members) < 2 or alone * 2 > len(rows):
        what = "one class alone" if len(members) < 2 else f"{alone:,} classes of one row"
        of = "the answers" if by is None else f"field {by!r}"
        raise LorakitError(
            f"{of} of {len(rows):,} rows make {what}, and there is nothing to balance; name the "
            "field that holds the class"
        )
    size = most or min(map(len, members.values()))
    kept = array("q")
    dropped = []
    for name, numbers in members.items():
        chosen = _drawn(rows, numbers, size, seed)
        kept.extend(chosen)
        dropped += [
            f"{place_of(rows, i)} is one of {len(numbers):,} of class {name!r:.40}"
            for i in sorted(set(numbers) - set(chosen))
        ]
    return Mended(SelectedRows(rows, array("q", sorted(kept))), dropped)


def sample_rows(source: RowSource, count: int, *, seed: int = 0) -> Mended:
    """Keep a random sample of rows, in their order.

    Args:
        source: The rows, as `read_rows` takes them.
        count: The number of rows to keep.
        seed: The seed by which they are drawn. A larger sample of the same seed holds the smaller.

    Returns:
        The rows that stay, and what was left out.

    Raises:
        LorakitError: The rows cannot be read, or there are not as many.
    """
    rows = read_rows(source)
    if not 1 <= count <= len(rows):
        raise LorakitError(f"a sample of {len(rows):,} rows has 1 to {len(rows):,}, not {count:,}")
    kept = draw_rows(rows, count, seed)
    gone = sorted(set(range(len(rows))) - set(kept.numbers))
    return Mended(kept, [f"{place_of(rows, i)} was not drawn" for i in gone])


def draw_rows(rows: Sequence[Row], count: int, seed: int) -> SelectedRows:
    """Return the rows that `sample_rows` keeps, without a sentence about each of the others."""
    return SelectedRows(rows, array("q", _drawn(rows, range(len(rows)), count, seed)))


def _class_of(rows: Sequence[Row], index: int, name: str) -> str:
    """Return what a field of a row holds, as text. Raises LorakitError if it names no class."""
    fields = fields_at(rows, index)
    names = list(map(str, fields)) if isinstance(fields, dict) else []
    value = fields[name] if name in names else None
    if not isinstance(value, (str, int, float)):
        what = f"has no field {name!r}{nearest(name, names)}"
        if name in names:
            what = f"has {value!r:.60} in field {name!r}, which is no class"
        raise LorakitError(f"{place_of(rows, index)} {what}")
    return str(value).strip()


def _drawn(rows: Sequence[Row], numbers: Sequence[int], count: int, seed: int) -> list[int]:
    """Return `count` of the numbers, or all if there are fewer, in their order.

    The digest of a row's content decides. The second of equal rows has another digest than the
    first, so that they are not drawn together.
    """
    if count >= len(numbers):
        return list(numbers)
    times: Counter[bytes] = Counter()
    digests = {}
    for i in _with_bar(numbers, "drawing"):
        digest = content_digest(rows[i], f"seed {seed}")
        digests[i] = hashlib.blake2b(digest + b"%d" % times[digest], digest_size=8).digest()
        times[digest] += 1
    return sorted(sorted(numbers, key=lambda i: (digests[i], i))[:count])


def _with_bar(items: Any, what: str) -> Any:
    return tqdm(items, desc=what, unit="row", disable=None, leave=False)
