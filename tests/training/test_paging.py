"""Pages under a budget, in a file and in pinned host memory (streams.py stands in for a GPU)."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.training.paging import FileStore, PageTable, PinnedStore
from tests.training.streams import CPU, PAGE, Stream, on_linux, seeds, simulated_streams

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
    """A dict is the truth; a page is filled with a number that no other write has."""
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
    assert message.endswith("which in a run is output_dir, or use 8-bit state")
    assert after == "True 2"


def test_a_directory_that_is_not_there():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(lk.LorakitError, match=r"no page file can be made in /no/such .*page_dir"):
        lk.optim.AdamW([p], paged=True, page_dir="/no/such").step()
