"""Random numbers that follow from the seed and the micro-batch, whatever was drawn before."""

import torch

from lorakit.training.draws import drawing_from, seed_of


def test_the_same_numbers_whatever_was_drawn_before():
    with drawing_from(7):
        first = torch.rand(5)
    torch.rand(3)
    state = torch.get_rng_state()
    with drawing_from(7):
        second = torch.rand(5)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_the_generator_as_it_was():
    state = torch.get_rng_state()
    try:
        with drawing_from(7):
            torch.rand(1)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_no_two_micro_batches_of_two_seeds_share_a_seed():
    found = {seed_of(seed, number) for seed in range(20) for number in range(500)}
    assert len(found) == 20 * 500
    assert all(0 <= each < 2**64 for each in found)
