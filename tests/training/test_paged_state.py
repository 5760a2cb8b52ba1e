"""AdamW's state in pages: the bits of resident state, whatever the budget."""

import copy
import functools
import itertools
import pickle
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.training.paged_state import PagedState, cut, layout, views
from lorakit.training.paging import FileStore, PinnedStore
from tests.training.streams import CPU, PAGE, on_linux, seeds, simulated_streams


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
    with mock.patch("lorakit.training.adamw.PagedState", small):
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
@pytest.mark.slow
@pytest.mark.parametrize("budget", [8, 64])
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
