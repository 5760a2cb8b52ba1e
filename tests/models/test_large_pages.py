"""Large pages: memory like any other, aligned for them, private to its process."""

import copy
import mmap
import os
import sys
from itertools import pairwise

import pytest
import torch

import lorakit as lk
from lorakit.models.large_pages import HUGE_PAGE, in_large_pages


@pytest.mark.parametrize("rows", [1, 1000, HUGE_PAGE // 4, HUGE_PAGE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_in_large_pages(rows, dtype):
    first, second = in_large_pages([(rows, 2), (3, 5)], dtype)
    assert (first.shape, second.shape, first.dtype) == ((rows, 2), (3, 5), dtype)
    assert first.data_ptr() % HUGE_PAGE == second.data_ptr() % 64 == 0
    assert not first.any()
    first.fill_(7)
    assert not second.any()
    assert not in_large_pages([(rows, 2)], dtype)[0].any()
    assert (first == 7).all()
    assert first.untyped_storage().nbytes() == first.nbytes  # what pickle and safetensors go by


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux matter")
def test_a_forked_process_writes_into_a_copy():
    [tensor] = in_large_pages([(4,)], torch.float32)
    child = os.fork()
    if child == 0:
        memoryview(tensor.numpy())[0] = 7.0
        os._exit(0)
    os.waitpid(child, 0)
    assert not tensor.any()


def test_a_kernel_without_large_pages(monkeypatch, tiny_dir):
    class Region(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Region)
    assert not in_large_pages([(HUGE_PAGE,)], torch.float32)[0].any()
    lk.load_model(tiny_dir, device="cpu")


def test_a_loaded_model_is_saved_like_any_other(tiny_dir, tmp_path):
    from safetensors.torch import save_model

    model = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    weights = sum(p.nbytes for p in model.parameters())
    save_model(model, str(tmp_path / "a.safetensors"))
    torch.save(model, tmp_path / "b.pt")
    torch.save(model.lm_head.state_dict(), tmp_path / "c.pt")
    assert (tmp_path / "a.safetensors").stat().st_size < 1.2 * weights
    assert (tmp_path / "b.pt").stat().st_size < 1.5 * weights
    assert (tmp_path / "c.pt").stat().st_size < model.lm_head.weight.nbytes + 10_000


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
