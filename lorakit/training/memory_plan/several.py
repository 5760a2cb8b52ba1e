"""Rank 0 of several that are not there, for a forecast: FSDP2 itself, and nothing is sent.

FSDP2 wants streams of its device, and refuses weights on the meta device. `pretended_mesh` changes
that in torch, for the whole process. So it is entered in a process of its own alone; elsewhere.py
starts that one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from lorakit.evaluation.share import Share
from lorakit.training.memory_plan.ledger import GATHERED, Ledger

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Absent:
    """The meetings of rank 0 with others that are not there; the protocol of gradients.py.

    Args:
        size: The number of ranks.
    """

    def __init__(self, size: int):
        self.share = Share(0, size)

    def exchange(self, received: Tensor, sent: Tensor) -> None:
        """Send nothing."""

    def gather(self, received: Tensor, sent: Tensor) -> None:
        """Send nothing."""

    def collect(self, received: Tensor | None, sent: Tensor, where: int) -> None:
        """Send nothing."""

    def add_up(self, values: Tensor) -> None:
        """Send nothing."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return the flags of this rank."""
        return list(flags)


class _Event:
    def record(self, stream: Any = None) -> "_Event":
        return self


class _Stream:
    """A stream that waits for nothing; `name` is that of its memory in the pool."""

    def __init__(self, name: str = "", priority: int = 0):
        self.name = name

    def wait_stream(self, other: "_Stream") -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return _Event()


class _Device:
    """What FSDP2 asks of the module of a device, such as torch.cuda."""

    Event = _Event

    def __init__(self, ledger: Ledger):
        self.ledger, self.streams = ledger, 0

    def Stream(self, priority: int = 0) -> _Stream:
        """Return a stream, whose memory no other stream is given."""
        self.streams += 1
        return _Stream(f"stream {self.streams}")

    def current_stream(self, device: Any = None) -> _Stream:
        """Return the stream of what runs now."""
        return _Stream(self.ledger.arena)

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        """Take new memory from that of a stream while the `with` block runs."""
        before, self.ledger.arena = self.ledger.arena, stream.name
        try:
            yield
        finally:
            self.ledger.arena = before

    def current_device(self) -> int:
        """Return the number of the device."""
        return 0


@contextmanager
def pretended_mesh(ranks: int, ledger: Ledger) -> Iterator["DeviceMesh"]:
    """Be rank 0 of so many, all on the meta device, inside the `with` block.

    It changes torch meanwhile, in this whole process; see the module.

    Args:
        ranks: The number of ranks, 1 for weights in host memory.
        ledger: What books the memory that they take.

    Yields:
        The mesh [ranks].
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with ExitStack() as stack:
        patched = mock.patch.object
        stack.enter_context(patched(torch, "meta", _Device(ledger), create=True))
        stack.enter_context(patched(FSDPParamGroup, "_validate_no_meta_params", lambda group: None))
        stack.enter_context(patched(FSDPParam, "reset_sharded_param", _reset))
        stack.enter_context(gathering(ledger))
        distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        stack.callback(distributed.destroy_process_group)
        yield init_device_mesh("meta", (ranks,))


def _reset(param: Any) -> None:
    """Let FSDP2 send from what the model holds, filled up to parts of one size, as on a GPU.

    It takes no notice of tensors on the meta device, and would keep others of its own.
    """
    found = param.sharded_param = getattr(param._module_info.module, param._module_info.param_name)
    local, size = found._local_tensor, param.padded_sharded_param_size
    if local.size() != size:
        rows = len(local) if local.numel() else 0
        filled = local.new_empty(size)
        found._local_tensor = filled[:rows]
        local = filled
    param._sharded_param_data = local.view(-1)


@contextmanager
def gathering(ledger: Ledger) -> Iterator[None]:
    """Book what FSDP2 gathers inside the `with` block, and what it gives back without a word.

    It changes torch meanwhile, as `pretended_mesh` does.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    def booked(gather: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with ledger.as_kind(GATHERED):
                return gather(*args, **options)

        return run

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        ledger.resized(storage)
        return found

    with ExitStack() as stack:
        for name in ("unshard", "wait_for_unshard"):
            real = getattr(FSDPParamGroup, name)
            stack.enter_context(mock.patch.object(FSDPParamGroup, name, booked(real)))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        yield
