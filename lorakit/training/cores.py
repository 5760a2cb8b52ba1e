"""The threads that train a model on a CPU, whose processors others may use too.

Threads of the kernels' own (kernels/threads.py) hardly notice. They are for a model by whose
weights torch, which has one thread meanwhile, need not multiply: they are packed in NF4 or carry
LoRA, in a dtype and on a processor for which the kernels have products.

Other models are multiplied by torch, on OpenMP's threads, which wait for the slowest of them at
every loop. While a run often waits for a processor, `FewerThreads` gives torch half of its threads,
and half again. Then torch's fp32 products and sums have other last bits, as with another number of
threads in any case. So it is said, a number that somebody has set stays, before the run or in it,
and all do where torch is asked for deterministic algorithms.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.kernels import processors, threads
from lorakit.kernels.ops import products
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedLinear

STARVED = 0.25  # of the time that the run waits for a processor, from which others want them
PATIENCE = 10.0  # s that it does so before threads are taken away
AGAIN = 300.0  # s until all threads are tried again


@contextmanager
def own_threads(model: Decoder) -> Iterator[None]:
    """Give the kernels threads of their own for steps of `model`, if they do all that is large.

    Loops then wait for no thread that has not got a processor yet, so that a step on processors
    which others use too takes as long as its share of them says. `train` does it by itself. Other
    models, and GPUs, notice nothing. torch has one thread in the block.

    Args:
        model: The model, with its adapter.

    Yields:
        Nothing; steps inside the block have the threads.
    """
    if all_by_kernels(model):
        with threads.own_threads():
            yield
    else:
        yield


def all_by_kernels(model: Decoder) -> bool:
    """Return whether the kernels multiply by every weight of the model, in both directions."""
    sample, head = torch.empty(0, dtype=model.dtype, device=model.device), model.lm_head
    if not products.available(sample):
        return False
    parts = list(model.children())
    if type(head) is nn.Linear:  # the loss takes it as it is
        if not products.takes(head.weight):
            return False
        parts.remove(head)
    return all(map(_by_kernels, parts))


def _by_kernels(module: nn.Module) -> bool:
    """Return whether the kernels multiply by every weight in `module`."""
    if isinstance(module, PackedLinear):
        return products.takes(module.quantized)
    if isinstance(module, AttachedLinear):
        update = module.fusible_update()
        return (
            update is not None and update.magnitude is None and products.takes(update.base.stored)
        )
    if isinstance(module, nn.Linear):
        return False
    return all(map(_by_kernels, module.children()))


class FewerThreads:
    """Takes threads from torch in a run while others keep the processors busy.

    Nothing happens where torch has one thread, or as many as somebody has set, where it is asked
    for deterministic algorithms (`torch.use_deterministic_algorithms`), and where the system does
    not tell how long the run waits for processors.
    """

    def __init__(self, say: Callable[[str], None]):
        """Begin to watch the thread that calls; `say` gets one line if threads are taken away."""
        self.say, self.said = say, False
        stays = processors.set_by_hand() or torch.are_deterministic_algorithms_enabled()
        self.count = self.all = 1 if stays else torch.get_num_threads()
        self.calm = self.again = self.now = perf_counter()  # when the run last had processors
        self.waited = processors.waited() if self.all > 1 else None

    def after_step(self) -> None:
        """Take threads away, or give them back, by how long the run has waited of late."""
        if self.waited is None:
            return
        if torch.get_num_threads() != self.count:  # somebody has set it since
            self.waited = None
            return
        now, waited = perf_counter(), processors.waited() or 0.0
        share = (waited - self.waited) / (now - self.now)
        self.now, self.waited = now, waited
        if self.count < self.all and now >= self.again:
            self._set(self.all)
            self.calm = now
        elif share < STARVED:
            self.calm = now
        elif self.count > 1 and now - self.calm >= PATIENCE:
            self._say_once(share, self.count)
            self._set(self.count // 2)
            self.calm, self.again = now, now + AGAIN

    def end(self) -> None:
        """Give torch the threads back that were taken away."""
        if self.waited is not None and torch.get_num_threads() == self.count:
            self._set(self.all)

    def _set(self, count: int) -> None:
        torch.set_num_threads(count)
        self.count = count

    def _say_once(self, share: float, count: int) -> None:
        if not self.said:
            self.said = True
            self.say(
                f"lorakit: others keep the processors busy: a step waits for one {share:.0%} of its"
                f" time; torch has {count // 2} of {count} threads, and tries all again every"
                f" {AGAIN / 60:.0f} minutes; last bits may differ (OMP_NUM_THREADS sets a number)"
            )
