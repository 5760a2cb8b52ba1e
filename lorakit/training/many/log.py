"""What a run of several adapters says: the files of each, and one line or bar for all.

step 12/40: 8 adapters, 1432 tok/s, 812 MB, loss 0.9312 (large) to 1.4410 (small)
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from lorakit.config.training import TrainConfig
from lorakit.training.log import RunFiles, say

_ALL = 3  # so many losses are named one by one


class Shown:
    """The line of each step, or a progress bar if there is a terminal.

    Args:
        total: The number of steps of the longest run.
        done: The number of them that are done.
    """

    def __init__(self, total: int, done: int):
        self.total, self.step = total, done
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=None)
        self.told: dict[str, dict[str, Any]] = {}

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Note the values of an adapter's step."""
        self.told[name] = values

    def end_step(self) -> None:
        """Show what was noted since the last call, if anything was."""
        if not self.told:
            return
        step = max(values["step"] for values in self.told.values())
        per_second = sum(values["tokens_per_second"] for values in self.told.values())
        peak = max(values["peak_memory_mb"] for values in self.told.values())
        losses = sorted((values["loss"], name) for name, values in self.told.items())
        if len(losses) <= _ALL:
            said = "loss " + ", ".join(f"{name} {v['loss']:.4f}" for name, v in self.told.items())
        else:
            (low, best), (high, worst) = losses[0], losses[-1]
            said = f"loss {low:.4f} ({best}) to {high:.4f} ({worst})"
        counted = f"{len(losses)} adapter{'s' * (len(losses) > 1)}"
        line = f"{counted}, {per_second:.0f} tok/s, {peak:.0f} MB, {said}"
        if self.bar.disable:
            say(f"step {step}/{self.total}: {line}")
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(max(0, step - self.step))
        self.step, self.told = max(step, self.step), {}

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.bar.disable:
            say(line)
        else:
            self.bar.write(line)

    def close(self) -> None:
        """End the progress bar."""
        self.bar.close()


class MemberLog(RunFiles):
    """The files of one adapter's run, whose lines begin with its name."""

    def __init__(self, name: str, shown: Shown, output_dir: Path, done: int, config: TrainConfig):
        self.name, self.of_all = name, shown
        super().__init__(output_dir, done, config)

    def step(self, **values: Any) -> None:
        """Write the values of a step, and let them be shown with those of the others."""
        super().step(**values)
        self.of_all.note(self.name, values)

    def say(self, line: str) -> None:
        """Print a line."""
        if line.startswith("lorakit: "):
            self.of_all.say(f"lorakit: {self.name}: {line.removeprefix('lorakit: ')}")
        else:
            self.of_all.say(f"{self.name}: {line}")
