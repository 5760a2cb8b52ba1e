"""The rows of the tasks: divided once by content, the same for every run, and checked to stay so.

A task with `data` is divided into train.jsonl, validation.jsonl and test.jsonl under
output_dir/data. The part of a row follows from its content, so equal rows are in one part. The
digests of the parts are noted with each run. If the source changes later, nothing is mixed: the
comparison stops with a sentence.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.comparison.grid import task_folder
from lorakit.config.comparison import ComparisonConfig, TaskConfig
from lorakit.config.data import DataConfig, SourceConfig
from lorakit.config.errors import LorakitError
from lorakit.data.rows import read_rows
from lorakit.data.schemas import Prompt, Row
from lorakit.data.sources import FILES, open_data
from lorakit.data.splitting import SelectedRows, content_digest, split_rows
from lorakit.data.write import write_rows
from lorakit.evaluation.score import is_bad
from lorakit.files.local import as_path

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task, by part, with a digest of each part's content and order."""

    parts: dict[str, Sequence[Row]]
    """Rows by "train", "test" and maybe "validation"."""
    digests: dict[str, str]
    """Digest of each part."""
    notes: list[str]
    """What a reader should know: sentences."""
    divided_into: Path | None
    """Folder for the parts, if they were divided and are to be written there."""


def open_task(config: ComparisonConfig, name: str) -> TaskRows:
    """Return the rows of a task, all read and checked. Nothing is written.

    Rows with a bad answer, for KTO, are none to test with. Raises LorakitError if rows cannot be
    read, a part would be empty, a row to test with has no answer, or the source was changed after
    it was divided.
    """
    said, folder = config.tasks[name], None
    skip_empty = config.base.get("skip_empty") is True
    if said.data is not None:
        folder = task_folder(config, name)
        rows = _opened(said.data, said, f"task {name}", skip_empty=skip_empty)
        parts = dict(zip(PARTS, split_rows(rows), strict=True))
        empty = [part for part in PARTS if not len(parts[part])]
        if empty:
            raise LorakitError(
                f"task {name}: the {len(rows)} rows of {said.data} leave none to {empty[0]}; it "
                "takes more rows, or files of their own as train, validation and test"
            )
    else:
        given = {"train": said.train, "validation": said.validation, "test": said.test}
        parts = {
            part: _opened(path, said, f"task {name}, {part}", part, skip_empty)
            for part, path in given.items()
            if path is not None
        }
    parts["test"] = _good(parts["test"], name)
    without = next((row for row in parts["test"] if isinstance(row, Prompt)), None)
    if without is not None:
        raise LorakitError(f"task {name}: {without.place} has no answer to measure models by")
    contents = {part: list(map(content_digest, rows)) for part, rows in parts.items()}
    digests = {part: _digest_of(found) for part, found in contents.items()}
    if folder is not None and (folder / "train.jsonl").exists():
        _check_unchanged(folder, said, name, digests)
    return TaskRows(parts, digests, _notes(name, contents), folder)


def write_task(rows: TaskRows) -> None:
    """Write the parts of a task that was divided, unless they are there."""
    if rows.divided_into is not None and not (rows.divided_into / "train.jsonl").exists():
        write_rows({rows.divided_into / f"{part}.jsonl": rows.parts[part] for part in PARTS})


def _digest_of(contents: Iterable[bytes]) -> str:
    """Return a digest of what rows say, from those of each, and of their order."""
    return hashlib.blake2b(b"".join(contents), digest_size=16).hexdigest()


def _opened(
    path: str, said: TaskConfig, where: str, part: str = "train", skip_empty: bool = False
) -> Sequence[Row]:
    """Return the rows of a file, or those of a data set that belong to a part."""
    is_file = as_path(path).is_file() or as_path(path).suffix.lower() in FILES
    source = path if is_file else [SourceConfig(path, split=part)]
    data = DataConfig(train=source, format=said.format, columns=dict(said.columns))
    try:
        return read_rows(_read_through(open_data(data, skip_empty=skip_empty)["train"]))
    except LorakitError as error:
        raise LorakitError(f"{where}: {error}") from None


def _good(rows: Sequence[Row], name: str) -> Sequence[Row]:
    """Return the rows whose answer is not said to be a bad one, which no model should give."""
    numbers = array("q", (i for i, row in enumerate(rows) if not is_bad(row)))
    if not numbers:
        raise LorakitError(
            f"task {name}: every row to test with has a bad answer, which measures no model; give "
            "test some with good ones"
        )
    return rows if len(numbers) == len(rows) else SelectedRows(rows, numbers)


def _read_through(rows: Sequence[Row]) -> Sequence[Row]:
    """Return rows after the pass that checks each of them."""
    for _ in rows:
        pass
    return rows


def _check_unchanged(folder: Path, said: TaskConfig, name: str, digests: dict[str, str]) -> None:
    for part, digest in digests.items():
        path = folder / f"{part}.jsonl"
        rows = _opened(str(path), said, f"task {name}") if path.exists() else []
        if _digest_of(map(content_digest, rows)) != digest:
            raise LorakitError(
                f"task {name}: {path} does not hold what {said.data} gives now; it was changed "
                f"after it was divided, so remove {folder}, or choose another output_dir"
            )


def _notes(name: str, contents: dict[str, list[bytes]]) -> list[str]:
    """Return a sentence about test rows that are learned too, from the digests of all rows."""
    tested = set(contents["test"])
    leaked = sum(content in tested for content in contents["train"])
    if not leaked:
        return []
    return [f"task {name}: {leaked} of its rows to train on are test rows too, so scores are high"]
