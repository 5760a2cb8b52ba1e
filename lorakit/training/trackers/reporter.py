"""Hands a run's metrics to trackers, which neither stop nor slow it.

Each tracker has a thread and a queue. `report` puts a line into the queue and returns. A line that
finds the queue full is left out, and the end of the run says how many were. When a tracker raises,
one line says why, and the run goes on without it. The end of the run waits for trackers PATIENCE
seconds at most.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrackerName
from lorakit.training.trackers.mlflow import MLflow
from lorakit.training.trackers.tensorboard import TensorBoard
from lorakit.training.trackers.tracker import TrackedRun, Tracker
from lorakit.training.trackers.trackio import Trackio
from lorakit.training.trackers.wandb import WeightsAndBiases

ROOM = 10_000  # lines that may wait for a tracker
PATIENCE = 30.0  # seconds that the end of a run waits for its trackers

TRACKERS: dict[TrackerName, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}

_RENAMED = {"tokens": "num_tokens"}  # as TRL calls it


def check_trackers(names: list[TrackerName]) -> None:
    """Raise LorakitError unless the package of each tracker is installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LorakitError(f"report_to: {name} is not installed; pip install 'lorakit[{name}]'")


class Reporter:
    """The trackers of a run."""

    def __init__(
        self, names: list[TrackerName], run: TrackedRun, say: Callable[[str], None]
    ) -> None:
        """Start the trackers. `say` takes the lines that the user should read."""
        check_trackers(names)
        self.threads = [_Thread(name, TRACKERS[name](), run) for name in names]
        self.say = say

    def report(self, values: Mapping[str, Any]) -> None:
        """Hand a line of metrics.jsonl to the trackers: its numbers, by its step."""
        numbers = {
            _RENAMED.get(name, name): float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float)
        }
        for each in self.threads:
            each.put((values["step"], numbers))
        self._complain()

    def end(self) -> None:
        """Let the trackers finish, and say what went wrong."""
        until = time.monotonic() + PATIENCE
        for each in self.threads:
            each.queue_end(until)
        for each in self.threads:
            each.thread.join(max(0.0, until - time.monotonic()))
        self._complain()
        for each in self.threads:
            if each.thread.is_alive():
                self.say(f"lorakit: report_to: {each.name} did not finish in {PATIENCE:.0f} s")
            if each.left_out:
                self.say(
                    f"lorakit: report_to: {each.name} was too slow, and lacks {each.left_out} "
                    "lines that are in metrics.jsonl"
                )

    def _complain(self) -> None:
        for each in self.threads:
            if each.failure is not None and not each.said:
                each.said = True
                self.say(
                    f"lorakit: report_to: {each.name} failed, and the run goes on without it: "
                    f"{each.failure}"
                )


class _Thread:
    """A tracker, and the thread that calls it."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun):
        self.name, self.tracker, self.run = name, tracker, run
        self.queue: Queue[tuple[int, Mapping[str, float]] | None] = Queue(ROOM)
        self.failure: str | None = None
        self.said = False  # whether the user knows of the failure
        self.left_out = 0
        # a daemon: a tracker that hangs does not keep the process alive
        self.thread = Thread(target=self._work, name=f"lorakit {name}", daemon=True)
        self.thread.start()

    def put(self, line: tuple[int, Mapping[str, float]]) -> None:
        if self.failure is None:
            try:
                self.queue.put_nowait(line)
            except Full:
                self.left_out += 1

    def queue_end(self, until: float) -> None:
        """Queue the end of the run. A tracker that hangs with a full queue never sees it."""
        if self.failure is None:
            try:
                self.queue.put(None, timeout=max(0.0, until - time.monotonic()))
            except Full:
                self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self.queue.get_nowait()
            except Empty:
                return

    def _work(self) -> None:
        try:
            self.tracker.start(self.run)
            while (line := self.queue.get()) is not None:
                self.tracker.log(*line)
            self.tracker.end()
        except BaseException as error:  # wandb raises what is no Exception, too
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failure = f"{reason:.300}"
            self._drain()
