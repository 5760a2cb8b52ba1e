"""Damaged model files, and how loading them has to fail."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk


def fails(path, message):
    before = torch.get_rng_state()
    with pytest.raises(lk.LorakitError, match=message) as caught:
        lk.load_model(path, dtype="float32")
    assert "\n" not in str(caught.value)
    assert torch.equal(before, torch.get_rng_state())


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
