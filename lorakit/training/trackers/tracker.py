"""What a tracker is to a run, and the names that metrics have in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from lorakit.files.local import read_text, write_text


class TrackedRun(NamedTuple):
    """What a tracker is told of a run when it starts."""

    output_dir: Path
    """The directory that the run writes to; its name is that of the run."""
    done: int
    """Steps that are done already: above 0, the run goes on with an earlier one."""
    settings: dict[str, Any]
    """The settings of the run, by their names in a run file."""


class Tracker(Protocol):
    """A place for metrics. One thread calls all three methods; each may raise anything."""

    def start(self, run: TrackedRun) -> None:
        """Begin a run, or go on with the one that is resumed."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step, or those of an evaluation after it."""

    def end(self) -> None:
        """Write what is not written yet. The run is over."""


def with_slashes(values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by the names that transformers gives them: train/loss and eval/loss."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in values.items()
    }


def identity(run: TrackedRun, tracker: str) -> str | None:
    """Return the identity that the tracker gave the run when it began; None for a new run."""
    path = _identity_file(run, tracker)
    return read_text(path).strip() if run.done and path.exists() else None


def keep_identity(run: TrackedRun, tracker: str, identity: str) -> None:
    """Write down by which identity the tracker knows the run."""
    write_text(_identity_file(run, tracker), identity + "\n")


def new_identity() -> str:
    """Return an identity that no other run has."""
    return uuid4().hex[:16]


def _identity_file(run: TrackedRun, tracker: str) -> Path:
    return run.output_dir / f"{tracker}_run.txt"
