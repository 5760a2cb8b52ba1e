"""Numbers that come from a device later."""

import torch
from torch import Tensor


class Late:
    """A small tensor on its way to the host, which waits for it only where it is read."""

    def __init__(self, t: Tensor):
        self._values, self._there = t, None
        if t.device.type != "cpu":
            on_gpu = t.device.type == "cuda"
            self._values = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=on_gpu)
            self._values.copy_(t, non_blocking=True)
            if on_gpu:
                self._there = torch.cuda.Event()
                self._there.record(torch.cuda.current_stream(t.device))

    def read(self) -> list[float]:
        """Return the values, when they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()
