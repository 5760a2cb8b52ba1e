"""Parameters of which every rank holds a part: which they are, and how to read and write them.

Such a parameter is a DTensor of torch, cut along its first dimension into as many parts as the last
dimension of its mesh has ranks; `models/sharding.py` makes them. Of n rows each rank holds
ceil(n / ranks), the last ones fewer or none.

A part may lie in host memory while a GPU computes. The tensors that `whole` returns lie where they
are computed with.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Return whether this rank holds only a part of a tensor."""
    if type(t) in _PLAIN:  # torch's own look at it would import all of DTensor
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def whole(t: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks; one that is whole is returned as it is.

    All ranks must call it for the same tensor, since each sends its part. The result has no
    gradient.
    """
    if not is_sharded(t):
        return t
    from torch.distributed.tensor import DTensor

    mesh, local = t.device_mesh, t.to_local().detach().to(home(t))
    parts = DTensor.from_local(
        local, mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )
    return parts.full_tensor()


def keep(t: Tensor, value: Tensor) -> None:
    """Write `value`, of the tensor's whole shape, into a tensor, or this rank's part of it.

    Nothing is sent: every rank has the value. Of one that views a file only the part is read.
    """
    if not is_sharded(t):
        t.data.copy_(value)
        return
    local = t.to_local().detach()
    start = first_row(len(value), t.device_mesh)
    local.copy_(value[start : start + len(local)])


def beginnings(tensors: Sequence[Tensor], count: int) -> list[list[float]]:
    """Return the first numbers of tensors, `count` of each or all; of sharded ones on any rank.

    One message goes between ranks for all tensors.
    """
    found = [t.detach() for t in tensors]
    parts = [t.to_local() if is_sharded(t) else t for t in found]
    mine = [part.flatten()[:count].tolist() for part in parts]
    sharded = {i: t for i, t in enumerate(found) if is_sharded(t)}
    if not sharded:
        return mine
    mesh = next(iter(sharded.values())).device_mesh
    dim = mesh.ndim - 1
    gathered: list[list[list[float]]] = [[] for _ in range(mesh.size(dim))]
    sent = [mine[i] for i in sharded]
    torch.distributed.all_gather_object(gathered, sent, group=mesh.get_group(dim))
    for i, of_ranks in zip(sharded, zip(*gathered, strict=True), strict=True):
        mine[i] = [number for part in of_ranks for number in part][:count]
    return mine


def first_row(rows: int, mesh: "torch.distributed.device_mesh.DeviceMesh") -> int:
    """Return where this rank's part of so many rows begins."""
    dim = mesh.ndim - 1
    return min(rows, mesh.get_local_rank(dim) * -(-rows // mesh.size(dim)))


def home(t: Tensor) -> torch.device:
    """Return the device that computes with a tensor; a part of one may wait in host memory."""
    return device_of(t.device_mesh) if is_sharded(t) else t.device


def device_of(mesh: "torch.distributed.device_mesh.DeviceMesh") -> torch.device:
    """Return this rank's device in a mesh."""
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
