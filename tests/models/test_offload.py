"""Inputs of blocks that wait in host memory: the bytes, the order of the copies, what is held."""

import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.models.offload import Offload, SideStreams
from tests.training.streams import CPU, seeds, simulated_streams


def put_all(offload, count):
    """Put inputs, and write over each when its memory is free, as the next block would."""
    inputs, truth, memory = [], [], []
    for i in range(count):
        x = torch.full((4,), float(i))
        truth.append(x.clone())
        inputs.append(offload.put(x))
        memory.append(x)
        if i:
            memory[i - 1].fill_(float("nan"))
    return inputs, truth


@settings(max_examples=40)
@given(seeds, st.integers(1, 6))
def test_copies_wait_for_each_other(seed, count):
    """Whatever order the streams take: no input is overwritten before it is copied, or read early.

    After a second pass as well, as with retain_graph.
    """
    with simulated_streams(seed):
        offload = Offload(CPU)
        offload.streams = SideStreams(CPU)
        inputs, truth = put_all(offload, count)
        for _ in range(2):
            for each, expected in zip(reversed(inputs), reversed(truth), strict=True):
                x = each.take()
                assert torch.equal(x, expected)
                x.fill_(float("nan"))


def test_two_lie_on_the_device():
    """The last input stays; then the one that is asked for, and the one before it."""
    offload = Offload(CPU)
    inputs, _ = put_all(offload, 5)
    assert [each._here is not None for each in inputs] == [False] * 4 + [True]
    for i in reversed(range(5)):
        inputs[i].take()
        assert [j for j in range(5) if inputs[j]._here is not None] == ([i - 1] if i else [])


def test_the_next_copy_begins_before_the_block_that_waits():
    """The order of what is asked of the streams, forward and backward, of three inputs."""
    order = []

    class Recorder(SideStreams):
        def to_host(self, host, x):
            order.append(f"to host {int(x[0])}")
            return super().to_host(host, x)

        def from_host(self, x, host):
            event = super().from_host(x, host)
            order.append(f"back {int(host[0])}")
            event.synchronize()
            return event

        def wait(self, event):
            order.append("wait")
            super().wait(event)

    with simulated_streams(0):
        offload = Offload(CPU)
        offload.streams = Recorder(CPU)
        inputs, _ = put_all(offload, 3)
        order.append("backward")
        for each in reversed(inputs):
            each.take()
    forward = ["to host 0", "wait", "to host 1", "wait", "to host 2"]
    assert order == [*forward, "backward", "back 1", "wait", "back 0", "wait", "wait"]


def test_inputs_end_with_the_graph():
    """Each is held by its block and by the one after it alone."""
    inputs, _ = put_all(Offload(CPU), 3)
    held = [weakref.ref(each) for each in inputs]
    inputs[0] = None
    assert held[0]() is not None
    inputs[1] = inputs[2] = None
    assert [each() for each in held] == [None, None, None]
