"""Small files on this machine: read with one clear error, written whole or not at all.

A file is written to a temporary file beside it, which is flushed to the disk and then renamed. A
reader sees the old file or the new one, and a full disk leaves the old one.

Text and JSON from a stranger are parsed, never run. A file that is no UTF-8, no JSON or nested too
deeply raises a LorakitError of one sentence.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.config.errors import LorakitError


def as_path(path: str | Path) -> Path:
    """Return a path that a user gave, with ~ expanded.

    Raises LorakitError if it is none.
    """
    if "\0" in str(path):
        raise LorakitError(f"{str(path)!r} is no path: it holds a null byte")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # an unknown user's home
        raise LorakitError(f"{str(path)!r} is no path: {error}") from None


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises LorakitError if it is missing, no file or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LorakitError(f"{path} does not exist") from None
    except (IsADirectoryError, NotADirectoryError):
        raise LorakitError(f"{path} is no file") from None
    except UnicodeDecodeError as error:
        raise LorakitError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises LorakitError if it is missing or holds no object.
    """
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise LorakitError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise LorakitError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which becomes `path` if the block succeeds.

    If the block fails, the temporary file goes and `path` stays as it was. The file may be read by
    whom the process lets read its files; safetensors' own writer shuts out all but the owner.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path, temporary):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """Let an OSError of the block name `path`, which the user asked for, and not `temporary`.

    A write to a full disk says no name at all; then it gets that of `path`. Files in a temporary
    directory become those of `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a message alone
            error.args = (str(error).replace(str(temporary), str(path)),)
        elif error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        elif str(error.filename).startswith(str(temporary)):
            error.filename = str(error.filename).replace(str(temporary), str(path))
            if error.filename2 is not None:  # what was to be renamed to `path`
                del error.filename2
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, atomically, and make the folder of `target` if it is missing.

    Nothing happens if both are the same file.
    """
    if source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically.

    Half a surrogate pair is no character and becomes a "?".
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
