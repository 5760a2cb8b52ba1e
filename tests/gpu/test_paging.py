"""AdamW's state in pinned host memory: the bits of resident state, the budget, no waiting.

With --interpreted the pages lie in a file.
"""

from functools import partial
from unittest import mock

import pytest
import torch

import lorakit as lk
from lorakit.training.paged_state import PagedState
from tests.gpu.operations import random, same_bits
from tests.gpu.test_devices import waiting_forbidden

SIZES = {True: (5000, 7, 30_000, 256), False: (1 << 22, 7, 3_000_001, 4096, 1 << 20)}


def parameters(device, sizes):
    return [torch.nn.Parameter(random(device, n, seed=i)) for i, n in enumerate(sizes)]


def set_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = random(p.device, *p.shape, seed=100 * step + i)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("pages", [1, 2, 4])
def test_paged_equals_resident(bits, pages, device, size, interpreted):
    page = size(1 << 20, 1 << 16)
    small = partial(PagedState, page_bytes=page)
    params, same = (parameters(device, SIZES[interpreted]) for _ in range(2))
    resident = lk.optim.AdamW(params, lr=0.01, state_bits=bits)
    with mock.patch("lorakit.training.adamw.PagedState", small):
        paged = lk.optim.AdamW(same, lr=0.01, state_bits=bits, paged=True, page_budget=pages * page)
    for step in range(size(20, 3)):
        for optimizer, tensors in ((resident, params), (paged, same)):
            set_gradients(tensors, step)
            optimizer.step()
    for p, q in zip(params, same, strict=True):
        assert same_bits(p, q)
    saved = paged.state_dict()["state"]
    for i, state in resident.state_dict()["state"].items():
        for name, t in state.items():
            assert same_bits(t.cpu(), saved[i][name])
    resumed = lk.optim.AdamW(params, lr=0.01, state_bits=bits)
    resumed.load_state_dict(paged.state_dict())
    for optimizer, tensors in ((resumed, params), (paged, same)):
        set_gradients(tensors, 99)
        optimizer.step()
    for p, q in zip(params, same, strict=True):
        assert same_bits(p, q)


def test_the_device_holds_the_budget_and_the_host_does_not_wait(device):
    if device.type != "cuda":
        pytest.skip("a CPU has no memory beside the host's")
    (p,) = params = parameters(device, [1 << 24])
    p.grad = torch.ones_like(p)
    budget = 32 << 20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer = lk.optim.AdamW(params, paged=True, page_budget=budget)
    optimizer.step()  # it compiles, makes tables, and pins 128 MB
    with waiting_forbidden(device):
        for _ in range(3):
            optimizer.step()
    torch.cuda.synchronize()
    # beside the pages the tables of addresses, a few hundred bytes each
    assert torch.cuda.max_memory_allocated(device) - before < budget + (1 << 20)
