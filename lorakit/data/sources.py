"""Rows of the sources that a run file names: files, data sets of the Hub, and mixtures of them.

A mixture has the rows of its first source, then those of the next; the order of a run shuffles them
(batching.py). Which rows a source gives follows from their content and the seed, and their number
from the weights, to the row. So the same sources give the same rows, and a run that is resumed
reads what it read before.

Data sets come through the library `datasets`, which asks the Hub for the id that the user gave, and
keeps what it got in its cache. A directory is read by it too.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from lorakit.config.data import DataConfig, SourceConfig
from lorakit.config.errors import LorakitError
from lorakit.data.check import Check, check_format
from lorakit.data.mend import draw_rows
from lorakit.data.rows import (
    DELIMITERS,
    IndexedRows,
    LazyRows,
    fields_at,
    place_of,
    read_rows,
    unread_rows,
)
from lorakit.data.schemas import Choice, Judged, Labelled, Prompt, Row
from lorakit.files.hub import hub_id
from lorakit.files.local import as_path

FILES = {".jsonl", ".ndjson", ".json", ".parquet", ".gz", *DELIMITERS}


class MixedRows(LazyRows):
    """The rows of several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]):
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)

    def fetch(self, index: int) -> Row:
        part, number = self._at(index)
        return part[number]

    def place(self, index: int) -> str:
        return place_of(*self._at(index))

    def fields(self, index: int) -> Any:
        return fields_at(*self._at(index))

    def _at(self, index: int) -> tuple[Sequence[Row], int]:
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)


def open_data(config: DataConfig, *, skip_empty: bool = False) -> dict[str, Sequence[Row]]:
    """Return the rows that a run file names, for training and for validation.

    Args:
        config: What the run file says of data.
        skip_empty: Leave out rows with an empty answer, as `read_rows` does.

    Returns:
        The rows under "train", and under "validation" if the file names some. Those of a single
        source wait for the first pass, which checks them.

    Raises:
        LorakitError: A file or data set cannot be read, has fewer rows than are wanted, or holds
            pairs of answers where another source holds none.
    """
    sources = {"train": config.train, "validation": config.validation}
    return {
        name: _mixed(said, config, name, skip_empty)
        for name, said in sources.items()
        if said is not None
    }


def _mixed(
    said: str | list[SourceConfig], config: DataConfig, split: str, skip_empty: bool
) -> Sequence[Row]:
    sources = [SourceConfig(said)] if isinstance(said, str) else said
    opened = [_opened(source, config, split, skip_empty) for source in sources]
    if len(sources) == 1 and sources[0].rows is None:
        return opened[0]
    parts = [read_rows(rows) for rows in opened]
    counts = shares_of(sources, [len(rows) for rows in parts])
    parts = [
        rows if len(rows) == count else draw_rows(rows, count, config.seed)
        for rows, count in zip(parts, counts, strict=True)
    ]
    kinds = [_kind(rows[0]) for rows in parts]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise LorakitError(
            f"{place_of(parts[0], 0)} {kinds[0]}, and {place_of(parts[other], 0)} {kinds[other]}: "
            "a run learns one kind of row"
        )
    return MixedRows(parts)


def _kind(row: Row) -> str:
    """Say what a row is, as far as an objective takes one kind alone."""
    if isinstance(row, Choice):
        return "has two answers to choose from"
    if isinstance(row, Judged):
        return "has an answer that is good or bad"
    if isinstance(row, Labelled):
        return "has a class"
    return "is a prompt alone" if isinstance(row, Prompt) else "has one answer"


def shares_of(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[int]:
    """Return how many rows each source gives, of as many as it has.

    The rows of sources with a weight are in the ratio of the weights, as many as there can be if no
    row is taken twice; the largest remainders are rounded up. Raises LorakitError if a source has
    fewer rows than it should give, or would give none.
    """
    counts = []
    for source, size in zip(sources, sizes, strict=True):
        if source.rows is not None and source.rows > size:
            raise LorakitError(f"{source.path} has {size:,} rows, and {source.rows:,} are wanted")
        counts.append(source.rows or size)
    weights = {i: Fraction(str(s.weight)) for i, s in enumerate(sources) if s.weight is not None}
    if not weights:
        return counts
    whole = sum(weights.values())
    total = int(min(sizes[i] * whole / weight for i, weight in weights.items()))
    exact = {i: total * weight / whole for i, weight in weights.items()}
    by_rest = sorted(exact, key=lambda i: (int(exact[i]) - exact[i], i))
    missing = total - sum(map(int, exact.values()))
    for place, i in enumerate(by_rest):
        counts[i] = int(exact[i]) + (place < missing)
        if not counts[i]:
            raise LorakitError(
                f"{sources[i].path} would give no row of {total:,} with its weight of "
                f"{sources[i].weight}; raise the weight, or take the source out"
            )
    return counts


def _opened(
    source: SourceConfig, config: DataConfig, split: str, skip_empty: bool
) -> Sequence[Row]:
    """Return the rows of one source, which wait for the first pass."""
    format, columns = source.format or config.format, source.columns or config.columns
    path, known = as_path(source.path), Path(source.path).suffix.lower() in FILES
    repo = None if known else hub_id(source.path)
    if repo is None and not path.is_dir():
        given = ("name", "split", "revision", "streaming")
        for name in given:
            if getattr(source, name):
                raise LorakitError(
                    f"{source.path} is no data set, so it has no {name}: take it out"
                )
        return unread_rows(source.path, format=format, skip_empty=skip_empty, columns=columns)
    check_format(format)
    values = _data_set(source, repo or str(path), source.split or split)
    check = Check(source.path, format, None, skip_empty, columns)
    return IndexedRows(values, f"{source.path} row", check)


def _data_set(source: SourceConfig, path: str, split: str) -> Any:
    """Return the rows of a data set of the Hub or of a directory, as `datasets` holds them."""
    try:
        import datasets
    except ImportError:
        raise LorakitError(
            f"{source.path} is a data set of the Hub or a directory, which needs datasets; install "
            "lorakit[data]"
        ) from None
    tag = source.path.partition(":")[2] if path != source.path else ""
    options: Mapping[str, Any] = {
        "name": source.name or tag or None,
        "split": split,
        "revision": source.revision,
        "streaming": source.streaming,
    }
    try:
        found = datasets.load_dataset(path, **options)
        return list(islice(found, source.rows)) if source.streaming else found
    except Exception as error:  # of the Hub's client, of pyarrow or of fsspec, as it happens
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LorakitError(
            f"{source.path} cannot be read as a data set, with split {split!r}: {reason:.300}"
        ) from error
