"""The order of the rows of a run, and the tensors of a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.batching import Order, batches, collate
from lorakit.data.encode import IGNORE, Example


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=200),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_batches_hold_every_row_once(lengths, size, seed, epoch):
    cut = batches(lengths, size, seed, epoch)
    assert sorted(i for batch in cut for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in cut)
    assert cut == batches(lengths, size, seed, epoch)


def test_batches_differ_by_epoch_and_waste_little():
    lengths = [(7 * i) % 101 + 1 for i in range(1000)]
    cut = batches(lengths, 8, 0, 0)
    assert cut != batches(lengths, 8, 0, 1)
    assert cut != batches(lengths, 8, 1, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in cut)
    assert padded < 1.1 * sum(lengths)


def test_the_order_of_rows_without_groups_is_that_of_any_tokenizer():
    """Rows of 1 to 40 tokens and rows of one length each come in one order, epoch by epoch."""
    config = lk.TrainConfig(group_by_length=False, per_device_train_batch_size=4, seed=3)
    orders = []
    for length in (lambda i: 1 + i * 7 % 40, lambda i: 9):
        order = Order(Lengths([length(i) for i in range(30)]), config)
        orders.append([order.step(i) for i in range(1, 20)])
    assert orders[0] == orders[1]
    assert sorted(i for step in orders[0][:8] for batch in step for i in batch) == list(range(30))


def test_collate():
    rows = [Example([5, 6], [IGNORE, 6]), Example([7, 8, 9], [7, 8, 9])]
    ids, labels = collate(rows)
    assert torch.equal(ids, torch.tensor([[5, 6, 0], [7, 8, 9]]))
    assert torch.equal(labels, torch.tensor([[IGNORE, 6, IGNORE], [7, 8, 9]]))


class Lengths:
    """Examples of which only the lengths are asked for."""

    def __init__(self, lengths):
        self.lengths = lengths


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)
def test_an_epoch_takes_every_row_once(lengths, size, accumulate, packing):
    """The steps of an epoch hold each row once, in rows that are not too long."""
    config = lk.TrainConfig(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        packing=packing,
        max_seq_length=40,
        num_train_epochs=2,
    )
    order = Order(Lengths(lengths), config)
    assert order.total == 2 * order.per_epoch
    for epoch in range(2):
        steps = [order.step(epoch * order.per_epoch + i + 1) for i in range(order.per_epoch)]
        assert all(1 <= len(step) <= accumulate for step in steps)
        rows = [row for step in steps for row in step]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        if packing:
            assert all(sum(lengths[i] for i in row) <= 40 * size for row in rows)
        else:
            assert all(len(row) <= size for row in rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_does_not_depend_on_those_before_it(packing):
    """So that a run that goes on from a checkpoint takes the rows of the run that made it."""
    lengths = [7 * i % 30 + 2 for i in range(50)]
    config = lk.TrainConfig(packing=packing, max_seq_length=32, num_train_epochs=3, seed=5)
    order = Order(Lengths(lengths), config)
    forward = [order.step(i) for i in range(1, order.total + 1)]
    later = [Order(Lengths(lengths), config).step(i) for i in range(order.total, 0, -1)]
    assert later[::-1] == forward
    assert forward[: order.per_epoch] != forward[order.per_epoch : 2 * order.per_epoch]


def test_a_pair_counts_as_two_rows_of_a_pack():
    config = {"packing": True, "per_device_train_batch_size": 1, "max_seq_length": 10}
    for objective, expected in (("sft", 4), ("dpo", 2)):
        order = Order(Lengths([10] * 4), lk.TrainConfig(objective=objective, **config))
        assert len(order.micro_batches) == expected
