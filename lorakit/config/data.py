"""What a run file says of data: files or data sets of the Hub, and how much of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.fields import check_positive, from_mapping


@dataclass(frozen=True)
class SourceConfig:
    """Settings of one source of rows: a file, or a data set of the Hub."""

    path: str
    """File of rows, directory of a data set, or id of a data set on the Hub, as org/name or
    org/name:config."""
    name: str | None = None
    """Configuration of a data set; null takes its only one."""
    split: str | None = None
    """Split of a data set; null takes train for the training rows and validation for the others."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub; null takes the newest one."""
    format: str | None = None
    """Format of the rows of this source; null takes that of data."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the fields that hold what lorakit wants, as {prompt: question}; other fields keep
    their names. An empty mapping takes that of data."""
    rows: int | None = None
    """Number of rows to take, drawn by the seed of data; null takes all."""
    weight: float | None = None
    """Share of the rows, compared with the weights of the other sources. No row is taken twice:
    the source that is used up first sets the size. Null takes all rows, or as many as rows says."""
    streaming: bool = False
    """Read the first rows of a data set on the Hub without downloading the others; rows says how
    many."""

    def __post_init__(self) -> None:
        check_positive(self, "rows", "weight", or_null=True)
        if self.rows is not None and self.weight is not None:
            raise LorakitError(f"{self.path} has rows and weight: keep one of them")
        if self.streaming and self.rows is None:
            raise LorakitError(f"{self.path} is streamed: say how many rows to read, as rows")


@dataclass(frozen=True)
class DataConfig:
    """Settings of the data: files of rows, data sets of the Hub, and mixtures of them."""

    train: str | list[SourceConfig]
    """Rows to train on: a file in JSONL, JSON, CSV, TSV or Parquet, a data set of the Hub, or a
    list of sources, whose rows are mixed."""
    validation: str | list[SourceConfig] | None = None
    """Rows to evaluate on, likewise; null evaluates on none."""
    format: str | None = None
    """Format of the rows: "messages", "sharegpt", "prompt_completion", "preference", "alpaca",
    "text", "unpaired_preference", "prompt_only" or "classification"; null lets the fields of the
    first row tell, and the objective classification."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the fields that hold what lorakit wants, as {prompt: question}, in all sources that
    name none of their own."""
    seed: int = 0
    """Seed by which the rows are drawn of a source that gives only some of them."""

    def __post_init__(self) -> None:
        for name, sources in (("train", self.train), ("validation", self.validation)):
            if isinstance(sources, str) or sources is None:
                continue
            if not sources:
                raise LorakitError(f"{name} is an empty list; name a source")
            if sum(source.weight is not None for source in sources) == 1:
                raise LorakitError(
                    f"{name}: one source alone has a weight, and there is nothing to compare it "
                    "with; give another one a weight too, or say rows"
                )


def data_config(values: Any, where: str) -> DataConfig:
    """Return the settings of data that a mapping holds.

    A source is a mapping, or its path alone. Raises LorakitError if a name or a value is wrong.
    """
    if isinstance(values, Mapping):
        values = dict(values)
        for name in ("train", "validation"):
            said = values.get(name)
            if isinstance(said, Mapping):
                said = [said]
            if isinstance(said, list):
                values[name] = [
                    _source(item, f"{where}, {name} {i}") for i, item in enumerate(said)
                ]
    return from_mapping(DataConfig, values, where)


def _source(item: Any, where: str) -> SourceConfig:
    return from_mapping(SourceConfig, {"path": item} if isinstance(item, str) else item, where)


# What an entry of `datasets` may say: the names that mean the same here, and those of columns.
SAME = ("path", "name", "split", "revision", "streaming")
COLUMNS = {
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field": "text",
}


def source_of(entry: Mapping[Any, Any], notes: list[str]) -> dict[str, Any]:
    """Return the source that an entry of Axolotl or TRL means, and add lines about it to `notes`.

    Raises ValueError if it says what lorakit cannot do.
    """
    source: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for key, said in entry.items():
        if key in ("type", "ds_type"):
            notes.append(f"{key} of datasets is ignored: the fields of a row say how to read")
        elif key in SAME:
            source[key] = said
        elif key in COLUMNS:
            columns[COLUMNS[key]] = said
        else:
            raise ValueError(f"{key!r} of an entry cannot be honoured: take it out")
    if "path" not in source:
        raise ValueError("the entry has no path")
    return source | ({"columns": columns} if columns else {})
