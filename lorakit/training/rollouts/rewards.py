"""The rewards of completions: built in, or functions of the user's own.

    exact_match      1 if the completion is the column's text, white space around both apart
    numeric_answer   1 if the last number of the completion is the last number of the column
    regex            1 if the pattern is found in the completion
    length           1 - |n - length| / length for a completion of n characters, at least 0
    json_schema      1 if the completion is JSON that fits the schema (the package jsonschema)

Everything else is a function, f(prompts, completions, **columns) -> one number for each completion,
called by these names, as TRL calls them. prompts and completions are texts, or for chats lists of
messages, and columns are the other fields of the rows, a list each.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.grpo import BUILT_IN, RewardConfig
from lorakit.data.schemas import Prompt, Row
from lorakit.files.local import as_path

RewardFunction = Callable[..., Sequence[float]]
_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Graded(NamedTuple):
    """A completion that is to be graded, and the prompt that it answers."""

    row: Prompt
    text: str


class Rewards:
    """The rewards of a run, by name.

    Args:
        configs: Their settings.
        given: The functions that the caller has named himself.

    Raises:
        LorakitError: A name is that of no reward, or the function of a file cannot be read.
    """

    def __init__(self, configs: Sequence[RewardConfig], given: Mapping[str, RewardFunction]):
        self.configs = configs
        check_names(configs, given)
        self._functions = {each.name: _function(each, given) for each in configs}

    def __call__(self, graded: Sequence[Graded]) -> dict[str, list[float]]:
        """Return the rewards of completions, a list for each reward by its name.

        Raises LorakitError if a function raises, or returns something else than a finite number for
        each completion, or if a row lacks the column of a reward.
        """
        if not graded:  # of a process without prompts
            return {each.name: [] for each in self.configs}
        return {each.name: self._of(each, graded) for each in self.configs}

    def check_columns(self, rows: Iterable[Row]) -> None:
        """Raise LorakitError if a row lacks what a reward of lorakit's own compares with.

        Neither may a function get a column under the name of what it is given anyway.
        """
        own = [each for each in self._functions.values() if isinstance(each, _BuiltIn)]
        others, own = len(own) < len(self._functions), [each for each in own if each.compares]
        for row in rows:
            assert isinstance(row, Prompt)  # `encode_for` has seen to it
            for each in own:
                each(Graded(row, ""))
            taken = sorted(row.columns.keys() & {"prompts", "completions"})
            if others and taken:
                raise LorakitError(
                    f"{row.place}: reward functions get {taken[0]!r} from the run; give the field "
                    "of that name another one"
                )

    def total(self, values: Mapping[str, list[float]]) -> list[float]:
        """Return the weighted sum of the rewards of each completion."""
        weighted = [[each.weight * value for value in values[each.name]] for each in self.configs]
        return [math.fsum(each) for each in zip(*weighted, strict=True)]

    def _of(self, config: RewardConfig, graded: Sequence[Graded]) -> list[float]:
        function = self._functions[config.name]
        if isinstance(function, _BuiltIn):
            return [function(each) for each in graded]
        names = {name: None for each in graded for name in each.row.columns}
        columns = {name: [each.row.columns.get(name) for each in graded] for name in names}
        prompts = [each.row.prompt for each in graded]
        completions = [_as_prompt(each) for each in graded]
        try:
            found = list(function(prompts=prompts, completions=completions, **columns))
        except Exception as error:  # of the user's code, whatever it is
            raise LorakitError(
                f"reward {config.name} failed with {type(error).__name__}: {error} "
                f"(on completions of {_places(graded)})"
            ) from error
        if len(found) != len(graded):
            raise LorakitError(
                f"reward {config.name} returned {len(found)} numbers for {len(graded)} completions"
            )
        pairs = zip(found, graded, strict=True)
        return [_number(value, config.name, each) for value, each in pairs]


def _places(graded: Sequence[Graded]) -> str:
    return ", ".join(dict.fromkeys(each.row.place for each in graded))


def _as_prompt(graded: Graded) -> str | list[dict[str, Any]]:
    """Return a completion in the form of its prompt: text, or one message of the assistant."""
    if isinstance(graded.row.prompt, str):
        return graded.text
    return [{"role": "assistant", "content": graded.text}]


def _number(value: Any, name: str, graded: Graded) -> float:
    """Return a reward as a number. Raises LorakitError if it is none, or not finite."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LorakitError(
            f"{graded.row.place}: reward {name} is {value!r:.60} for the completion "
            f"{graded.text!r:.60}; it must be a finite number"
        )
    return number


# ---- where a reward comes from -------------------------------------------------------------------


def _function(
    config: RewardConfig, given: Mapping[str, RewardFunction]
) -> "_BuiltIn | RewardFunction":
    """Return what computes a reward. Raises LorakitError if the function of a file is not there."""
    if config.name in given:
        return given[config.name]
    return _BuiltIn(config) if config.name in BUILT_IN else _from_file(config.name)


def check_names(configs: Sequence[RewardConfig], given: Mapping[str, RewardFunction]) -> None:
    """Check that rewards have names of functions or files that are there; no file is run.

    Args:
        configs: The settings of the rewards.
        given: The functions that the caller has named himself.

    Raises:
        LorakitError: A name is that of no reward, or of a file that is not there; or a JSON schema
            is none.
    """
    known = [*BUILT_IN, *given]
    for each in configs:
        if each.schema is not None:
            _fits(each.schema)
    for name in [each.name for each in configs if each.name not in known]:
        if ":" not in name:
            raise LorakitError(
                f"reward {name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}, "
                "and functions of a file, as rewards.py:brevity"
            )
        path = _path_of(name)
        if not path.is_file() or path.suffix != ".py":
            raise LorakitError(f"reward {name}: {path} is no Python file")


def _path_of(name: str) -> Path:
    return as_path(name.rpartition(":")[0])


def _from_file(name: str) -> RewardFunction:
    """Return the function of a Python file, which is run. Raises LorakitError if it has none."""
    path, function = _path_of(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a .py file there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of the user's code, whatever it is
        raise LorakitError(f"reward {name}: {path} failed with {error!r}") from error
    found = vars(module).get(function)
    if not callable(found):
        raise LorakitError(
            f"reward {name}: {path} has no function {function!r}"
            f"{nearest(function, [key for key, value in vars(module).items() if callable(value)])}"
        )
    return found


class _BuiltIn:
    """A reward that lorakit has itself."""

    def __init__(self, config: RewardConfig):
        self.config = config
        self.compares = config.name in ("exact_match", "numeric_answer")  # with a column
        self._compute = {
            "exact_match": self._exact_match,
            "numeric_answer": self._numeric_answer,
            "regex": self._regex,
            "length": self._length,
            "json_schema": self._json_schema,
        }[config.name]
        self._fits = None if config.schema is None else _fits(config.schema)

    def __call__(self, graded: Graded) -> float:
        return float(self._compute(graded))

    def _answer(self, graded: Graded) -> str:
        """Return what the row says the answer is. Raises LorakitError if it says nothing."""
        column, columns = self.config.column, graded.row.columns
        if columns.get(column) is None:
            raise LorakitError(
                f"{graded.row.place} has no field {column!r}{nearest(column, columns)}, which "
                f"reward {self.config.name} compares with"
            )
        return str(columns[column])

    def _exact_match(self, graded: Graded) -> bool:
        return graded.text.strip() == self._answer(graded).strip()

    def _numeric_answer(self, graded: Graded) -> bool:
        wanted, said = _last_number(self._answer(graded)), _last_number(graded.text)
        if wanted is None:
            raise LorakitError(
                f"{graded.row.place}: field {self.config.column!r} holds no number for reward "
                "numeric_answer"
            )
        return said == wanted

    def _regex(self, graded: Graded) -> bool:
        assert self.config.pattern is not None
        return re.search(self.config.pattern, graded.text) is not None

    def _length(self, graded: Graded) -> float:
        assert self.config.length is not None
        return max(0.0, 1 - abs(len(graded.text) - self.config.length) / self.config.length)

    def _json_schema(self, graded: Graded) -> bool:
        assert self._fits is not None
        try:
            value = json.loads(graded.text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return False
        return self._fits(value)


def _no_json(text: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON lacks."""
    raise ValueError(f"{text} is no JSON")


def _fits(schema: dict[str, Any]) -> Callable[[Any], bool]:
    """Return what says whether a value fits a JSON schema; references stay inside the schema.

    Raises LorakitError if it is no schema, or the package jsonschema is not there.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise LorakitError(
            "reward json_schema needs jsonschema; pip install 'lorakit[rewards]'"
        ) from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise LorakitError(f"reward json_schema: the schema is none: {error.message}") from None
    validator = kind(schema, registry=Registry())  # which fetches nothing

    def fits(value: Any) -> bool:
        try:
            return validator.is_valid(value)
        except Unresolvable as error:
            raise LorakitError(f"reward json_schema: the schema lacks {error.ref!r}") from None
        except RecursionError:
            return False

    return fits


def _last_number(text: str) -> float | None:
    """Return the last number of a text, whose commas part thousands; None if it has none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
