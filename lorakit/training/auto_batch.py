"""Rows at a time that are "auto": how a run splits the rows of a step, decided before its first.

The rows of a step are a setting (`TrainConfig.rows_of_step`), and only their split follows from the
memory: into as few batches as it holds, each a part of them without a rest. So the number of steps,
the rows of each and the weight of each row are the same on any machine. A resumed run has the split
that its checkpoint says, whatever the memory is now.
"""

import dataclasses

import torch

from lorakit.adapters.manage import adapter_config, selected_adapter
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.examples import Examples
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedLinear
from lorakit.training import state as run_state
from lorakit.training.memory import free_memory
from lorakit.training.memory_plan.before import surely_fits
from lorakit.training.memory_plan.planned import PlannedRun
from lorakit.training.memory_plan.search import rows_that_fit
from lorakit.training.resume import checkpoint_to_resume
from lorakit.training.units import format_bytes

SHARE = 0.95  # of the memory that is given away; free memory changes while a run goes on
# A process on a CPU takes up to this many times the bytes of torch's tensors (docs/memory.md).
RESIDENT = 2.5


def with_split(
    model: Decoder, examples: Examples, config: TrainConfig, ranks: int = 1
) -> tuple[TrainConfig, str]:
    """Return the settings with numbers of rows and batches in the place of "auto".

    Args:
        model: The model with its adapter, on its device.
        examples: The examples of the run.
        config: The settings of the run.
        ranks: The number of processes that train together, which share the memory of a CPU.

    Returns:
        The settings, and the line that says what was decided; "" if there is nothing to decide.

    Raises:
        LorakitError: The checkpoint that the run goes on from has another number of rows in a step.
    """
    if not config.splits_itself:
        return config, ""
    checkpoint = checkpoint_to_resume(as_path(config.output_dir), config)
    if checkpoint is not None:
        same, why = run_state.read_values(checkpoint)["same"], "as the checkpoint says"
        rows = int(same["per_device_train_batch_size"])
    else:
        rows, why = _fitting_rows(model, examples, config, ranks)
    split = config.split(rows)
    line = f"auto: {rows} rows at a time, {split.batches_of_step} times a step, {why}"
    return split, line


def _fitting_rows(
    model: Decoder, examples: Examples, config: TrainConfig, ranks: int
) -> tuple[int, str]:
    """Return how many rows at a time fit, and why it is that many."""
    packed = (layer.config for layer in model.modules() if isinstance(layer, PackedLinear))
    selected = selected_adapter(model)
    device = model.device
    free = free_memory(device) // (ranks if device.type == "cpu" else 1)
    whole = config.split(config.rows_of_step)
    try:
        run = PlannedRun(
            model.config,
            whole,
            None if selected is None else adapter_config(model, selected),
            next(packed, None),
            str(model.dtype).removeprefix("torch."),
            examples.lengths,
            device="cpu" if device.type == "cpu" else "cuda",
        )
        if surely_fits(run, free):
            return whole.rows_of_step, "which is all of them"
        if device.type == "cuda":
            run = dataclasses.replace(run, capability=torch.cuda.get_device_capability(device))
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        left = SHARE * free / (RESIDENT if device.type == "cpu" else 1)
        rows = rows_that_fit(run, int(own + left))
    except LorakitError as error:
        return 1, f"since there is no forecast of memory ({error})"
    if rows == 0:
        return 1, "although the forecast is that not even one row fits"
    if rows == whole.rows_of_step:
        return rows, "which is all of them"
    return rows, f"which is what fits into {format_bytes(free)}"
