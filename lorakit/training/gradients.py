"""The gradients of a step, added over its micro-batches and the ranks that compute them.

Micro-batch i of a step belongs to rank i mod R. A round is one micro-batch of every rank; in the
last round some ranks may have none. `ordered` gives the bits that one process has, which adds the
gradients one micro-batch after the other:

    each round      every rank cuts its gradients into R slices and sends slice k to rank k, which
                    adds the slices it gets to its sum, in the order of the ranks
    after the last  every rank sends its slice of the sum to all

`fast` adds a rank's own micro-batches first, and then all ranks' sums by one all-reduce, in an
order that is the library's.

A parameter without a gradient in a micro-batch, such as an expert that no token chose, sends -0.0:
x + -0.0 is x for every x, so that it counts as if nothing was added.

Gradients in bfloat16 are added in fp32, and their sum is rounded once: where every sum is rounded,
small gradients are lost. (A fast sum leaves that to the library.) It takes 4 bytes for each of
their values.

N bytes of gradients, k rounds: a rank sends (k + 1) (R - 1) / R N bytes a step if they are ordered,
and 2 (R - 1) / R N if they are fast; with one round that is the same.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorakit.evaluation.share import ALL, Share

LINE = 64  # bytes that each gradient's place begins at a multiple of, as memory of its own does


class Meeting(Protocol):
    """What the sums need of the ranks; see ranks.py."""

    @property
    def share(self) -> Share:
        """The micro-batches of this rank."""

    def exchange(self, received: Tensor, sent: Tensor) -> None:
        """Send slice k of `sent` to rank k, and receive one of each."""

    def gather(self, received: Tensor, sent: Tensor) -> None:
        """Receive what each rank has sent, one after the other."""

    def add_up(self, values: Tensor) -> None:
        """Add the values of all ranks, in any order, in place."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any rank has set it."""


class GradientSum:
    """The gradients of a step in one process: autograd adds them up, and nothing is left to do."""

    share: Share = ALL
    """The micro-batches of a step that this process computes."""
    alone = True
    """Whether there is no other process."""

    def end_round(self) -> None:
        """Take the gradients that the parameters have from one micro-batch, or from none."""

    def finish(self, losses: Sequence[Tensor], parts: int) -> list[Tensor]:
        """Give the parameters the gradients of the whole step.

        Args:
            losses: The summed loss of each own micro-batch, fp32 [].
            parts: The number of micro-batches of the step.

        Returns:
            The losses of all of them, in their order.
        """
        return list(losses)


ALONE = GradientSum()


class WideSum(GradientSum):
    """The gradients of several micro-batches in one process, those in bfloat16 added in fp32.

    Args:
        params: What trains.
    """

    def __init__(self, params: Sequence[Tensor]):
        self.params = [p for p in params if p.dtype == torch.bfloat16]
        self.sums: dict[Tensor, Tensor] = {}

    def end_round(self) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            if p in self.sums:
                self.sums[p] += p.grad
            else:
                self.sums[p] = p.grad.float()
            p.grad = None

    def finish(self, losses: Sequence[Tensor], parts: int) -> list[Tensor]:
        for p in self.params:
            if p in self.sums:
                p.grad = self.sums.pop(p).to(p.dtype)
        return list(losses)


class SumOfRanks(GradientSum):
    """The base class of sums over several ranks: what lies where in memory, and the losses.

    Args:
        ranks: The ranks, which meet in `end_round` and `finish`.
        params: What trains, the same on all ranks.
        varies: Whether a parameter may have a gradient in some steps and none in others.
    """

    alone = False

    def __init__(self, ranks: Meeting, params: Sequence[Tensor], varies: bool):
        self.ranks, self.share, self.varies = ranks, ranks.share, varies
        by_dtype = defaultdict[torch.dtype, list[Tensor]](list)
        for p in params:
            by_dtype[p.dtype].append(p)
        self.flats = [_Flat(each, self.share.size) for each in by_dtype.values()]
        self.params = [p for flat in self.flats for p in flat.params]
        self.seen = [False] * len(self.params)
        self.agreed = False  # whether all ranks know which parameters get a gradient
        self.rounds = 0

    def end_round(self) -> None:
        self.seen = [a or p.grad is not None for a, p in zip(self.seen, self.params, strict=True)]
        for flat in self.flats:
            self._take(flat)
        for p in self.params:
            p.grad = None
        self.rounds += 1

    @torch.no_grad()
    def finish(self, losses: Sequence[Tensor], parts: int) -> list[Tensor]:
        if self.varies or not self.agreed:
            self.seen, self.agreed = self.ranks.any_of(self.seen), True
        for flat in self.flats:
            self._end(flat)
        sums = [view for flat in self.flats for view in flat.places_of_all]
        for p, view, seen in zip(self.params, sums, self.seen, strict=True):
            p.grad = view if seen else None
        if self.varies:
            self.seen = [False] * len(self.params)
        own = torch.zeros(self.rounds, device=self.params[0].device)
        if losses:
            torch.stack(list(losses), out=own[: len(losses)])
        found = own.new_empty(self.share.size, self.rounds)
        self.ranks.gather(found, own)
        self.rounds = 0
        return list(found.t().reshape(-1)[:parts].unbind())

    def _take(self, flat: "_Flat") -> None:
        """Take the gradients of a round."""
        raise NotImplementedError

    def _end(self, flat: "_Flat") -> None:
        """Write the gradients of the step to `flat.all`, which the next one writes to again."""
        raise NotImplementedError


class OrderedSum(SumOfRanks):
    """Gradients that are added in the order of the micro-batches, as one process adds them."""

    @torch.no_grad()
    def _take(self, flat: "_Flat") -> None:
        flat.fill(flat.own)
        self.ranks.exchange(flat.all, flat.own)
        if self.rounds == 0:
            flat.slice.fill_(-0.0)
        for each in flat.all.view(self.share.size, -1):
            flat.slice.add_(each)

    def _end(self, flat: "_Flat") -> None:
        self.ranks.gather(flat.all, flat.slice.to(flat.all.dtype))


class FastSum(SumOfRanks):
    """Gradients that are added by one all-reduce."""

    @torch.no_grad()
    def _take(self, flat: "_Flat") -> None:
        if self.rounds == 0:
            flat.fill(flat.all)
        else:
            flat.fill(flat.own)
            flat.all.add_(flat.own)

    def _end(self, flat: "_Flat") -> None:
        self.ranks.add_up(flat.all)


class _Flat:
    """Memory for the gradients of parameters of one dtype, side by side, in one slice a rank.

    `own` are those of this rank, `all` what it gets of all, `slice` its slice of the sum.
    """

    def __init__(self, params: Sequence[Tensor], size: int):
        self.params, first = list(params), params[0]
        line, self.starts, end = LINE // first.element_size(), list[int](), 0
        for p in params:
            self.starts.append(end)
            end += math.ceil(p.numel() / line) * line
        of_rank = math.ceil(end / (size * line)) * line
        self.own, self.all = (first.new_full((of_rank * size,), -0.0) for _ in range(2))
        wide = torch.float32 if first.dtype == torch.bfloat16 else first.dtype
        self.slice = self.own.new_empty(of_rank, dtype=wide)
        self.places, self.places_of_all = self._places(self.own), self._places(self.all)

    def _places(self, flat: Tensor) -> list[Tensor]:
        """Return the place of each gradient in memory like `own`, with its parameter's strides."""
        found = []
        for p, start in zip(self.params, self.starts, strict=True):
            like = torch.empty_like(p, device="meta")
            found.append(flat.as_strided(like.shape, like.stride(), start))
        return found

    def fill(self, flat: Tensor) -> None:
        """Copy the gradients that are there, and write -0.0 for the others."""
        places = self.places if flat is self.own else self.places_of_all
        there = [
            (v, p.grad) for v, p in zip(places, self.params, strict=True) if p.grad is not None
        ]
        if len(there) < len(places):
            flat.fill_(-0.0)
        if there:
            into, grads = zip(*there, strict=True)
            torch._foreach_copy_(into, grads)
