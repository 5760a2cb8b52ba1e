"""What a run says while it trains: files of JSON lines, a progress bar, trackers.

All that a run prints goes through here to standard output: `say` before the first step, `Log.say`
from then on, so that a line does not tear the progress bar.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lorakit.config.metrics import METRICS
from lorakit.config.training import TrainConfig
from lorakit.files.local import write_text
from lorakit.training.trackers.reporter import Reporter
from lorakit.training.trackers.tracker import TrackedRun

SAMPLES = "samples.jsonl"
ROLLOUTS = "rollouts.jsonl"
_heard = True  # whether lines are printed; of several processes those of one are


def say(line: str) -> None:
    """Print a line, for a run that has no log yet."""
    if _heard:
        print(line, flush=True)


@contextmanager
def heard(yes: bool) -> Iterator[None]:
    """Print what is said in the block, or not."""
    global _heard
    before, _heard = _heard, yes
    try:
        yield
    finally:
        _heard = before


class _Lines:
    """A file of JSON lines, each of which tells of a step.

    `done` is the number of steps that are done already. Lines of later steps, and lines that are
    damaged, leave the file.
    """

    def __init__(self, path: Path, done: int, say: Callable[[str], None]):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = [line for line in text.splitlines(keepends=True) if _is_kept(line, done)]
        write_text(path, "".join(kept))
        self.name, self.say = path.name, say
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.lost = False  # whether a line could not be written

    def write(self, values: Mapping[str, Any]) -> None:
        """Write a line, whole or not at all: a full disk costs lines, not the run."""
        line, start = (json.dumps(values) + "\n").encode(), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(start)
            if not self.lost:
                self.say(
                    f"lorakit: {self.name} could not be written ({error.strerror}); the run goes "
                    "on, and lines of it are missing"
                )
            self.lost = True


class RunFiles:
    """Writes metrics.jsonl, samples.jsonl and rollouts.jsonl, and tells the trackers.

    `done` is the number of steps that are done already. Samples are written if the config asks for
    some, and the completions that GRPO learns from. `say` prints a line. Raises LorakitError if a
    tracker is asked for and not installed.
    """

    def __init__(self, output_dir: Path, done: int, config: TrainConfig):
        self.metrics, self.shown = _Lines(output_dir / "metrics.jsonl", done, self.say), None
        if config.eval_samples or (output_dir / SAMPLES).exists():
            self.shown = _Lines(output_dir / SAMPLES, done, self.say)
        self.learned: _Lines | None = None
        if config.grpo is not None or (output_dir / ROLLOUTS).exists():
            self.learned = _Lines(output_dir / ROLLOUTS, done, self.say)
        tracked = TrackedRun(output_dir, done, asdict(config))
        self.reporter = Reporter(config.trackers, tracked, self.say)

    def close(self) -> None:
        """Close the files, and wait for the trackers."""
        self.metrics.file.close()
        for lines in (self.shown, self.learned):
            if lines is not None:
                lines.file.close()
        self.reporter.end()

    def step(self, **values: Any) -> None:
        """Write the values of a step, by the names of metrics.jsonl."""
        self.metrics.write(values)
        self.reporter.report(values)

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Write the result of an evaluation, and say it."""
        values = {"step": step, **{f"eval_{name}": value for name, value in result.items()}}
        self.metrics.write(values)
        self.reporter.report(values)
        scores = "".join(f", {n} {v:.4f}" for n, v in result.items() if n in METRICS)
        self.say(f"{self.place(step)}: validation loss {result['loss']:.4f}{scores}")

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write how the model completed some validation rows."""
        for sample in samples:
            assert self.shown is not None  # the config asks for samples
            self.shown.write({"step": step, **sample})

    def rollouts(self, completions: Sequence[Mapping[str, Any]]) -> None:
        """Write the graded completions that a step has learned from."""
        for each in completions:
            assert self.learned is not None  # the objective is grpo
            self.learned.write(each)

    def say(self, line: str) -> None:
        """Print a line."""
        say(line)

    def place(self, step: int) -> str:
        """Return how a line begins that is about a step."""
        return f"step {step}"


class Log(RunFiles):
    """The files of a run, and a progress bar, or plain lines if there is no terminal."""

    def __init__(self, output_dir: Path, total: int, done: int, config: TrainConfig):
        self.total = total
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=None)
        super().__init__(output_dir, done, config)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.close()

    def step(self, **values: Any) -> None:
        """Write and show the values of a step, by the names of metrics.jsonl."""
        super().step(**values)
        reward = f"reward {values['reward']:.4f}, " if "reward" in values else ""
        line = (
            f"{reward}loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{values['tokens_per_second']:.0f} tok/s, {values['peak_memory_mb']:.0f} MB"
        )
        if self.bar.disable:
            say(f"{self.place(values['step'])}: {line}")
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.bar.disable:
            say(line)
        else:
            self.bar.write(line)

    def place(self, step: int) -> str:
        return f"step {step}/{self.total}"


class SilentLog(Log):
    """The log of a process that writes and shows nothing, since another one does."""

    def __init__(self, *_: Any) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def step(self, **values: Any) -> None: ...

    def evaluation(self, step: int, result: Mapping[str, float]) -> None: ...

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def rollouts(self, completions: Sequence[Mapping[str, Any]]) -> None: ...

    def say(self, line: str) -> None: ...


def _is_kept(line: str, done: int) -> bool:
    """Whether a line of metrics.jsonl is whole and tells of a step up to `done`.

    A run that was killed may have cut the last line, and come further than its last checkpoint.
    """
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return line.endswith("\n") and isinstance(step, int) and step <= done
