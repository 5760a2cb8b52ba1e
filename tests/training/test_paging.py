"""Pages under a budget, in a file and in pinned host memory; and AdamW's state in them.

There is no GPU here: `simulated_streams` stands in for CUDA's. Copies are put off and run in any
order that the events allow, so that a missing one shows as wrong bytes. tests/gpu has the device.
"""

import contextlib
import copy
import functools
import itertools
import os
import pickle
import random
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
from lorakit.training.paged_state import PagedState, cut, layout, views
from lorakit.training.paging import FileStore, PageTable, PinnedStore

PAGE = 1 << 16  # a multiple of every system's own page
CPU = torch.device("cpu")
seeds = st.integers(0, 2**31)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


# ---- streams without a device -------------------------------------------------------------------


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


# ---- the table ----------------------------------------------------------------------------------


class Noting:
    """A store that notes what is asked of it, and checks that it may be."""

    page_bytes = PAGE

    def __init__(self):
        self.notes, self.resident, self.pages = [], {}, 0

    def grow(self, pages):
        self.pages = pages

    def load(self, page):
        assert page < self.pages
        assert page not in self.resident
        self.notes.append(("load", page))
        self.resident[page] = torch.zeros(1, dtype=torch.uint8)
        return self.resident[page]

    def wait(self, page):
        assert page in self.resident

    def used(self, page):
        assert page in self.resident

    def write_back(self, page):
        self.notes.append(("write", page))

    def drop(self, page):
        self.notes.append(("drop", page))
        del self.resident[page]


def test_walks_back_and_forth_one_page_ahead():
    store = Noting()
    table = PageTable(store, 3 * PAGE)
    table.grow(5 * PAGE)
    seen = []
    for page, _ in table.walk(range(5)):
        store.notes.append(("use", page))
    assert store.notes == [
        ("load", 0), ("load", 1), ("use", 0), ("load", 2), ("use", 1),
        ("write", 0), ("write", 1), ("drop", 0), ("load", 3), ("use", 2),  # 1 goes next
        ("write", 2), ("drop", 1), ("load", 4), ("use", 3), ("use", 4),
    ]  # fmt: skip
    store.notes.clear()
    for page, _ in table.walk(range(5)):
        seen.append(page)
        assert len(store.resident) <= 3
    assert seen == [4, 3, 2, 1, 0]
    assert [page for kind, page in store.notes if kind == "load"] == [1, 0]  # 2, 3, 4 were there


def test_one_page_of_budget_is_enough():
    store = Noting()
    table = PageTable(store, 2 * PAGE - 1)
    table.grow(3 * PAGE)
    for _ in table.walk(range(3)):
        assert len(store.resident) == 1
    with table.use(0):
        table.prefetch(1)  # no room: nothing happens
        assert list(store.resident) == [0]
        with pytest.raises(lk.LorakitError, match="all 1 pages of the budget are in use"):
            table.use(1).__enter__()
    with pytest.raises(lk.LorakitError, match="page_budget is 65535 bytes; it must hold at least"):
        PageTable(store, PAGE - 1)


def test_what_was_not_used_is_not_written():
    store = Noting()
    table = PageTable(store, PAGE)
    table.grow(3 * PAGE)
    table.prefetch(0)
    table.prefetch(1)
    assert store.notes == [("load", 0), ("drop", 0), ("load", 1)]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["use", "prefetch", "read", "walk"]), st.integers(0, 5)), max_size=40
)


@pytest.mark.parametrize("kind", ["file", "pinned"])
@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 4), operations=OPERATIONS, seed=seeds)
def test_pages_hold_what_was_written(kind, capacity, operations, seed):
    """Against a dict; a page is filled with a number that no other write has."""
    expected, number = dict.fromkeys(range(6), 0), itertools.count(1)
    content = torch.empty(PAGE, dtype=torch.uint8)

    def write(memory, before, after):
        words = memory.view(torch.int64)
        assert (words == before).all()
        words.fill_(after)

    def change(page, memory):
        before, expected[page] = expected[page], next(number)
        call = functools.partial(write, memory, before, expected[page])
        if kind == "file":
            call()
        else:
            simulation.current.queue.append(("call", call))

    with simulated_streams(seed, Stream) as simulation:
        store = FileStore(page_bytes=PAGE) if kind == "file" else PinnedStore(CPU, PAGE)
        table = PageTable(store, capacity * PAGE)
        table.grow(PAGE)
        table.grow(6 * PAGE)
        for operation, page in operations:
            if operation == "use":
                with table.use(page) as memory:
                    change(page, memory)
            elif operation == "prefetch":
                table.prefetch(page)
            elif operation == "read":
                table.read(page, content)
                assert (content.view(torch.int64) == expected[page]).all()
            else:
                for each, memory in table.walk(range(page, 6)):
                    change(each, memory)
            if kind == "pinned":
                assert len(store._slots) + len(store._free) <= capacity
        for page in range(6):
            table.read(page, content)
            assert (content.view(torch.int64) == expected[page]).all()


# ---- the page file ------------------------------------------------------------------------------


def open_files():
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


@on_linux
def test_the_file_has_no_name_and_goes_with_the_optimizer(tmp_path):
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    optimizer = lk.optim.AdamW([p], paged=True, page_dir=tmp_path)
    optimizer.step()
    saved = optimizer.state_dict()
    assert list(tmp_path.iterdir()) == []
    assert sum(str(tmp_path) in name for name in open_files()) > 1
    del optimizer
    assert (saved["state"][0]["exp_avg"] - 0.1).abs().max() < 1e-7  # of its own file
    del saved
    assert not any(str(tmp_path) in name for name in open_files())


@on_linux
def test_a_full_disk_is_one_clear_error(tmp_path):
    """A limit on the size of files is what a disk's end is: the system refuses the room."""
    code = f"""
        import resource, torch, lorakit as lk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
        p = torch.nn.Parameter(torch.ones(1 << 20))
        more = torch.nn.Parameter(torch.ones(2 << 20))
        optimizer = lk.optim.AdamW([p, more], lr=0.1, paged=True, page_dir={str(tmp_path)!r})
        p.grad = torch.ones_like(p)
        optimizer.step()
        more.grad = torch.ones_like(more)
        try:
            optimizer.step()
        except lk.LorakitError as error:
            print(error)
        more.grad = None
        optimizer.step()  # what there was goes on
        print((p - 0.8).abs().max().item() < 0.01, optimizer.param_groups[0]["step"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    message, after = done.stdout.strip().split("\n")
    assert message.startswith("paged state: the disk of the page file has no room for 17 MB more (")
    assert message.endswith("); name another page_dir, or use 8-bit state")
    assert after == "True 2"


def test_a_directory_that_is_not_there():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(lk.LorakitError, match=r"no page file can be made in /no/such .*page_dir"):
        lk.optim.AdamW([p], paged=True, page_dir="/no/such").step()


# ---- AdamW's state in pages ---------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60_000), st.booleans()), max_size=8))
def test_pieces_cover_every_value_once_and_no_page_ends_in_one(params):
    memory = torch.zeros(3 * PAGE * (len(params) + 1) * 4, dtype=torch.uint8)
    position = 0
    for n, in_8bit in params:
        pieces, end = cut(n, in_8bit, position, PAGE)
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][:-1]
        assert not pieces or pieces[-1].stop == n
        for piece in pieces:
            assert piece.start % 256 == 0
            assert piece.position % 64 == 0
            assert position <= piece.position
            parts = views(memory[piece.position :], piece.stop - piece.start, in_8bit)
            first = parts["exp_avg"].data_ptr() - memory.data_ptr()
            assert first == piece.position
            before = first
            for name, part in parts.items():
                at = part.data_ptr() - memory.data_ptr()
                assert at >= before
                assert at % 64 == 0
                before = at + part.nbytes
                dtype, count = layout(piece.stop - piece.start, in_8bit)[name]
                assert (part.dtype, len(part)) == (dtype, count)
            assert piece.position // PAGE == (before - 1) // PAGE
            position = before
        assert position <= end
        # a page is left with less than a block and what aligns it
        assert end - position < 600 or n * 8 > PAGE
        position = end


def parameters(shapes, dtypes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(shapes, itertools.cycle(dtypes), strict=False)
    ]


def paged_adamw(*args, **options):
    small = functools.partial(PagedState, page_bytes=PAGE)
    with mock.patch("lorakit.training.optim.PagedState", small):
        return lk.optim.AdamW(*args, paged=True, **options)


def train(optimizer, params, steps, seed=0):
    """Gradients that depend on the number of the step; now and then a parameter has none."""
    for t in steps:
        generator = torch.Generator().manual_seed(1000 * seed + t)
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if (i + t) % 4 == 3 else gradient
        optimizer.step()


def groups(params):
    """Two of them: their parameters lie in the same pages."""
    half = [{"params": params[1::2], "lr": 0.02, "weight_decay": 0.0}, {"params": params[::2]}]
    return [group for group in half if group["params"]]


def equal_states(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert state.keys() == b["state"][i].keys()
        for name, t in state.items():
            other = b["state"][i][name]
            assert (t.dtype, t.shape) == (other.dtype, other.shape)
            assert torch.equal(t, other)


SHAPES = [(200, 300), (7,), (), (5, 0), (4096,), (33, 129), (256,), (4095,), (90_001,), (3, 5)]
DTYPES = {"fp32": [torch.float32], "mixed": [torch.float32, torch.bfloat16, torch.float32]}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("pages", [1, 3])
def test_paged_equals_resident_bit_for_bit(bits, pages, dtypes, backend, tmp_path):
    if backend == "cpu" and lk.kernels.dispatch.library() is None:
        pytest.skip("the library was not built")
    options = {"lr": 0.05, "weight_decay": 0.1, "state_bits": bits}
    with lk.kernels.use_backend(backend):
        params = parameters(SHAPES, DTYPES[dtypes], 0)
        resident = lk.optim.AdamW(groups(params), **options)
        train(resident, params, range(10))
        same = parameters(SHAPES, DTYPES[dtypes], 0)
        paged = paged_adamw(groups(same), page_budget=pages * PAGE, page_dir=tmp_path, **options)
        train(paged, same, range(10))
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)
    equal_states(resident.state_dict(), paged.state_dict())
    assert not paged.state


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 30_000), min_size=1, max_size=6),
    st.sampled_from([8, 32]),
    st.integers(1, 4),
    st.booleans(),
    seeds,
)
def test_any_sizes_in_either_store(sizes, bits, pages, pinned, seed):
    params, same = (parameters([(n,) for n in sizes], [torch.float32], seed) for _ in range(2))
    resident = lk.optim.AdamW(groups(params), state_bits=bits)
    train(resident, params, range(4))
    store = (lambda directory, page_bytes: PinnedStore(CPU, page_bytes)) if pinned else FileStore
    with simulated_streams(seed), mock.patch("lorakit.training.paged_state.FileStore", store):
        paged = paged_adamw(groups(same), page_budget=pages * PAGE, state_bits=bits)
        train(paged, same, range(4))
        for p, q in zip(params, same, strict=True):
            assert torch.equal(p, q)
        equal_states(resident.state_dict(), paged.state_dict())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("target", ["resident", "paged"])
@pytest.mark.parametrize("source", ["resident", "paged"])
def test_state_of_either_kind_resumes_in_either(source, target, bits, tmp_path):
    def make(kind, params):
        options = {"lr": 0.05, "state_bits": bits}
        if kind == "resident":
            return lk.optim.AdamW(groups(params), **options)
        return paged_adamw(groups(params), page_budget=2 * PAGE, **options)

    straight = parameters(SHAPES, [torch.float32], 0)
    reached = make("resident", straight)
    train(reached, straight, range(6))

    params = parameters(SHAPES, [torch.float32], 0)
    first = make(source, params)
    train(first, params, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(target, params)
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=target == "paged")
    second.load_state_dict(saved)
    train(second, params, range(3, 6))
    for p, q in zip(straight, params, strict=True):
        assert torch.equal(p, q)
    equal_states(reached.state_dict(), second.state_dict())
    second.load_state_dict(reached.state_dict())  # over what is there
    equal_states(reached.state_dict(), second.state_dict())


def test_the_state_dict_is_a_copy():
    (p,) = params = parameters([(5000,)], [torch.float32], 0)
    optimizer = paged_adamw(params, page_budget=PAGE)
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    before = saved["state"][0]["exp_avg"].clone()
    train(optimizer, params, range(1, 2))
    assert torch.equal(saved["state"][0]["exp_avg"], before)
    assert saved["state"][0]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("paged", [False, True])
def test_state_of_something_else_is_refused(paged):
    params = parameters([(5000,)], [torch.float32], 0)
    optimizer = lk.optim.AdamW(params, paged=paged)
    train(optimizer, params, range(1))
    kept = optimizer.state_dict()
    others = parameters([(5001,)], [torch.float32], 0)
    other = lk.optim.AdamW(others)
    train(other, others, range(1))
    with pytest.raises(lk.LorakitError, match=r"saved state of parameter 0, of shape \(5000,\)"):
        optimizer.load_state_dict(other.state_dict())
    torchs = torch.optim.AdamW(params)
    train(torchs, params, range(1))
    with pytest.raises(lk.LorakitError, match=r"saved state of parameter 0"):
        optimizer.load_state_dict(torchs.state_dict())
    equal_states(optimizer.state_dict(), kept)


def test_is_not_pickled_or_copied():
    params = parameters([(5,)], [torch.float32], 0)
    optimizer = lk.optim.AdamW(params, paged=True)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(lk.LorakitError, match="paged state can be neither pickled nor copied"):
            attempt(optimizer)
    resident = lk.optim.AdamW(params)
    train(resident, params, range(2))
    equal_states(copy.deepcopy(resident).state_dict(), resident.state_dict())
    equal_states(pickle.loads(pickle.dumps(resident)).state_dict(), resident.state_dict())


def test_refuses_what_cannot_be_paged():
    p = torch.nn.Parameter(torch.ones(4, 5).t())
    with pytest.raises(lk.LorakitError, match="page_budget is 8388607 bytes; it must hold"):
        lk.optim.AdamW([p], paged=True, page_budget=(8 << 20) - 1)
    p.grad = torch.ones(5, 4)
    with pytest.raises(lk.LorakitError, match=r"of shape \(5, 4\) is not contiguous"):
        lk.optim.AdamW([p], paged=True).step()
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(lk.LorakitError, match="parameters on meta cannot be paged"):
        lk.optim.AdamW([p], paged=True).step()


@on_linux
@pytest.mark.parametrize("budget", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_resident_memory_stays_under_the_budget(budget):
    """2^30 bytes of state, stepped and copied out: at most the budget and 64 MB more."""
    code = f"""
        import torch, lorakit as lk
        from pathlib import Path

        def kilobytes(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith(name)))

        params = [torch.nn.Parameter(torch.ones(1 << 24)) for _ in range(8)]
        for p in params:
            p.grad = torch.ones(1 << 24)
        warm = torch.nn.Parameter(torch.ones(5000))
        warm.grad = torch.ones(5000)
        lk.optim.AdamW([warm], paged=True).step()
        before = kilobytes("VmRSS")
        optimizer = lk.optim.AdamW(params, paged=True, page_budget={budget} << 20)
        for _ in range(3):
            optimizer.step()
        print(kilobytes("VmHWM") - before)
        saved = optimizer.state_dict()
        print(kilobytes("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    stepped, saved = (int(word) * 1024 for word in done.stdout.split())
    assert 0.9 * (budget << 20) < stepped < (budget << 20) + (64 << 20)
    assert saved < (budget << 20) + (64 << 20)
