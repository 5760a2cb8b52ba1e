"""Bytes that a ledger books, against sizes that are known and against torch's profiler."""

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.training.memory_plan.ledger import Ledger
from lorakit.training.memory_plan.pool import Pool
from tests.allocations import counted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=30))
def test_what_is_held_is_the_sum_of_the_tensors_that_live(requests):
    held, most = [], 0
    with Ledger("meta") as ledger:
        ledger.mark = "all"
        for n, goes in requests:
            held.append(torch.empty(n, device="meta"))
            most = max(most, 4 * sum(map(len, held)))
            if goes:
                held.pop(0)
            assert ledger.total == 4 * sum(map(len, held))
        held.clear()
        assert ledger.total == 0
    assert ledger.peaks["all"].total == most


def test_views_take_nothing_and_kinds_can_change():
    with Ledger("meta") as ledger:
        x = torch.empty(8, 8, device="meta")
        y = x.t()[2:].view(-1) if x.t()[2:].is_contiguous() else x.t()[2:]
        assert ledger.total == 256
        ledger.own(("weights", ""), [y])
        assert +ledger.now == {("weights", ""): 256}


def test_a_pool_rounds_and_the_filling_is_a_kind_of_its_own():
    with Ledger("meta", Pool()) as ledger:
        x = torch.empty(100, dtype=torch.uint8, device="meta")
        assert +ledger.now == {("activations", ""): 100, ("rounding", ""): 412}
    assert len(x) == 100


def test_a_value_of_a_tensor_without_values():
    with Ledger("meta"):
        x = torch.empty(3, device="meta")
        assert (x > 0).all()
        assert x.sum().item() == 0
        assert x.tolist() == [0, 0, 0]
        assert torch.zeros(7, dtype=torch.int64, device="meta").bincount(minlength=3).tolist() == [
            2,
            2,
            3,
        ]


def test_copies_in_host_memory_are_booked_there():
    with Ledger("meta") as ledger:
        host = torch.empty(256, device="cpu").copy_(torch.empty(256, device="meta"))
        assert ledger.host == 1024
        assert host.device.type == "cpu"
        del host
        assert ledger.host == 0
        assert ledger.most_on_host == 1024


def test_a_real_computation_takes_what_the_profiler_of_torch_counts():
    """Every allocation of torch's goes through one function, which its profiler hears of."""

    def compute():
        x = torch.randn(64, 64, requires_grad=True)
        y = torch.softmax(x @ x.t(), -1).square().sum()
        y.backward()
        return x.grad

    compute()
    gc.collect()
    most, _ = counted(compute)
    with Ledger("cpu") as ledger:
        ledger.mark = "all"
        compute()
    assert ledger.peaks["all"].total == most
