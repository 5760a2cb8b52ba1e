"""The device of a process that loads a model, or the mesh of devices that divide the weights."""

import os
from typing import TYPE_CHECKING

import torch

from lorakit.config.errors import LorakitError
from lorakit.models.sharding import mesh_of_one
from lorakit.models.shards import device_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def device_and_mesh(
    device: str | torch.device | None, mesh: "DeviceMesh | None", offload: bool
) -> tuple[torch.device, "DeviceMesh | None"]:
    """Return where a model is to lie, given what `load_model` was told.

    Raises LorakitError if both are given.
    """
    if mesh is None:
        device = own_device() if device is None else torch.device(device)
        return device, mesh_of_one(device) if offload else None
    if device is not None:
        raise LorakitError("load_model: give a device or a mesh, which has one, and not both")
    return device_of(mesh), mesh


def own_device() -> torch.device:
    """Return the device of this process, which may be one of several that torchrun has started.

    Raises LorakitError if there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = os.environ.get("LOCAL_RANK")
    if number is None:
        return torch.device("cuda")
    if int(number) >= (count := torch.cuda.device_count()):
        raise LorakitError(
            f"load_model: this is process {number} of its machine, counted from 0, and the machine "
            f"has GPUs for {count}; start as many processes as there are GPUs"
        )
    return torch.device("cuda", int(number))
