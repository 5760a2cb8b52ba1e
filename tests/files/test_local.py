"""Small files and paths: one clear error, and writing that leaves a whole file or the old one."""

import errno
import json

import pytest
import torch

import lorakit as lk
from lorakit.files.local import (
    as_path,
    atomic,
    errors_name,
    read_json,
    read_text,
    write_json,
    write_text,
)
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


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda temporary: FULL, "[Errno 28] No space left on device: '{path}'"),
        (
            lambda temporary: PermissionError(13, "Permission denied", str(temporary)),
            "[Errno 13] Permission denied: '{path}'",
        ),
        (
            lambda temporary: OSError(18, "Cross-device", str(temporary), None, "a.json"),
            "[Errno 18] Cross-device: '{path}'",
        ),
        (lambda temporary: OSError(f"{temporary}: I/O error"), "{path}: I/O error"),
        (
            lambda temporary: FileNotFoundError(2, "No such file or directory", "/other"),
            "[Errno 2] No such file or directory: '/other'",
        ),
        (lambda temporary: OSError(errno.EBADF, "Bad"), f"[Errno {errno.EBADF}] Bad"),
    ],
)
def test_an_error_names_the_file_that_was_asked_for(tmp_path, raised, said):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=r"\w") as caught, atomic(path) as temporary:
        raise raised(temporary)
    assert str(caught.value) == said.format(path=path)


def test_a_file_in_a_temporary_directory_too(tmp_path):
    path, temporary = tmp_path / "adapter", tmp_path / ".adapter.tmp"
    with pytest.raises(OSError, match="Is a directory") as caught, errors_name(path, temporary):
        raise IsADirectoryError(21, "Is a directory", str(temporary / "b.json"))
    assert str(caught.value) == f"[Errno 21] Is a directory: '{path / 'b.json'}'"


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
