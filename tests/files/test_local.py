"""Small files and paths: one clear error, and writing that leaves a whole file or the old one."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.files.local import as_path, atomic, read_json, read_text, write_json, write_text
from lorakit.files.safetensors import write_safetensors


@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/x"])
def test_what_is_no_path(path):
    with pytest.raises(lk.LorakitError, match="is no path"):
        as_path(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"\xff", "is not UTF-8 text"),
        (b"[" * 200_000, "is not valid JSON"),  # deeper than Python's stack
    ],
)
def test_what_is_no_json_object(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(lk.LorakitError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_what_is_no_file(tmp_path):
    with pytest.raises(lk.LorakitError, match="nowhere does not exist"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(lk.LorakitError, match="is no file"):
        read_text(tmp_path)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")

    def write_half():
        with atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert read_text(tmp_path / "a") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_file_of_tensors_may_be_read_by_whom_other_files_may(tmp_path):
    (tmp_path / "plain").write_text("")
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "a.safetensors")]
    assert modes[0] == modes[1]


def test_what_is_written_is_read_again(tmp_path):
    values = {"b": [1, None], "a": "é 😀"}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    assert list(json.loads(read_text(tmp_path / "a.json"))) == ["a", "b"]
    write_text(tmp_path / "b", "half a \ud83d pair")
    assert read_text(tmp_path / "b") == "half a ? pair"
