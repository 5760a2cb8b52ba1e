"""The folder that a board shows: what lies in it by ids, and nothing outside it.

The id of a run is its path below the folder, with "/" between its parts; "/" alone is the folder
itself, if that is a run. A link is followed nowhere: not to a run, nor to a file of one. So what is
read lies in the folder, wherever links in it point.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lorakit.config.errors import LorakitError

METRICS, RECORD, STARTED, COMPARISON = "metrics.jsonl", "run.json", ".started", "comparison.json"
RUN_FILES = {METRICS, RECORD, STARTED}
DEPTH = 6  # folders below which no run is looked for
_MOST_FOLDERS = 20_000  # that are looked into: a home folder may hold millions


class NotThereError(LorakitError):
    """What was asked for is not there, or not in the folder."""


class Folder:
    """A folder of runs and comparisons."""

    def __init__(self, root: Path):
        """Take a folder.

        Args:
            root: The folder.

        Raises:
            LorakitError: It is no folder.
        """
        if not root.is_dir():
            raise LorakitError(f"{root} is no folder; name the one that holds the runs")
        self.root = root.resolve()

    def runs(self) -> dict[str, Path]:
        """Return the folders of runs by their ids."""
        return {_id(parts): path for parts, path, names in self._walk() if names & RUN_FILES}

    def comparisons(self) -> dict[str, Path]:
        """Return the folders of comparisons by their ids."""
        return {_id(parts): path for parts, path, names in self._walk() if COMPARISON in names}

    def run(self, id_: str) -> Path:
        """Return the folder of a run. Raises NotThereError if there is none of this id."""
        path = self.path(id_)
        if path is None or not any(is_file(path / name) for name in RUN_FILES):
            raise NotThereError(f"there is no run {id_[:100]!r} in this folder")
        return path

    def comparison(self, id_: str) -> Path:
        """Return the folder of a comparison. Raises NotThereError if there is none of this id."""
        path = self.path(id_)
        if path is None or not is_file(path / COMPARISON):
            raise NotThereError(f"there is no comparison {id_[:100]!r} in this folder")
        return path

    def path(self, id_: str) -> Path | None:
        """Return the path of an id, None if it is no id or leads through a link."""
        if id_ == "/":
            return self.root
        parts = id_.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            return None
        path = self.root.joinpath(*parts)
        try:
            return path if path.resolve() == path else None
        except (OSError, RuntimeError, UnicodeEncodeError):  # too long, a circle, no text
            return None

    def _walk(self) -> Iterator[tuple[tuple[str, ...], Path, set[str]]]:
        """Yield each folder: the parts of its id, its path, and the names of its files."""
        waiting: list[tuple[str, ...]] = [()]
        seen = 0
        while waiting and seen < _MOST_FOLDERS:
            parts, seen = waiting.pop(), seen + 1
            path = self.root.joinpath(*parts)
            try:
                with os.scandir(path) as entries:
                    found = list(entries)
            except OSError:
                continue
            yield parts, path, {e.name for e in found if e.is_file(follow_symlinks=False)}
            if len(parts) < DEPTH:
                inner = [e.name for e in found if e.is_dir(follow_symlinks=False)]
                waiting += [(*parts, name) for name in sorted(inner, reverse=True) if _shown(name)]


def _id(parts: tuple[str, ...]) -> str:
    return "/".join(parts) or "/"


def _shown(name: str) -> bool:
    """Return whether runs are looked for in a folder of this name, which must be Unicode."""
    if name.startswith((".", "checkpoint-")):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- files of a run ----


def is_file(path: Path) -> bool:
    """Return whether a path is a file, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> int:
    """Return the descriptor of a file that is no link, to read.

    Raises NotThereError if there is no such file.
    """
    try:
        # without O_NONBLOCK a pipe of this name would wait for its other end
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise NotThereError(f"{path.name} is not there") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotThereError(f"{path.name} is no file")
    return file


def read_end(path: Path, most: int) -> tuple[bytes, bool]:
    """Return the last bytes of a file, at most so many, and whether they are all of it.

    Raises NotThereError if there is no such file.
    """
    with open(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - most))
        return file.read(most), size <= most
