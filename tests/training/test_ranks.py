"""Runs on several ranks: the bytes of one process, and no rank that waits for ever."""

import pytest
import torch

from tests.training.rank_runs import CASES, ended, found, start, take

CHILD = ["-m", "tests.training.rank_runs"]


@pytest.fixture
def one_thread():
    """torch's sums have other last bits with other numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_ranks_have_the_bytes_of_one_process(tiny_dir, tmp_path, one_thread):
    two = start(2, [*CHILD, str(tiny_dir), str(tmp_path / "two"), *CASES])
    for case in CASES:
        take(case, tiny_dir, tmp_path / "one")
    for rank, (code, out, err) in enumerate(ended(two)):
        assert code == 0, err
        assert ("loss" in out) == (rank == 0)  # one rank speaks
    for case in CASES:
        ours, theirs = found(tmp_path / "two", case), found(tmp_path / "one", case)
        if case == "fast":
            for a, b in zip(ours["steps"], theirs["steps"], strict=True):
                assert a == pytest.approx(b, rel=1e-5)
        else:
            assert ours == theirs
