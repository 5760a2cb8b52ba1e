"""TensorBoard's files, in the folder tensorboard of the run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorakit.training.trackers.tracker import TrackedRun, with_slashes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files. Of a resumed run TensorBoard hides what came after the checkpoint."""

    writer: "SummaryWriter"

    def start(self, run: TrackedRun) -> None:
        """Open a file."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.output_dir / "tensorboard"), purge_step=run.done + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar for each metric."""
        for name, value in with_slashes(values).items():
            self.writer.add_scalar(name, value, step)

    def end(self) -> None:
        """Close the file."""
        self.writer.close()
