"""The card of a run, and the uploads that its config asks for.

The card is written beside the adapter or the model when the run ends. An upload that fails is one
line: the run goes on, and all files stay on the disk.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.export.card import write_card
from lorakit.export.push import push_to_hub
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedWeight
from lorakit.training.progress import Progress
from lorakit.training.state import checkpoints

# Settings that a card shows in any case; it shows others where they differ from their defaults.
_SHOWN = (
    "objective",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_seq_length",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
# Settings of this machine, and of what is written or uploaded.
_HIDDEN = (
    "output_dir",
    "resume",
    "report_to",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "eval_samples",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
)

Say = Callable[[str], None]


class Publisher:
    """Writes the card of a run into its output directory, and uploads that if the run asks."""

    def __init__(
        self, output_dir: Path, model: Decoder, config: TrainConfig, base_model: str | None
    ):
        if base_model is None and model.source is not None:
            base_model = str(model.source.path)
        self.output_dir, self.model = output_dir, model
        self.config, self.base_model = config, base_model
        self.what = "model" if config.train == "full" else "adapter"

    def write_card(self, progress: Progress, say: Say) -> None:
        """Write the card beside the adapter or the model. What keeps it from that is one line."""
        try:
            settings = self._settings(progress)
            write_card(self.output_dir, base_model=self.base_model, settings=settings)
        except (LorakitError, OSError) as error:
            say(f"lorakit: no card was written: {error}")

    def _settings(self, progress: Progress) -> dict[str, Any]:
        """Return what the card tells of the run."""
        defaults = asdict(TrainConfig())
        found = {
            name: value
            for name, value in asdict(self.config).items()
            if name in _SHOWN or (name not in _HIDDEN and value != defaults[name])
        }
        packed = [layer for layer in self.model.modules() if isinstance(layer, PackedWeight)]
        kinds = {layer.config.quant_type for layer in packed}
        frozen = " and ".join(sorted(kinds)) or str(self.model.dtype).removeprefix("torch.")
        counts = {"steps": progress.step, "tokens": f"{progress.tokens:,}"}
        kept = {"weights" if self.what == "model" else "frozen weights": frozen}
        return {**found, **kept, **counts}

    def upload(self, progress: Progress, say: Say) -> str | None:
        """Upload what is saved if the run wants that, and return its address.

        A failure is one line. Ctrl-C acts as usual: all is saved already.
        """
        if not self.config.push_to_hub:
            return None
        checkpoint = None
        if self.config.hub_strategy == "checkpoint":
            checkpoint = next((each.path for each in reversed(checkpoints(self.output_dir))), None)
        assert self.config.hub_model_id is not None  # TrainConfig holds that
        try:
            return push_to_hub(
                self.output_dir,
                self.config.hub_model_id,
                private=self.config.hub_private_repo,
                message=f"Upload the {self.what} of step {progress.step} with lorakit",
                checkpoint=checkpoint,
            )
        except (LorakitError, OSError) as error:
            say(f"lorakit: {error}")
            return None

    def upload_now(self, save: Callable[[Path], None], progress: Progress, say: Say) -> None:
        """Save what the step that is done has made, and upload it. A failure is one line."""
        try:
            save(self.output_dir)
        except OSError as error:
            say(f"lorakit: nothing was uploaded: {error.strerror or error}")
            return
        self.write_card(progress, say)
        self.upload(progress, say)
