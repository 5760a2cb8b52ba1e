"""CUDA's streams without a device, for the tests of pages.

Copies are put off and run in any order that the events allow, so that a missing event shows as
wrong bytes. tests/gpu has the device.
"""

import contextlib
import random
import sys
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = 1 << 16  # a multiple of every system's own page


CPU = torch.device("cpu")


seeds = st.integers(0, 2**31)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


class Event:
    def __init__(self, simulation, done):
        self.simulation, self.done = simulation, done

    def synchronize(self):
        self.simulation.run(until=self)


class Stream:
    """Operations that were asked for and have not run."""

    def __init__(self, simulation):
        self.simulation, self.queue = simulation, []
        simulation.streams.append(self)

    def wait_event(self, event):
        self.queue.append(("wait", event))
        self.simulation.run_some()

    def record_event(self):
        event = Event(self.simulation, False)
        self.queue.append(("record", event))
        self.simulation.run_some()
        return event


class AtOnce:
    """A stream whose operations run when they are asked for."""

    def __init__(self, simulation):
        self.simulation = simulation

    def wait_event(self, event):
        event.synchronize()

    def record_event(self):
        return Event(self.simulation, True)


class Simulation:
    def __init__(self, seed):
        self.random, self.streams = random.Random(seed), []

    def run_some(self):
        """Some of what could run by now, or nothing."""
        for _ in range(self.random.choice([0, 0, 1, 5])):
            self._step()

    def run(self, until):
        while not until.done:
            assert self._step(), "the events wait for each other"

    def _step(self):
        ready = [s for s in self.streams if s.queue and self._may_run(*s.queue[0])]
        if not ready:
            return False
        kind, what = self.random.choice(ready).queue.pop(0)
        if kind == "record":
            what.done = True
        if kind == "copy":
            what[0].copy_(what[1])
        if kind == "call":
            what()
        return True

    def _may_run(self, kind, what):
        return kind != "wait" or what.done


class _PutOff(TorchDispatchMode):
    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.copy_.default
        self.stream.queue.append(("copy", args[:2]))
        return args[0]


@contextlib.contextmanager
def simulated_streams(seed, current=AtOnce):
    """current: the kind of the caller's stream; it can be put off where the test says what runs."""
    simulation = Simulation(seed)
    simulation.current = current(simulation)
    with (
        mock.patch("torch.cuda.Stream", side_effect=lambda device: Stream(simulation)),
        mock.patch("torch.cuda.current_stream", return_value=simulation.current),
        mock.patch("torch.cuda.stream", _PutOff),
        mock.patch("torch.Tensor.record_stream"),
    ):
        yield simulation
