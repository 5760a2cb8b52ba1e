"""Finds rows that say nearly the same, in time that grows as the number of rows.

The similarity of two rows is that of Jaccard: of the shingles that either has, the share that both
have. A shingle is three words one after the other; a Chinese or Japanese character is a word.

    the shingles of a row   ->  their hashes, at most 1024, the smallest     its sketch
    128 minima of a sketch, each under another permutation                   its signature
    the signature, cut into bands; rows with an equal band are candidates
    the similarity of candidates, from their sketches

Two rows agree in a place of their signatures with the probability that is their similarity (Broder
1997, "On the resemblance and containment of documents"). The bands are so narrow that of two rows
at the limit fewer than 1 in 100 pairs is missed (Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", 3.4). What is found is compared exactly: only of rows of more than 1024 shingles the
similarity is an estimate, within about 0.03.

Shingles that more than half of the rows have are the frame of a task, such as an instruction that
stands in every row. They are left out, since by them all rows would be like each other.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lorakit.config.errors import LorakitError
from lorakit.data.rows import place_of
from lorakit.data.schemas import Row
from lorakit.data.texts import spoken_texts

SHINGLE = 3  # words
SKETCH = 1024  # hashes
SIGNATURE = 128  # minima
MISSED = 0.01  # the most that a pair at the limit is missed
COMPARED = 8  # candidates of a row that are compared, the likeliest first
SAMPLE, FEW = 1000, 50  # rows that tell the frame, and too few to tell it

Hashes = NDArray[np.uint32]
Numbers = NDArray[np.int64]

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_DRAWN = np.random.Generator(np.random.PCG64(0)).integers(0, 2**32, (2, SIGNATURE), np.uint32)
_FACTORS, _ADDENDS = _DRAWN[0] | np.uint32(1), _DRAWN[1]  # an odd factor makes a permutation


class Similar(NamedTuple):
    """A row, the row that it is like, and how much: a share of shingles, from 0 to 1."""

    row: int
    like: int
    similarity: float

    def said(self, rows: Sequence[Row], others: Sequence[Row]) -> str:
        """Return a sentence about the row, one of `rows`, and the one of `others` it is like."""
        place, like = place_of(rows, self.row), place_of(others, self.like)
        return f"{place} is nearly {like} ({self.similarity:.0%} shared)"


def sketch_of(texts: Iterable[str]) -> Hashes:
    """Return the hashes of the shingles of texts, sorted, the smallest SKETCH of them.

    Capitals and punctuation do not count. Fewer words than a shingle has are one shingle.
    """
    words = [word for text in texts for word in _WORD.findall(text.casefold())]
    if not words:
        return np.empty(0, np.uint32)
    words += [""] * (SHINGLE - len(words))
    one = np.fromiter((zlib.crc32(w.encode("utf-8", "replace")) for w in words), np.uint64)
    count = len(words) - SHINGLE + 1
    mixed = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        mixed = mixed + (one[i : i + count] + np.uint64(1)) * _PRIMES[i]
        mixed ^= mixed >> np.uint64(29)
        mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))[:SKETCH]


def similarity(a: Hashes, b: Hashes) -> float:
    """Return the Jaccard similarity of two sketches, an estimate if one of them is full.

    Of full sketches the smallest hashes of both together are the sample that counts.
    """
    both = np.concatenate([a, b])
    both.sort()
    twice = both[1:][both[1:] == both[:-1]]
    union = len(both) - len(twice)
    if max(len(a), len(b)) == SKETCH and union > SKETCH:
        end = np.unique(both)[SKETCH - 1]
        twice, union = twice[twice <= end], SKETCH
    return len(twice) / union if union else 0.0


def signature_of(sketch: Hashes) -> Hashes:
    """Return the signature of a sketch, uint32 [SIGNATURE]: its minima under permutations."""
    if not len(sketch):
        return np.full(SIGNATURE, 2**32 - 1, np.uint32)
    minima: Hashes = (sketch[:, None] * _FACTORS + _ADDENDS).min(0)
    return minima


def band_width(limit: float) -> int:
    """Return the widest band with which a pair of similarity `limit` is hardly ever missed."""
    widths = range(SIGNATURE, 1, -1)
    return next((w for w in widths if (1 - limit**w) ** (SIGNATURE // w) <= MISSED), 1)


def check_limit(limit: float) -> None:
    """Raise LorakitError if a similarity is none at which rows can be looked for."""
    if not 0.3 <= limit <= 1:
        raise LorakitError(f"rows are near duplicates from a similarity of 0.3 to 1, not {limit}")


def similar_rows(
    rows: Sequence[Row], limit: float, *, others: Sequence[Row] | None = None
) -> list[Similar]:
    """Return the rows that are like an earlier one, by their numbers.

    With `others`, these are the rows of `others` that are like one of `rows`. A row that is like an
    earlier one is no example for later ones; so those that are not listed are not like each other.
    """
    check_limit(limit)
    both = [rows] if others is None else [rows, others]
    total = sum(map(len, both))
    bar = tqdm(total=total, desc="comparing", unit="row", disable=None, leave=False)
    sketches = []
    with bar:
        for part in both:
            for row in part:
                sketches.append(sketch_of(spoken_texts(row)))
                bar.update()
    sketches = _without_frame(sketches)
    first = len(rows) if others is not None else 0
    signatures = np.stack([signature_of(sketch) for sketch in sketches])
    found = []
    keeper = np.arange(total)
    for i, candidates in _candidates(signatures, band_width(limit), first):
        best = _best(sketches, signatures, i, np.unique(keeper[candidates]), limit)
        if best is not None:
            found.append(Similar(i - first, *best))
            if others is None:
                keeper[i] = best[0]
    return found


def _without_frame(sketches: list[Hashes]) -> list[Hashes]:
    """Return sketches without the hashes that more than half of the rows have.

    A row that says nothing else keeps all it has.
    """
    sample = sketches[:: -(-len(sketches) // SAMPLE) or 1]
    if len(sample) < FEW:
        return sketches
    hashes, counts = np.unique(np.concatenate(sample), return_counts=True)
    frame = hashes[counts > len(sample) / 2]
    if not len(frame):
        return sketches
    own = [sketch[~np.isin(sketch, frame, assume_unique=True)] for sketch in sketches]
    return [left if len(left) else whole for left, whole in zip(own, sketches, strict=True)]


def _candidates(
    signatures: NDArray[np.uint32], width: int, first: int
) -> Iterable[tuple[int, Numbers]]:
    """Yield the rows from number `first` on that share a band with others, and which.

    These are the first row with that band, and the last one before the row; with `first` above 0,
    the first and the last one below `first`. So the number of pairs grows as that of rows.
    """
    total = len(signatures)
    pairs = []
    for start in range(0, SIGNATURE - width + 1, width):
        band = np.ascontiguousarray(signatures[:, start : start + width])
        _, group = np.unique(band.view(f"V{4 * width}").ravel(), return_inverse=True)
        order = np.argsort(group, kind="stable")
        starts = np.maximum.accumulate(
            np.where(np.diff(group[order], prepend=-1) != 0, np.arange(total), 0)
        )
        eligible = np.where(order < first if first else True, np.arange(total), -1)
        last = np.concatenate([[-1], np.maximum.accumulate(eligible)[:-1]])
        fine = (last >= starts) & (order >= first)
        row = order[fine]
        pairs += [np.stack([row, order[starts[fine]]], 1), np.stack([row, order[last[fine]]], 1)]
    all_pairs = np.unique(np.concatenate(pairs), axis=0)
    borders = np.flatnonzero(np.diff(all_pairs[:, 0])) + 1
    for group in np.split(all_pairs, borders) if len(all_pairs) else []:
        yield int(group[0, 0]), group[:, 1]


def _best(
    sketches: list[Hashes],
    signatures: NDArray[np.uint32],
    row: int,
    candidates: Numbers,
    limit: float,
) -> tuple[int, float] | None:
    """Return the candidate that a row is most like, and how much; None if it is like none."""
    likely = (signatures[candidates] == signatures[row]).mean(1)
    order = np.argsort(-likely, kind="stable")[:COMPARED]
    compared = [
        (similarity(sketches[row], sketches[c]), -int(c))
        for c in candidates[order]
        if len(sketches[c])
    ]
    best, number = max(compared, default=(0.0, 0))
    return (-number, best) if best >= limit else None
