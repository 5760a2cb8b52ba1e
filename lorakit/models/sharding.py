"""A model whose weights are divided among ranks (ZeRO-3, arXiv:1910.02054).

    blocks              a unit of FSDP2 each: whole while the block computes, forward and backward;
                        meanwhile the next one is gathered
    embedding, head     gathered where they are used, and given back at once
    norms outside       whole on every rank: a few KB

Packed codes and scales are divided as they are, as plain tensors of uint8 and fp32.

    model = lk.load_model(path, quantize="nf4", mesh=init_device_mesh("cuda", (8,)))
    lk.attach(model, ...)

Shard first, then attach: adapters are whole on every rank, and FSDP does not know them. So the
optimizer, clipping, saving and resuming see plain tensors, and a run takes the same steps on any
number of ranks. No rank needs more than its parts, one block and the head.

Every forward pass, and whatever reads a weight (`merge`, `save_model`, PiSSA), is a meeting of all
ranks of the mesh: each of them must do it. With `offload` the parts wait in host memory and a
unit's part goes to the device when its turn comes, on one rank too.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.packed_layers import NF4Weight
from lorakit.models.shards import device_of, first_row, is_sharded, keep, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    from lorakit.models.decoder import Decoder


def shard(model: "Decoder", mesh: "DeviceMesh", *, offload: bool = False) -> "Decoder":
    """Divide the weights of a model among the ranks of a mesh, in place, and freeze them.

    Every rank holds the same model; each keeps its part, and nothing is sent. A model on the meta
    device gets parts without values; `load_model(..., mesh=mesh)` fills them one tensor at a time.

    Args:
        model: The model, without adapters. It may be packed.
        mesh: [ranks], or [copies, ranks]: then the weights are divided among the ranks of a row,
            and every row has all of them.
        offload: Whether the parts wait in host memory.

    Returns:
        `model`, with `mesh` set.

    Raises:
        LorakitError: The model is sharded already, carries adapters, or the mesh has more than two
            dimensions, or two without names; or torch is older than 2.6.
    """
    if model.mesh is not None:
        raise LorakitError("shard: the model is sharded already")
    if any(isinstance(each, AdaptedLayer) for each in model.modules()):
        raise LorakitError("shard: an adapter is attached; shard the model first, then attach")
    if mesh.ndim > 2:
        raise LorakitError(f"shard: the mesh has {mesh.ndim} dimensions; one or two are wanted")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise LorakitError("shard: a mesh of two dimensions needs names (mesh_dim_names)")
    try:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    except ImportError:
        raise LorakitError(
            f"shard: torch {torch.__version__} has no fully_shard; 2.6 has"
        ) from None
    # a block returns views, and nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device, blocks = device_of(mesh), model.model.layers
    pinned = device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    on_meta = model.device.type == "meta"
    model.requires_grad_(False)
    for module in (*blocks, blocks):  # the last one has no weights of its own: it leads the others
        fully_shard(module, mesh=mesh, offload_policy=policy)
    store = torch.device("cpu") if offload else device
    if on_meta:
        blocks.to_empty(device=store)
    for end in (model.model.embed_tokens, model.lm_head):
        if end is not None:
            _divide(end, mesh, store)
    if not on_meta:
        for parameter in model.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(device)
    model.mesh = mesh
    return model


def mesh_of_one(device: torch.device) -> "DeviceMesh":
    """Return the mesh on which every process has all weights, to keep them in host memory.

    A process that belongs to no group gets a group of its own.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if device.index is not None:  # what is gathered lies on the current device
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = distributed.HashStore()
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    ranks = distributed.get_world_size()
    if ranks == 1:
        return init_device_mesh(device.type, (1,))
    return init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("copies", "ranks"))


class TakesGradients(Protocol):
    """What the gradients of gathered weights go to; training/divided.py."""

    def expect(self, whole: Tensor) -> None:
        """Note that a gradient of a divided weight will come."""

    def take(self, whole: Tensor, gradient: Tensor) -> None:
        """Take the gradient of a divided weight, of its whole shape."""


@contextmanager
def gathered(module: nn.Module, takes: TakesGradients | None = None) -> Iterator[None]:
    """Make the parameters inside a module whole for the block; all ranks must come to it together.

    What is computed inside may keep the whole tensors for backward. Changes are lost.

    Args:
        module: A module, of any size: memory must hold all of it.
        takes: What is given the gradients of the whole parameters in backward.

    Yields:
        Nothing; parameters are plain tensors inside the block.
    """
    found = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    plain: dict[int, Tensor] = {}  # by the id of its parts; two layers may share a parameter
    try:
        for owner, name, parameter in found:
            if id(parameter) not in plain:
                plain[id(parameter)] = _gathered(parameter, takes)
            owner._parameters[name] = plain[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in found:
            owner._parameters[name] = parameter  # type: ignore[assignment]
            if isinstance(owner, NF4Weight):
                owner.forget()


def _gathered(parameter: Tensor, takes: TakesGradients | None) -> Tensor:
    """Return a parameter as a whole one."""
    if takes is None or not (parameter.requires_grad and torch.is_grad_enabled()):
        return nn.Parameter(whole(parameter), parameter.requires_grad)
    takes.expect(parameter)
    anchor = torch.empty(0, requires_grad=True, device="cpu")
    found: Tensor = _Gathered.apply(anchor, whole(parameter), parameter, takes)
    return found


class _Gathered(torch.autograd.Function):
    """A whole weight that hands its gradient over.

    It is no leaf: a graph would keep a leaf to its end, and needs the embedding no more.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, found: Tensor, parameter: Tensor, takes: TakesGradients
    ) -> Tensor:
        ctx.parameter, ctx.takes = parameter, takes
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.takes.take(ctx.parameter, gradient)
        return None, None, None, None


def gathered_in_backward(y: Tensor, module: nn.Module) -> Tensor:
    """Return y, whose backward finds the parameters inside a module whole, until it has ended.

    It is for what asks a layer for its weight again in backward, as adapted layers do.
    """
    found: Tensor = _InBackward.apply(y, module)
    return found


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        stack = ExitStack()
        stack.enter_context(gathered(ctx.module))
        torch.autograd.Variable._execution_engine.queue_callback(stack.close)
        return dy, None


def divide_like(layer: nn.Module, parameter: Tensor) -> None:
    """Divide a new layer as `parameter`, of the layer that it replaces, is divided, in place.

    Nothing happens if that is whole. Who calls the layer has to gather it.
    """
    if is_sharded(parameter):
        _divide(layer, parameter.device_mesh, parameter.device)


def writes_files(mesh: "DeviceMesh | None") -> bool:
    """Return whether this process writes the files of a model; of a sharded one the first does."""
    return mesh is None or mesh.get_rank() == int(mesh.mesh.flatten()[0])


def _divide(layer: nn.Module, mesh: "DeviceMesh", store: torch.device) -> None:
    """Replace the parameters of a layer by this rank's parts of them."""
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            part = nn.Parameter(_part(parameter.detach(), mesh, store), requires_grad=False)
            layer._parameters[name] = part


def _part(t: Tensor, mesh: "DeviceMesh", store: torch.device) -> Tensor:
    """Return a tensor as a DTensor that holds this rank's rows in memory of their own."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    start, count = first_row(len(t), mesh), -(-len(t) // mesh.size(mesh.ndim - 1))
    mine = t[start : start + count]
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    # from_local would move what lies in host memory to the device of the mesh
    empty = DTensor.from_local(
        mine.to("meta"), mesh, placements, run_check=False, shape=t.shape, stride=t.stride()
    )
    part = torch.empty_like(empty, device=store)
    if not mine.is_meta:
        keep(part, t)
    return part
