"""A comparison file: models, tasks, settings and seeds, each combination of which is a run.

models: [a, b] or {name: model}        what is fine-tuned
tasks: {name: file or mapping}         rows, and what their answers are measured by
settings: {name: {keys of a run file}} what differs between two runs of one model
seeds: [0, 1]                          repetitions
base: {keys of a run file}             what all runs share
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import check_types, from_mapping, without_unset
from lorakit.config.metrics import METRICS

Kind = Literal["classification", "extraction", "writing", "text"]
METRICS_OF: dict[Kind, list[str]] = {
    "classification": ["accuracy", "macro_f1", "weighted_f1"],
    "extraction": ["entity_f1", "exact_match", "partial_match"],
    "writing": ["rouge_l"],
    "text": [],
}
BERT_SCORE = "bert_score"
UNTRAINED = "untrained"
"""What a model without training is called where others have the name of their settings."""
_OF_THE_GRID = ("model", "data", "output_dir", "seed", "resume", "adapter", "push_to_hub")
_LONGEST_NAME = 60  # characters


@dataclass(frozen=True)
class TaskConfig:
    """Settings of one task of a comparison: its rows, and how answers to them are measured."""

    data: str | None = None
    """File of rows, or data set of the Hub, which is divided by content: 80 of 100 rows train, 10
    validate and 10 test."""
    train: str | None = None
    """Rows to train on, instead of data."""
    validation: str | None = None
    """Rows to evaluate on while a run trains, beside train; null evaluates on none."""
    test: str | None = None
    """Rows to measure the models by, beside train."""
    kind: Kind = "writing"
    """Kind of the task, which chooses the metrics: "classification", "extraction", "writing", or
    "text", whose rows have no answers and are measured by their loss alone."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the completions: those of a run file's eval_metrics, and bert_score. The first one
    decides. An empty list takes those of the kind."""
    format: str | None = None
    """Format of the rows; null lets the fields of the first row tell."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the fields that hold what lorakit wants, as {prompt: question}."""

    def __post_init__(self) -> None:
        check_types(self)
        if (self.data is None) == (self.train is None):
            raise LorakitError("give data, which is divided, or train and test: one of the two")
        if self.train is not None and self.test is None:
            raise LorakitError("train needs test, the rows to measure the models by")
        if self.data is not None and (self.validation or self.test):
            raise LorakitError("data is divided; take out validation and test, or give train")
        for name in self.metrics:
            if name not in (*METRICS, BERT_SCORE):
                known = [*METRICS, BERT_SCORE]
                raise LorakitError(
                    f"unknown metric {name!r}{nearest(name, known)}; there are {', '.join(known)}"
                )
        if self.kind == "text" and self.metrics:
            raise LorakitError("rows of kind text have no answers: take out metrics")

    @property
    def measured_by(self) -> list[str]:
        """The metrics of the completions, the one that decides first."""
        return list(dict.fromkeys(self.metrics)) or METRICS_OF[self.kind]


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison: models, tasks, settings and seeds over what all runs share."""

    models: dict[str, str]
    """Models by name, each a directory, a .gguf file or a Hub id. A list takes the last part of
    each for its name."""
    tasks: dict[str, TaskConfig]
    """Tasks by name; a file alone is a task of kind writing."""
    output_dir: str
    """Directory for the runs, the rows, the predictions and comparison.json."""
    name: str = "comparison"
    """Name of the comparison."""
    base: dict[str, Any] = field(default_factory=dict)
    """Keys of a run file that all runs share."""
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    """Keys of a run file by name, each laid over base; a model is trained once with each."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds; every model is trained with every settings once for each."""
    baseline: bool = True
    """Measure the untrained models too."""
    exports: list[str] = field(default_factory=list)
    """Quantizations of GGUF, such as q4_k_m, of which size and speed are measured."""
    encoder: str | None = None
    """Model whose hidden states bert_score compares; null takes the first of the models."""

    def __post_init__(self) -> None:
        check_types(self)
        for what in ("models", "tasks", "settings"):
            named = getattr(self, what)
            if not named:
                raise LorakitError(f"{what} is empty; name at least one")
            _check_names(what, named)
        _check_names("name", [self.name])
        if UNTRAINED in self.settings:
            raise LorakitError(f"settings: {UNTRAINED} is what models without training are called")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise LorakitError("seeds must be at least one number, each given once")
        for where, keys in {"base": self.base, **self.settings}.items():
            for key in keys:
                if key in _OF_THE_GRID:
                    raise LorakitError(
                        f"{where}: {key} is not for a comparison, which sets it for each run or has"
                        " no use for it: take it out"
                    )

    @classmethod
    def from_dict(cls, values: Any, where: str = "comparison file") -> "ComparisonConfig":
        """Build the settings of a comparison from the mapping of its file.

        Args:
            values: The mapping.
            where: The name of the file in messages.

        Returns:
            The settings.

        Raises:
            LorakitError: A key is unknown or missing, a value is wrong, or two models would have
                one name.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r:.60}")
        values = dict(values)
        if isinstance(values.get("models"), list):
            values["models"] = _named(values["models"], where)
        if isinstance(values.get("tasks"), Mapping):
            values["tasks"] = {
                name: _task(said, f"{where}, task {name}") for name, said in values["tasks"].items()
            }
        if isinstance(values.get("settings"), Mapping):  # `plain:` alone says nothing more
            values["settings"] = {n: {} if v is None else v for n, v in values["settings"].items()}
        return from_mapping(cls, without_unset(cls, values), where)


def _task(said: Any, where: str) -> Any:
    if isinstance(said, str):
        said = {"data": said}
    return from_mapping(TaskConfig, without_unset(TaskConfig, said), where)


def _named(models: list[Any], where: str) -> dict[Any, Any]:
    """Return models by the last parts of their paths; raise LorakitError if two share one."""
    names = [PurePath(str(model)).name.removesuffix(".gguf") for model in models]
    for name in names:
        if names.count(name) > 1:
            raise LorakitError(
                f"{where}: two models are called {name!r:.60}; give them names, as "
                "{small: path, large: path}"
            )
    return dict(zip(names, models, strict=True))


def _check_names(what: str, names: Iterable[str]) -> None:
    """Raise LorakitError for a name that no table can show."""
    for name in names:
        if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise LorakitError(
                f"{what}: {name!r:.80} is no name; one has 1 to {_LONGEST_NAME} letters that can "
                "be printed"
            )


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Return the fields of settings, and of settings in them, by names such as "lora.r"."""
    if not dataclasses.is_dataclass(values) or isinstance(values, type):
        return {name: values}
    return {
        inner: value
        for f in dataclasses.fields(values)
        for inner, value in flat(
            getattr(values, f.name), f"{name}.{f.name}" if name else f.name
        ).items()
    }
