"""The curves of a run: metrics.jsonl, read as it grows, and kept as arrays.

A line that is not written whole waits until it is. A file that was begun again, or cut back to a
checkpoint by a resumed run, is noticed by its size and by the bytes before the place that was read
last; then it is read from its start.
"""

import json
import math
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.board.downsample import LEAST, downsample
from lorakit.board.folder import METRICS, open_file
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


class Metrics:
    """The numbers that a run has written so far."""

    def __init__(self, run: Path):
        """Read nothing yet.

        Args:
            run: The folder of the run.
        """
        self.path, self.lock = run / METRICS, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, Series] = {}
        self._offset, self._seam = 0, b""
        self._tokens = 0.0

    def read(self) -> None:
        """Read what was written since the last time. Raises NotThereError if there is no file."""
        with self.lock, open(open_file(self.path), "rb", buffering=0) as file:
            if not self._goes_on(file.fileno()):
                self._forget()
            rest = b""
            while part := os.pread(file.fileno(), _PART, self._offset + len(rest)):
                whole, newline, rest = (rest + part).rpartition(b"\n")
                if newline:
                    self._take(whole)
                    self._offset += len(whole) + 1
                    self._seam = (self._seam + whole + newline)[-_SEAM:]

    def _goes_on(self, file: int) -> bool:
        start = self._offset - len(self._seam)
        return os.pread(file, len(self._seam), start) == self._seam

    def _take(self, text: bytes) -> None:
        for line in parsed(text):
            step = line.pop("step", None)
            if type(step) is not int or not 0 <= step < 2**63:
                continue
            for name, value in line.items():
                if type(value) is float or (type(value) is int and abs(value) < 2**63):
                    self._add(name, step, value)
            self._add_seconds(step, line)

    def _add(self, name: str, step: int, value: float) -> None:
        series = self.series.get(name)
        if series is None:
            series = self.series[name] = Series()
        series.add(step, value)

    def _add_seconds(self, step: int, line: dict[str, Any]) -> None:
        """Add how long the steps took until now, which the tokens and their rate tell."""
        tokens, rate = line.get("tokens"), line.get("tokens_per_second")
        if isinstance(tokens, int | float) and isinstance(rate, int | float) and rate > 0:
            so_far = self.series["seconds"].values[-1] if "seconds" in self.series else 0.0
            self._add("seconds", step, so_far + max(0.0, tokens - self._tokens) / rate)
            self._tokens = tokens

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
        """Return the metrics of a run as its file has them now.

        Raises NotThereError if there is no file.
        """
        with self.lock:
            metrics = self.kept.setdefault(run, Metrics(run))
            self.kept.move_to_end(run)
        metrics.read()
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


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _numbers(values: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
