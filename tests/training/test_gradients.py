"""The sum of gradients over ranks: the bits of one process that adds them one after the other."""

import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.evaluation.share import Share
from lorakit.training import gradients
from lorakit.training.gradients import SUMS, FastSum, OrderedSum


class Threads:
    """Ranks that are threads of one process, and what each of them has sent."""

    def __init__(self, rank: int, size: int, table: list, barrier: threading.Barrier):
        self.share, self.table, self.barrier = Share(rank, size), table, barrier
        self.sent = 0.0  # bytes that leave this rank

    def _all(self, mine):
        self.table[self.share.rank] = mine
        self.barrier.wait(20)
        found = list(self.table)
        self.barrier.wait(20)
        return found

    def exchange(self, received, sent):
        size = self.share.size
        self.sent += sent.nbytes * (size - 1) / size
        for part, each in zip(received.chunk(size), self._all(sent.clone()), strict=True):
            part.copy_(each.chunk(size)[self.share.rank])

    def gather(self, received, sent):
        self.sent += sent.nbytes * (self.share.size - 1)
        for part, each in zip(
            received.view(-1).chunk(self.share.size), self._all(sent.clone()), strict=True
        ):
            part.copy_(each)

    def add_up(self, values):
        self.sent += 2 * values.nbytes * (self.share.size - 1) / self.share.size  # as a ring does
        found = self._all(values.clone())
        values.copy_(sum(found[1:], found[0]))

    def any_of(self, flags):
        return [any(each) for each in zip(*self._all(list(flags)), strict=True)]


def steps_of_ranks(kind, size, shapes, steps, varies):
    """What each rank has after each step: the parameters' gradients, the losses, the bytes sent."""
    table, barrier, found = [None] * size, threading.Barrier(size), [[] for _ in range(size)]

    def work(rank):
        try:
            meeting = Threads(rank, size, table, barrier)
            params = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
            sums = kind(meeting, params, varies, params[0].device)
            for step in steps:
                losses, before = [], meeting.sent
                rounds = sums.share.rounds(step)
                for i, part in enumerate(rounds):
                    if part is not None:
                        loss, grads = part
                        losses.append(loss.repeat(SUMS))
                        for p, grad in zip(params, grads, strict=True):
                            if grad is not None:  # as autograd does
                                p.grad = grad.clone() if p.grad is None else p.grad + grad
                    sums.end_round(i == len(rounds) - 1)
                losses = sums.finish(losses, len(step))
                grads = [None if p.grad is None else p.grad.clone() for p in params]
                found[rank].append((grads, losses, meeting.sent - before))
                for p in params:
                    p.grad = None
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    return found


def one_process(step):
    """The sums of a step's gradients, each added to those before it; of bfloat16 ones in fp32."""
    found = []
    for of_one in zip(*(grads for _, grads in step), strict=True):
        first, *others = [grad for grad in of_one if grad is not None] or [None]
        total = None if first is None else first.float()
        for grad in others:
            total = total + grad
        found.append(None if first is None else total.to(first.dtype))
    return found


def bits(t):
    return None if t is None else t.reshape(-1).view(torch.uint8).tolist()


SHAPES = st.lists(
    st.tuples(
        st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16]),
    ),
    min_size=1,
    max_size=4,
)


@given(st.data(), st.integers(2, 5), SHAPES, st.lists(st.integers(1, 7), min_size=1, max_size=3))
@settings(max_examples=25)
def test_the_bits_of_one_process(data, size, shapes, parts):
    """Any ranks, micro-batches and shapes, zeros of both signs, and gradients that are missing."""
    varies = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))

    def some_grad(shape, dtype):
        grad = torch.randn(shape, generator=generator).to(dtype)
        return grad * torch.randint(-1, 2, shape, generator=generator)  # 0 and -0 among them

    steps = [
        [
            (
                torch.randn((), generator=generator),
                [None if varies and data.draw(st.booleans()) else some_grad(*s) for s in shapes],
            )
            for _ in range(n)
        ]
        for n in parts
    ]
    buffer = data.draw(st.sampled_from([256, gradients.BUFFER]))  # many parts, or one
    with mock.patch.object(gradients, "BUFFER", buffer):
        found = steps_of_ranks(OrderedSum, size, shapes, steps, varies)
    for rank in found:
        for (grads, losses, _), step in zip(rank, steps, strict=True):
            assert [bits(g) for g in grads] == [bits(g) for g in one_process(step)]
            assert [bits(x) for x in losses] == [bits(loss.repeat(SUMS)) for loss, _ in step]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_bytes_of_a_step(size, rounds):
    """What docs/scale.md says that a rank sends, but for the sums, 12 bytes a micro-batch."""
    shapes = [((48 * size, 16), torch.float32)]  # no slice has to be filled up
    n = 4 * 48 * size * 16
    part = (torch.ones(()), [torch.ones(shapes[0][0])])
    step = [part] * (rounds * size)
    losses = 4 * SUMS * rounds * (size - 1)
    for kind, times in ((OrderedSum, rounds + 1), (FastSum, 2)):
        for rank in steps_of_ranks(kind, size, shapes, [step], False):
            assert rank[0][2] == times * n * (size - 1) / size + losses


def test_a_fast_sum_in_many_parts(monkeypatch):
    """Whole numbers have one sum in every order; a parameter may have no gradient on a rank."""
    monkeypatch.setattr(gradients, "BUFFER", 64)
    shapes = [((5, 3), torch.float32), ((7,), torch.float32), ((2,), torch.float32)]
    step = []
    for i in range(5):
        grads = [torch.full(shape, i + 1.0).to(dtype) for shape, dtype in shapes]
        step.append((torch.ones(()), [grads[0], grads[1] if i == 3 else None, None]))
    for rank in steps_of_ranks(FastSum, 2, shapes, [step, step], False):
        for grads, _, _ in rank:
            assert torch.equal(grads[0], torch.full((5, 3), 15.0))
            assert torch.equal(grads[1], torch.full((7,), 4.0))
            assert grads[2] is None


def test_a_sum_takes_no_second_copy_of_the_gradients():
    """Two buffers of 32 MB, however many gradients there are, and a slice between rounds."""
    p = torch.zeros(10**9, device="meta")
    [flat] = OrderedSum(Threads(0, 2, [None], threading.Barrier(1)), [p], False, p.device).flats
    assert flat.sent.nbytes == flat.received.nbytes == 32 << 20
    assert sum(part.length for part in flat.parts) == flat.of_rank == 5 * 10**8


def test_strides_of_a_gradient_are_those_of_its_parameter():
    """A norm adds in the order of memory."""
    shapes = [((3, 5), torch.float32)]
    table, barrier = [None], threading.Barrier(1)
    p = torch.zeros(5, 3).t()
    sums = OrderedSum(Threads(0, 1, table, barrier), [p], False, p.device)
    p.grad = torch.arange(15.0).view(shapes[0][0])
    sums.end_round(True)
    sums.finish([torch.zeros(SUMS)], 1)
    assert p.grad.stride() == p.stride()
    assert torch.equal(p.grad, torch.arange(15.0).view(3, 5))
