"""The curves of a run: metrics.jsonl, read as it grows, and kept as arrays.

A line that is not written whole waits until it is, unless it is longer than any that a run writes;
then it is left out. A file that was begun again, or cut back to a checkpoint by a resumed run, is
noticed by the bytes before the place that was read last; then it is read from its start.
"""

import json
import math
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.board.downsample import LEAST, downsample
from lorakit.board.folder import METRICS, NotThereError, open_file
from lorakit.config.errors import LorakitError

_PART = 4 << 20  # bytes that are read and parsed at a time
_SEAM = 256  # bytes before the place read last that must still be the same
_MOST_NUMBERS = 40_000_000  # of all runs that are kept: 320 MB


class Series:
    """The values of one quantity by rising steps."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """Add a value. It takes the place of those of this step and of later ones."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def extend(self, steps: "array[int]", values: "array[float]") -> None:
        """Add values of steps that rise, all of them after the last one."""
        self.steps.extend(steps)
        self.values.extend(values)


class Metrics:
    """The numbers that a run has written so far."""

    def __init__(self, run: Path):
        """Read nothing yet.

        Args:
            run: The folder of the run.
        """
        self.path, self.lock = run / METRICS, threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin again: nothing was read."""
        self.series: dict[str, Series] = {}
        self._offset, self._seam = 0, b""
        self._tokens = 0.0

    def read(self) -> None:
        """Read what was written since the last time. Raises NotThereError if there is no file."""
        with self.lock, open(open_file(self.path), "rb", buffering=0) as file:
            if not self._goes_on(file.fileno()):
                self.forget()
            rest = b""
            while part := os.pread(file.fileno(), _PART, self._offset + len(rest)):
                whole, newline, rest = (rest + part).rpartition(b"\n")
                if newline:
                    self._take(whole)
                elif len(rest) >= _PART:  # no run writes such a line
                    whole, rest = rest, b""
                self._offset += len(whole) + len(newline)
                self._seam = (self._seam + whole + newline)[-_SEAM:]

    def _goes_on(self, file: int) -> bool:
        start = self._offset - len(self._seam)
        return os.pread(file, len(self._seam), start) == self._seam

    def _take(self, text: bytes) -> None:
        lines = [line for line in parsed(text) if _has_step(line)]
        if not self._take_columns(lines):
            for line in lines:
                self._take_line(line)

    def _take_line(self, line: dict[str, Any]) -> None:
        step = line["step"]
        for name, value in line.items():
            double = number(value)
            if name != "step" and double is not None:
                self._add(name, step, double)
        self._add_seconds(step, line)

    def _take_columns(self, lines: list[dict[str, Any]]) -> bool:
        """Take many lines at once, a quantity after the other, if they are as runs write them.

        Return whether they were: the steps rise, the values are numbers, and no quantity stands in
        two kinds of line. Otherwise nothing has changed.
        """
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for line in lines:
            kinds.setdefault(tuple(line), []).append(line)
        names = [name for kind in kinds for name in kind if name != "step"]
        found: dict[str, tuple[array[int], array[float]]] = {}
        if len(set(names)) < len(names) or "seconds" in names:
            return False
        for kind, same in kinds.items():
            steps = array("q", map(itemgetter("step"), same))
            for name in kind:
                column = list(map(itemgetter(name), same))
                if not set(map(type, column)) <= {int, float}:
                    return False
                try:
                    found[name] = steps, array("d", column)
                except OverflowError:  # a whole number with hundreds of digits
                    return False
        found.pop("step", None)
        if not all(self._rises(name, steps) for name, (steps, _) in found.items()):
            return False
        for name, (steps, values) in found.items():
            self._series(name).extend(steps, values)
        if "tokens" in found and "tokens_per_second" in found:
            (steps, tokens), (others, rates) = found["tokens"], found["tokens_per_second"]
            if steps is others:  # of the same lines
                self._add_all_seconds(steps, tokens, rates)
        return True

    def _rises(self, name: str, steps: "array[int]") -> bool:
        before = self.series[name].steps[-1:] if name in self.series else array("q")
        return bool((np.diff(np.array(before + steps)) > 0).all())

    def _series(self, name: str) -> Series:
        series = self.series.get(name)
        if series is None:
            series = self.series[name] = Series()
        return series

    def _add(self, name: str, step: int, value: float) -> None:
        self._series(name).add(step, value)

    def _add_seconds(self, step: int, line: dict[str, Any]) -> None:
        """Add how long the steps took until now, which the tokens and their rate tell."""
        tokens, rate = number(line.get("tokens")), number(line.get("tokens_per_second"))
        if tokens is not None and rate is not None and rate > 0:
            so_far = self.series["seconds"].values[-1] if "seconds" in self.series else 0.0
            self._add("seconds", step, so_far + max(0.0, tokens - self._tokens) / rate)
            self._tokens = tokens

    def _add_all_seconds(
        self, steps: "array[int]", tokens: "array[float]", rates: "array[float]"
    ) -> None:
        rate, count = np.array(rates), np.array([self._tokens, *tokens])
        if not ((rate > 0) & np.isfinite(rate)).all() or not np.isfinite(count).all():
            for step, seen, each in zip(steps, tokens, rates, strict=True):
                self._add_seconds(step, {"tokens": seen, "tokens_per_second": each})
            return
        series = self._series("seconds")
        took = np.maximum(np.diff(count), 0.0) / rate
        so_far = series.values[-1] if series.values else 0.0
        sums = np.cumsum(np.concatenate([[so_far], took]))[1:]
        series.extend(steps, array("d", sums.tolist()))
        self._tokens = tokens[-1]

    def numbers(self) -> int:
        """Return how many numbers are kept."""
        return sum(2 * len(series.steps) for series in self.series.values())

    def curves(
        self, points: int, names: Iterable[str] | None = None, since: int = -1
    ) -> dict[str, dict[str, list[Any]]]:
        """Return curves, downsampled.

        Args:
            points: How many points a curve has at most.
            names: The quantities; None: all.
            since: The step after which the curves begin.

        Returns:
            {name: {"step": [...], "value": [...]}}; a value that is not finite is None. Names that
            the run does not have are left out.

        Raises:
            LorakitError: `points` is too small.
        """
        if points < LEAST:
            raise LorakitError(f"points is {points}; it must be at least {LEAST}")
        with self.lock:
            wanted = list(self.series) if names is None else [n for n in names if n in self.series]
            arrays = {
                name: (np.array(self.series[name].steps), np.array(self.series[name].values))
                for name in dict.fromkeys(wanted)
            }
        found = {}
        for name, (steps, values) in arrays.items():
            start = int(np.searchsorted(steps, since, side="right"))
            steps, values = steps[start:], values[start:]
            kept = downsample(values, points)
            found[name] = {"step": steps[kept].tolist(), "value": _numbers(values[kept])}
        return found

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations: step, eval_loss and the other names that begin with eval_."""
        with self.lock:
            found: dict[int, dict[str, Any]] = {}
            for name, series in self.series.items():
                if name.startswith("eval_"):
                    for step, value in zip(series.steps, series.values, strict=True):
                        line = found.setdefault(step, {"step": step})
                        line[name] = value if math.isfinite(value) else None
        return [found[step] for step in sorted(found)]


class Cache:
    """The metrics of the runs that were asked for last."""

    def __init__(self, most: int = _MOST_NUMBERS):
        """Keep nothing yet.

        Args:
            most: How many numbers are kept; the run asked for last stays in any case.
        """
        self.most, self.lock = most, threading.Lock()
        self.kept: OrderedDict[Path, Metrics] = OrderedDict()

    def of(self, run: Path) -> Metrics:
        """Return the metrics of a run as its file has them now, none if there is no file yet."""
        with self.lock:
            metrics = self.kept.setdefault(run, Metrics(run))
            self.kept.move_to_end(run)
        try:
            metrics.read()
        except NotThereError:
            metrics.forget()
        with self.lock:
            while len(self.kept) > 1 and sum(m.numbers() for m in self.kept.values()) > self.most:
                self.kept.popitem(last=False)
        return metrics


def parsed(text: bytes) -> Iterator[dict[str, Any]]:
    """Yield the objects in lines of JSON. What is none is left out."""
    lines = [line for line in text.split(b"\n") if line.strip()]
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        values = [_parsed(line) for line in lines]
    if len(values) != len(lines):  # a line held several
        values = [_parsed(line) for line in lines]
    for value in values:
        if isinstance(value, dict):
            yield value


def number(value: object) -> float | None:
    """Return a value as a double, None if it is no number that one holds."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None


def _has_step(line: dict[str, Any]) -> bool:
    step = line.get("step")
    return type(step) is int and 0 <= step < 2**63


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _numbers(values: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
