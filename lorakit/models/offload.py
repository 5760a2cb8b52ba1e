"""Inputs of blocks that wait in host memory until backward, copied while blocks compute.

    forward    block i's input goes to pinned host memory on a side stream while the block computes,
               and its memory on the device is free again when block i + 1 begins
    backward   before block i runs again, the copy of block i - 1's input begins on another stream

So the device holds two inputs at most, of the block that runs and of one beside it. The last one
of a pass stays, since backward begins with it. The bytes of one input are the price of the second
buffer; for it no block waits for the bus as long as a copy takes less time than a block.

Whoever computes waits for copies on the device, by events, and the host waits for nothing. Without
a GPU's streams the copies are plain ones in the same order.
"""

import torch
from torch import Tensor

from lorakit.kernels import pretend


class SideStreams:
    """Two streams of a device beside the one that computes: for copies to the host, and back."""

    def __init__(self, device: torch.device):
        self.device = device
        self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))

    def to_host(self, host: Tensor, x: Tensor) -> torch.cuda.Event:
        """Begin to copy x to host memory; return the event of its end."""
        return self._copy(self._out, host, x, x)

    def from_host(self, x: Tensor, host: Tensor) -> torch.cuda.Event:
        """Begin to copy host memory to x; return the event of its end."""
        return self._copy(self._in, x, host, x)

    def wait(self, event: torch.cuda.Event) -> None:
        """Let all that is asked for from now on come after an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(
        self, stream: torch.cuda.Stream, to: Tensor, source: Tensor, here: Tensor
    ) -> torch.cuda.Event:
        # what was asked for so far may still write to its memory, or read from it
        stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        here.record_stream(stream)  # also if it is given back before anybody has waited
        return stream.record_event()


class Offload:
    """The inputs of the blocks of one forward pass.

    Args:
        device: Where the blocks compute.

    Attributes:
        streams: What copies beside the blocks; None makes plain copies.
    """

    def __init__(self, device: torch.device):
        self.streams = SideStreams(device) if device.type == "cuda" else None
        self._last: OffloadedInput | None = None

    def put(self, x: Tensor) -> "OffloadedInput":
        """Begin to copy the input of the next block to host memory, and return what gives it back.

        The input of the block before leaves the device.
        """
        if self._last is not None:
            self._last.leave()
        self._last = OffloadedInput(x.detach(), self._last, self.streams)
        return self._last


class OffloadedInput:
    """The input of one block, in host memory and perhaps on the device too.

    Args:
        x: The input.
        before: That of the block before, which backward asks for next.
        streams: As of `Offload`.
    """

    def __init__(self, x: Tensor, before: "OffloadedInput | None", streams: SideStreams | None):
        self.before, self.streams, self.device = before, streams, x.device
        on_host = pretend.kind_of(x.device) == "cpu"
        place = x.device if on_host else torch.device("cpu")
        self.host = torch.empty(x.shape, dtype=x.dtype, device=place, pin_memory=x.is_cuda)
        self._here: Tensor | None = x
        self._copied: torch.cuda.Event | None = None
        if streams is None:
            self.host.copy_(x)
        else:
            self._copied = streams.to_host(self.host, x)

    def leave(self) -> None:
        """Let go of what lies on the device, whose next user waits until the host has it."""
        self._wait()
        self._here = None

    def take(self) -> Tensor:
        """Return the input on the device, and begin to fetch that of the block before."""
        self._fetch()
        if self.before is not None:
            self.before._fetch()
        self._wait()
        x, self._here = self._here, None
        assert x is not None
        return x

    def _fetch(self) -> None:
        if self._here is not None:
            return
        self._here = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        if self.streams is None:
            self._here.copy_(self.host)
        else:  # which comes after the copy to the host, since `leave` has waited for it
            self._copied = self.streams.from_host(self._here, self.host)

    def _wait(self) -> None:
        if self.streams is not None and self._copied is not None:
            self.streams.wait(self._copied)
