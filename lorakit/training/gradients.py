"""The gradients of a step, added over its micro-batches and the ranks that compute them.

Micro-batch i of a step belongs to rank i mod R. A round is one micro-batch of every rank; in the
last round some ranks may have none. `ordered` gives the bits that one process has, which adds the
gradients one micro-batch after the other:

    each round      every rank cuts its gradients into R slices and sends slice k to rank k, which
                    adds the slices it gets to its sum, in the order of the ranks
    in the last     every rank sends its slice of the sum to all, who write it where the gradients
                    of their own were

`fast` adds a rank's own micro-batches first, and then all ranks' sums by one all-reduce, in an
order that is the library's.

Gradients are sent in parts of a bounded size, through two small buffers. So a sum over ranks takes
no second copy of the gradients. Between the rounds of an ordered one a rank keeps its slice.

A parameter without a gradient in a micro-batch, such as an expert that no token chose, sends -0.0:
x + -0.0 is x for every x, so that it counts as if nothing was added.

Gradients in bfloat16 are added in fp32, and their sum is rounded once: where every sum is rounded,
small gradients are lost. (A fast sum leaves that to the library.) It takes 4 bytes for each of
their values.

N bytes of gradients, k rounds: a rank sends (k + 1) (R - 1) / R N bytes a step if they are ordered,
and 2 (R - 1) / R N if they are fast; with one round that is the same.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.evaluation.share import ALL, Share

BUFFER = 32 << 20  # bytes of each of the two buffers through which gradients are sent


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

    def collect(self, received: Tensor | None, sent: Tensor, where: int) -> None:
        """Let rank `where` receive what each rank has sent, one after the other; all dense."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any rank has set it."""


SUMS = 3
"""What is added up over the labels of a micro-batch: the loss, and with sft also how many labels
are the likeliest word, and the entropy of the predictions."""


class GradientSum:
    """The gradients of a step in one process: autograd adds them up, and nothing is left to do."""

    share: Share = ALL
    """The micro-batches of a step that this process computes."""
    alone = True
    """Whether there is no other process."""
    takes_rounds = False
    """Whether it takes the gradients of each round; if not, autograd adds one to the other."""

    def begin_round(self, counts: bool, last: bool) -> None:
        """Prepare a backward pass; `counts` says whether its gradients are part of the step."""

    def end_round(self, last: bool) -> None:
        """Take the gradients that the parameters have from one micro-batch, or from none.

        `last` says whether it is the last round of the step.
        """

    def finish(self, sums: Sequence[Tensor], parts: int) -> list[Tensor]:
        """Give the parameters the gradients of the whole step.

        Args:
            sums: The sums of each own micro-batch, fp32 [SUMS].
            parts: The number of micro-batches of the step.

        Returns:
            The sums of all of them, in their order.
        """
        return list(sums)


ALONE = GradientSum()


class WideSum(GradientSum):
    """The gradients of several micro-batches in one process, those in bfloat16 added in fp32.

    Args:
        params: What trains.
    """

    takes_rounds = True

    def __init__(self, params: Sequence[Tensor]):
        self.params = [p for p in params if p.dtype == torch.bfloat16]
        self.sums: dict[Tensor, Tensor] = {}

    def end_round(self, last: bool) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            if p in self.sums:
                self.sums[p] += p.grad
            else:
                self.sums[p] = p.grad.float()
            p.grad = None

    def finish(self, sums: Sequence[Tensor], parts: int) -> list[Tensor]:
        for p in self.params:
            if p in self.sums:
                p.grad = self.sums.pop(p).to(p.dtype)
        return list(sums)


class SumOfRanks(GradientSum):
    """The base class of sums over several ranks: the parts that are sent, and `SUMS`.

    Args:
        ranks: The ranks, which meet in `end_round` and `finish`.
        params: What trains, the same on all ranks.
        varies: Whether a parameter may have a gradient in some steps and none in others.
        device: The device of the losses, on which the ranks meet.
    """

    alone = False

    def __init__(
        self, ranks: Meeting, params: Sequence[Tensor], varies: bool, device: torch.device
    ):
        self.device = device
        self.ranks, self.share, self.varies = ranks, ranks.share, varies
        by_dtype = defaultdict[torch.dtype, list[Tensor]](list)
        for p in params:
            by_dtype[p.dtype].append(p)
        self.flats = [_Flat(each, self.share.size) for each in by_dtype.values()]
        self.params = [p for flat in self.flats for p in flat.params]
        self.seen = [False] * len(self.params)
        self.agreed = False  # whether all ranks know which parameters get a gradient
        self.rounds = 0

    @torch.no_grad()
    def end_round(self, last: bool) -> None:
        self.seen = [a or p.grad is not None for a, p in zip(self.seen, self.params, strict=True)]
        for flat in self.flats:
            self._take(flat, last)
        self.rounds += 1

    @torch.no_grad()
    def finish(self, sums: Sequence[Tensor], parts: int) -> list[Tensor]:
        if self.varies or not self.agreed:
            self.seen, self.agreed = self.ranks.any_of(self.seen), True
        for p, seen in zip(self.params, self.seen, strict=True):
            if not seen:
                p.grad = None
        if self.varies:
            self.seen = [False] * len(self.params)
        own = torch.zeros(self.rounds, SUMS, device=self.device)
        if sums:
            torch.stack(list(sums), out=own[: len(sums)])
        found = own.new_empty(self.share.size, self.rounds, SUMS)
        self.ranks.gather(found.view(-1), own.view(-1))
        self.rounds = 0
        return list(found.transpose(0, 1).reshape(-1, SUMS)[:parts].unbind())

    def _take(self, flat: "_Flat", last: bool) -> None:
        """Take the gradients of a round. After the last, the parameters have those of the step."""
        raise NotImplementedError


class OrderedSum(SumOfRanks):
    """Gradients that are added in the order of the micro-batches, as one process adds them."""

    takes_rounds = True

    def _take(self, flat: "_Flat", last: bool) -> None:
        gradients = flat.gradients(all_of_them=last)
        if self.rounds == 0 and not last:
            flat.slice = flat.sent.new_empty(flat.of_rank, dtype=flat.wide)
        for part in flat.parts:
            sent, received = (
                t[: self.share.size * part.length] for t in (flat.sent, flat.received)
            )
            flat.pack(gradients, part)
            self.ranks.exchange(received, sent)
            total = self._added(flat, part, received.view(self.share.size, -1))
            if last:
                self.ranks.gather(received, sent[: part.length].copy_(total))
                flat.unpack(gradients, part, received)
        if last:
            flat.slice = None
        else:
            for p in flat.params:
                p.grad = None

    def _added(self, flat: "_Flat", part: "_Part", received: Tensor) -> Tensor:
        """Return this rank's slice of a part, with what all ranks [R, values] have sent added."""
        if flat.slice is None:
            total, others = received[0].to(flat.wide), received[1:]
        else:
            total, others = flat.slice[part.start : part.start + part.length], received
            if self.rounds == 0:
                total.copy_(received[0])
                others = received[1:]
        for each in others:
            total.add_(each)
        return total


class FastSum(SumOfRanks):
    """Gradients that are added by one all-reduce."""

    def _take(self, flat: "_Flat", last: bool) -> None:
        if not last:
            return
        gradients = flat.gradients(all_of_them=True)
        for part in flat.parts:
            flat.pack(gradients, part)
            self.ranks.add_up(flat.sent[: self.share.size * part.length])
            flat.unpack(gradients, part, flat.sent)


class _Piece(NamedTuple):
    """Some values of one gradient, and where they lie in a buffer."""

    number: int  # of the parameter
    start: int
    stop: int
    at: int


class _Part(NamedTuple):
    """What is sent at a time: values `start` to `start + length` of every slice."""

    start: int
    length: int
    pieces: list[_Piece]


class _Flat:
    """Gradients of one dtype, as if they lay side by side, in one slice a rank.

    Attributes:
        params: What they are the gradients of.
        of_rank: The values of a slice.
        parts: What is sent, one part after the other.
        sent: The buffer of what a rank sends, [ranks, values of a part].
        received: The buffer of what it gets.
        wide: The dtype that they are added in.
        slice: This rank's slice of the sum, between the rounds of a step.
    """

    def __init__(self, params: Sequence[Tensor], size: int):
        self.params, first = list(params), params[0]
        self.strides = [torch.empty_like(p, device="meta").stride() for p in params]
        ends = list(accumulate(p.numel() for p in params))
        self.of_rank = -(-ends[-1] // size)
        count = max(1, min(self.of_rank, BUFFER // (size * first.element_size())))
        self.parts = [
            self._part(ends, size, start, min(count, self.of_rank - start))
            for start in range(0, self.of_rank, count)
        ]
        self.sent, self.received = (first.new_empty(size * count) for _ in range(2))
        self.wide = torch.float32 if first.dtype == torch.bfloat16 else first.dtype
        self.slice: Tensor | None = None

    def _part(self, ends: list[int], size: int, start: int, count: int) -> _Part:
        """Return a part, given where each gradient ends in the row of all."""
        pieces = []
        for rank in range(size):
            at = rank * self.of_rank + start
            stop, shift = min(at + count, (rank + 1) * self.of_rank, ends[-1]), rank * count - at
            while at < stop:
                number = bisect_right(ends, at)
                begin = ends[number] - self.params[number].numel()
                end = min(stop, ends[number])
                pieces.append(_Piece(number, at - begin, end - begin, at + shift))
                at = end
        return _Part(start, count, pieces)

    def gradients(self, *, all_of_them: bool) -> list[Tensor | None]:
        """Return the values of each gradient in the order of memory, dense; None if it has none.

        With `all_of_them` a missing one becomes -0.0, so that a sum can be written to it.
        """
        found: list[Tensor | None] = []
        for p, strides in zip(self.params, self.strides, strict=True):
            if p.grad is None and all_of_them:
                p.grad = torch.full_like(p, -0.0)
            if p.grad is not None and p.grad.stride() != strides:  # a norm adds as memory lies
                p.grad = torch.empty_like(p).copy_(p.grad)
            found.append(None if p.grad is None else p.grad.as_strided((p.numel(),), (1,)))
        return found

    def pack(self, gradients: Sequence[Tensor | None], part: _Part) -> None:
        """Copy a part of the gradients to the buffer, and write -0.0 for the missing ones."""
        into, values = list[Tensor](), list[Tensor]()
        for number, start, stop, at in part.pieces:
            gradient, place = gradients[number], self.sent[at : at + stop - start]
            if gradient is None:
                place.fill_(-0.0)
            else:
                into.append(place)
                values.append(gradient[start:stop])
        if into:
            torch._foreach_copy_(into, values)

    def unpack(self, gradients: Sequence[Tensor | None], part: _Part, buffer: Tensor) -> None:
        """Copy a part from a buffer to the gradients, all of which are there."""
        into, values = list[Tensor](), list[Tensor]()
        for number, start, stop, at in part.pieces:
            gradient = gradients[number]
            assert gradient is not None
            into.append(gradient[start:stop])
            values.append(buffer[at : at + stop - start])
        torch._foreach_copy_(into, values)
