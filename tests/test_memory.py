"""Large pages: memory like any other, aligned for them, and given back."""

import copy
from itertools import pairwise

import pytest
import torch

import lorakit as lk
from lorakit.memory import HUGE_PAGE, huge_pages


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_huge_pages(nbytes):
    buffer = huge_pages(nbytes)
    assert (buffer.shape, buffer.dtype) == ((nbytes,), torch.uint8)
    assert buffer.data_ptr() % HUGE_PAGE == 0
    assert not buffer.any()
    buffer.fill_(7)
    other = huge_pages(nbytes)
    assert not other.any()
    assert (buffer == 7).all()


def test_weights_do_not_overlap_and_live_as_long_as_they_are_used(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    again = copy.deepcopy(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids)
        weight = model.model.layers[0].mlp.up_proj.weight
        kept = weight.clone()
        del model
        assert torch.equal(weight, kept)
        assert torch.equal(again(ids), expected)
