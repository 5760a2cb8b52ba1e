"""Whether the ranks of a run divide its frozen weights (models/sharding.py)."""

import os
from typing import TYPE_CHECKING

import torch

from lorakit.config.errors import LorakitError
from lorakit.config.fields import to_dtype
from lorakit.config.run import RunConfig
from lorakit.models.devices import own_device
from lorakit.models.load import stored_bytes
from lorakit.training.memory import free_memory
from lorakit.training.ranks import start_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARE = 0.5  # of the free memory that whole weights may take; the rest is for the steps


def mesh_of_run(run: RunConfig) -> "DeviceMesh | None":
    """Return the ranks that divide the frozen weights of a run, for `load_model`.

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
    whole = run.shard == "none" or run.train.train == "full"
    divided = not whole and (run.shard == "full" or _is_large(run, device))
    found = torch.tensor([whole, not whole, divided], dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    some_whole, some_not, some_divided = found.tolist()
    if some_whole and some_not:
        raise LorakitError("train: some ranks have another shard or train; all need the same")
    if not some_divided:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    ranks = torch.distributed.get_world_size()
    return init_device_mesh(device.type, (ranks,))


def _is_large(run: RunConfig, device: torch.device) -> bool:
    """Return whether the weights would take too much of this rank's free memory."""
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = copies * stored_bytes(run.model, to_dtype(run.dtype), run.quantize)
    return needed > SHARE * free_memory(device)
