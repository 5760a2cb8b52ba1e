"""Rows at a time that are "auto": how a run splits the rows of a step, decided before its first.

The rows of a step are a setting (`TrainConfig.rows_of_step`), and only their split follows from the
memory: into as few batches as it holds, each a part of them without a rest. So the number of steps,
the rows of each and the weight of each row are the same on any machine. A resumed run has the split
that its checkpoint says, whatever the memory is now.
"""

import dataclasses

import torch
from torch import Tensor

from lorakit.adapters.manage import adapter_config, selected_adapter
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.examples import Examples
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedLinear
from lorakit.models.shards import is_sharded
from lorakit.training import state as run_state
from lorakit.training.memory import free_memory
from lorakit.training.memory_plan import elsewhere
from lorakit.training.memory_plan.before import surely_fits
from lorakit.training.memory_plan.planned import PlannedRun
from lorakit.training.memory_plan.search import rows_that_fit
from lorakit.training.ranks import Ranks
from lorakit.training.resume import checkpoint_to_resume
from lorakit.training.units import format_bytes

SHARE = 0.95  # of the memory that is given away; free memory changes while a run goes on
# A process on a CPU takes up to this many times the bytes of torch's tensors (docs/memory.md).
RESIDENT = 2.5


def with_split(
    model: Decoder,
    examples: Examples,
    config: TrainConfig,
    ranks: Ranks,
    teacher: Decoder | None = None,
) -> tuple[TrainConfig, str]:
    """Return the settings with numbers of rows and batches in the place of "auto".

    Args:
        model: The model with its adapter, on its device.
        examples: The examples of the run.
        config: The settings of the run.
        ranks: The processes that train together; those of one machine share the memory of a CPU.
        teacher: The teacher that the config names, loaded already.

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
        rows, why = _fitting_rows(model, examples, config, ranks, teacher)
    split = config.split(rows)
    line = f"auto: {rows} rows at a time, {split.batches_of_step} times a step, {why}"
    return split, line


def _fitting_rows(
    model: Decoder,
    examples: Examples,
    config: TrainConfig,
    ranks: Ranks,
    teacher: Decoder | None,
) -> tuple[int, str]:
    """Return how many rows at a time fit, and why it is that many."""
    device = model.device
    free = free_memory(device) // (ranks.on_machine if device.type == "cpu" else 1)
    whole = config.split(config.rows_of_step)
    try:
        run = _planned(model, examples, whole, ranks)
        if surely_fits(run, free):
            return whole.rows_of_step, "which is all of them"
        left = SHARE * free / (RESIDENT if device.type == "cpu" else 1)
        held = _held(model) + (0 if teacher is None else _held(teacher))
        rows = rows_that_fit(run, int(held + left))
    except (LorakitError, RuntimeError) as error:
        return 1, f"since there is no forecast of memory ({error})"
    finally:
        elsewhere.end()  # a training needs its memory
    if rows == 0:
        return 1, "although the forecast is that not even one row fits"
    if rows == whole.rows_of_step:
        return rows, "which is all of them"
    return rows, f"which is what fits into {format_bytes(free)}"


def _planned(model: Decoder, examples: Examples, config: TrainConfig, ranks: Ranks) -> PlannedRun:
    """Return the run of a model that is loaded, to be forecast."""
    packed = (layer.config for layer in model.modules() if isinstance(layer, PackedLinear))
    selected, device, mesh = selected_adapter(model), model.device, model.mesh
    dividers = 1 if mesh is None else mesh.size(mesh.ndim - 1)
    waits = mesh is not None and any(part.device.type != device.type for part in _parts(model))
    run = PlannedRun(
        model.config,
        config,
        None if selected is None else adapter_config(model, selected),
        next(packed, None),
        str(model.dtype).removeprefix("torch."),
        examples.lengths,
        device="cpu" if device.type == "cpu" else "cuda",
        ranks=dividers if dividers > 1 else ranks.size,
        shard="full" if dividers > 1 else "none",
        offload_weights=waits,
    )
    if device.type == "cuda":
        run = dataclasses.replace(run, capability=torch.cuda.get_device_capability(device))
    return run


def _held(model: Decoder) -> int:
    """Return the bytes of a model's parameters that this process holds on the model's device."""
    return sum(part.nbytes for part in _parts(model) if part.device.type == model.device.type)


def _parts(model: Decoder) -> list[Tensor]:
    """Return the parameters of a model, or this process's parts of them."""
    return [p.to_local() if is_sharded(p) else p for p in model.parameters()]
