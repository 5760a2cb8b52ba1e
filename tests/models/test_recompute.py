"""Gradient checkpointing against the same without it: the same bits, and nothing is kept."""

import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.models.recompute import run_recomputed


class Block(nn.Module):
    """Two layers, of which dropout makes the run random; counts its runs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout, self.runs, self.after = dropout, 0, 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        y = self.second(F.dropout(torch.tanh(self.first(x)), self.dropout)) * scale
        self.after += 1
        return y


def gradients(block, x, run, **options):
    torch.manual_seed(1)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    loss = run(block, x, 0.5).square().sum() + torch.rand(())  # the generator goes on
    loss.backward(**options)
    found = [loss.detach(), torch.rand(()), *(p.grad.clone() for p in block.parameters())]
    block.zero_grad()
    return [*found, x.grad] if x.requires_grad else found


def plain(block, x, scale):
    return block(x, scale)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("needed", [True, False])
def test_the_same_bits(dropout, needed):
    """Masks too, and what is drawn after the block and after backward."""
    block, x = Block(dropout), torch.randn(5, 8, requires_grad=needed)
    for expected, found in zip(
        gradients(block, x, plain), gradients(block, x, run_recomputed), strict=True
    ):
        assert torch.equal(expected, found)
    assert block.runs == 3


def test_the_second_run_ends_with_what_backward_needs():
    """tanh's result is the last tensor that is saved; what comes after it does not run again."""

    class Twice(Block):
        def forward(self, x, scale=1.0):
            self.runs += 1
            hidden = torch.tanh(self.first(x))
            self.after += 1
            return hidden.sum(1, keepdim=True).expand_as(x)

    block = Twice()
    run_recomputed(block, torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert (block.runs, block.after) == (2, 1)


def test_backward_twice():
    block, x = Block(), torch.randn(5, 8, requires_grad=True)
    loss = run_recomputed(block, x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_autocast_of_the_first_run_holds_for_the_second():
    block, x, found = Block(), torch.randn(5, 8, requires_grad=True), []
    for run in (plain, run_recomputed):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(block, x, 1.0)
        found.append(torch.autograd.grad(y.float().sum(), x)[0])
    assert torch.equal(*found)


def test_nothing_is_kept_before_and_after_backward():
    alive = []

    class Watched(Block):
        def forward(self, x, scale=1.0):
            hidden = torch.tanh(self.first(x))
            alive.append(weakref.ref(hidden.untyped_storage()))
            return self.second(hidden)

    y = run_recomputed(Watched(), torch.randn(5, 8, requires_grad=True))
    assert alive[0]() is None
    y.sum().backward()
    del y
    assert [storage() for storage in alive] == [None, None]


def test_a_block_that_changes_in_between_is_told():
    block = Block()
    y = run_recomputed(block, torch.randn(5, 8, requires_grad=True))
    block.second = nn.Identity()
    block.dropout = 0.5
    with pytest.raises(RuntimeError, match="did it change in between"):
        y.sum().backward()


def test_torchs_compiler_is_not_imported():
    code = (
        "import sys, torch; from lorakit.models.recompute import run_recomputed;"
        "layer = torch.nn.Linear(2, 2); run_recomputed(layer, torch.ones(1, 2)).sum().backward();"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
