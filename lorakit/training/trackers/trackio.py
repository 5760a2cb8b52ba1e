"""Trackio: a local database, or a Space on the Hub if TRACKIO_SPACE_ID names one.

The project is lorakit, or what TRACKIO_PROJECT says. TRACKIO_DIR says where the database lies.
"""

import os
from collections.abc import Mapping
from typing import Any

from lorakit.training.trackers.tracker import TrackedRun, with_slashes


class Trackio:
    """Logs to a Trackio run that is called as output_dir is."""

    run: Any

    def start(self, run: TrackedRun) -> None:
        """Begin a run, or go on with the last one of its name."""
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "lorakit"),
            name=run.output_dir.name,
            config=run.settings,
            resume="allow" if run.done else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log(with_slashes(values), step=step)

    def end(self) -> None:
        """Finish the run."""
        self.run.finish()
