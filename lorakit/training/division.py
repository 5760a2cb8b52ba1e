"""Whether the ranks of a run divide its weights (models/sharding.py)."""

import os
from typing import TYPE_CHECKING

import torch

from lorakit.config.errors import LorakitError
from lorakit.config.fields import to_dtype
from lorakit.config.run import RunConfig
from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.models.devices import own_device
from lorakit.models.load import stored_bytes
from lorakit.training.adamw import MIN_8BIT_SIZE, state_bytes
from lorakit.training.memory import free_memory
from lorakit.training.ranks import RankGroup, start_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARE = 0.5  # of the free memory that whole weights may take; the rest is for the steps


def mesh_of_run(run: RunConfig) -> "DeviceMesh | None":
    """Return the ranks that divide the weights of a run, for `load_model`.

    With `shard: auto` they divide the weights if these take more than half of a rank's free memory.
    All ranks must ask.

    Args:
        run: The settings of the run.

    Returns:
        The mesh of all ranks; None if each has all weights, or there is one process.

    Raises:
        LorakitError: Ranks are missing, or have other settings; or the model's files cannot be
            read.
    """
    device = own_device()
    if not start_group(device):
        return None
    whole = run.shard == "none"
    divided = not whole and (run.shard == "full" or _is_large(run, device))
    ranks = RankGroup(device)
    found = False
    try:
        some_whole, some_not, some_divided = ranks.any_of([whole, not whole, divided])
        found = True
    finally:
        ranks.leave(done=found)
    if some_whole and some_not:
        raise LorakitError("train: some ranks have another shard; all need the same")
    if not some_divided:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (ranks.size,))


def with_what_trains(weights: int, train: TrainConfig, dtype: torch.dtype) -> float:
    """Return the bytes of weights; if they train, with their gradients and optimizer state."""
    if train.train != "full":
        return weights
    bits, paged = OPTIMIZERS[train.optim]
    some = torch.empty(MIN_8BIT_SIZE, dtype=dtype, device="meta")
    state = 0 if paged else state_bytes(some, bits) / some.nbytes
    return weights * (2 + state)


def _is_large(run: RunConfig, device: torch.device) -> bool:
    """Return whether the weights would take too much of this rank's free memory."""
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dtype = to_dtype(run.dtype)
    weights = stored_bytes(run.model, dtype, run.quantize)
    return copies * with_what_trains(weights, run.train, dtype) > SHARE * free_memory(device)
