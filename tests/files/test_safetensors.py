"""Safetensors files and directories: what is missing or damaged is said in one sentence."""

import copy as python_copy
import json
import os

import pytest
import torch

import lorakit as lk
from lorakit.files.safetensors import open_safetensors, write_safetensors
from tests.conftest import tiny_llama
from tests.models.damage import fails


def test_missing_files(copy):
    (copy / "model.safetensors").rename(copy / "other")
    fails(copy, r"neither model\.safetensors nor model\.safetensors\.index\.json")
    (copy / "config.json").unlink()
    fails(copy, r"config\.json does not exist")


def test_truncated_safetensors_at_any_length(copy):
    data = (copy / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        (copy / "model.safetensors").write_bytes(data[:length])
        fails(copy, r"model\.safetensors: damaged or cut off")


def test_bad_index(tiny_dir, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    weight_map = values["weight_map"]
    name = next(iter(weight_map))
    index.write_text(json.dumps({"weight_map": {**weight_map, name: "model-00009.safetensors"}}))
    fails(tmp_path, r"model-00009\.safetensors does not exist")
    other = next(file for file in weight_map.values() if file != weight_map[name])
    index.write_text(json.dumps({"weight_map": {**weight_map, name: other}}))
    fails(tmp_path, "which model.safetensors.index.json puts here, is missing")
    for outside in ("../model.safetensors", str(tiny_dir / "model.safetensors"), "a/../../b", "\0"):
        index.write_text(json.dumps({"weight_map": {**weight_map, name: outside}}))
        fails(tmp_path, "which does not lie in this directory; shards must lie beside their index")
    index.write_text("{}")
    fails(tmp_path, "weight_map, of names to files, is missing")
    index.write_text('{"weight_map": {"a": 3}}')
    fails(tmp_path, "weight_map, of names to files, is missing")


def test_what_is_written_is_read_again(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4).to(torch.uint8), "c": torch.zeros(0, 2)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = open_safetensors(tmp_path / "a.safetensors")
    again = python_copy.deepcopy(found)  # maps the file for itself
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name].read(), tensor)
        assert torch.equal(again[name].read(), tensor)


def test_a_file_that_goes_while_it_is_read(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    found = open_safetensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(lk.LorakitError, match="tensor a is there no more"):
        found["a"].read()


class Planted:
    """Unpickling this would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_never_unpickled(copy, tmp_path):
    torch.save(Planted(tmp_path / "planted"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    fails(copy, "pickled weights are not read")
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    fails(copy, "damaged or cut off")
    assert not (tmp_path / "planted").exists()


HEADERS = {
    "longer than the file": (2**63 - 1, b""),
    "longer than any header": (2**30, b""),
    "more than the file holds": (
        None,
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
    ),
    "another size than its offsets": (
        None,
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
    ),
    "a product that overflows": (
        None,
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
    ),
    "tensors that overlap": (
        None,
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_sizes_are_checked_before_anything_is_read(tmp_path, name):
    length, header = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(lk.LorakitError, match=r"a\.safetensors: damaged or cut off"):
        open_safetensors(path)
