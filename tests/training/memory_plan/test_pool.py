"""The allocator's arithmetic against rules that hold for any sequence of requests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.training.memory_plan.pool import MEDIUM_SEGMENT, ROUND, SMALL_SEGMENT, Pool, rounded

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 << 20), st.integers(9 << 20, 60 << 20))


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, SMALL_SEGMENT),
        (1 << 20, SMALL_SEGMENT),
        ((1 << 20) + 1, MEDIUM_SEGMENT),
        ((10 << 20) - 1, 10 << 20),  # rounded up to 512 bytes it is 10 MB, and no longer below
        (10 << 20, 10 << 20),
        ((10 << 20) + 1, (10 << 20) + ROUND),
    ],
)
def test_the_segment_of_a_first_request(size, segment):
    """The rules are those of get_allocation_size in CUDACachingAllocator.cpp."""
    pool = Pool()
    assert pool.take(size).size >= rounded(size)
    assert pool.reserved == segment


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=40))
def test_blocks_never_overlap_and_all_memory_comes_back(requests):
    """The truth is an interval for each block, and that a pool that is empty returns everything."""
    pool, held = Pool(), []
    for size, gives in requests:
        block = pool.take(size)
        assert block.size >= size
        assert all(
            block.address + block.size <= other.address
            or other.address + other.size <= block.address
            for other in held
        )
        held.append(block)
        if gives:
            pool.give(held.pop(len(held) // 2))
        assert pool.allocated == sum(each.size for each in held) <= pool.reserved
    for block in held:
        pool.give(block)
    assert pool.allocated == 0
    pool.empty()
    assert pool.reserved == 0


def test_a_freed_block_is_taken_again_and_an_arena_keeps_its_own():
    pool = Pool()
    block = pool.take(30 << 20)
    pool.give(block)
    assert pool.take(29 << 20).address == block.address  # what is left, 1 MB, is not cut off
    before = pool.reserved
    pool.take(1 << 20, "graphs")
    assert pool.reserved == before + SMALL_SEGMENT
