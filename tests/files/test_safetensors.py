"""Safetensors files and directories: what is missing or damaged is said in one sentence."""

import json

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
    index.write_text("{}")
    fails(tmp_path, "weight_map, of names to files, is missing")
    index.write_text('{"weight_map": {"a": 3}}')
    fails(tmp_path, "weight_map, of names to files, is missing")
