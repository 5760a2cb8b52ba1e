"""Weights & Biases. Its own variables hold: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.

The project is lorakit if WANDB_PROJECT names none.
"""

import os
from collections.abc import Mapping
from typing import Any

from lorakit.training.trackers.tracker import (
    TrackedRun,
    identity,
    keep_identity,
    new_identity,
    with_slashes,
)


class WeightsAndBiases:
    """Logs to a run of Weights & Biases that is called as output_dir is."""

    run: Any

    def start(self, run: TrackedRun) -> None:
        """Begin a run, or go on with the one that is resumed."""
        import wandb

        known = identity(run, "wandb") or new_identity()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lorakit"),
            name=run.output_dir.name,
            id=known,
            resume="allow",
            dir=str(run.output_dir),
            config=run.settings,
            settings=wandb.Settings(console="off"),  # what the run prints is no affair of it
        )
        keep_identity(run, "wandb", known)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log(with_slashes(values), step=step)

    def end(self) -> None:
        """Finish the run, whose last metrics are uploaded."""
        self.run.finish()
