"""Comparisons and their blind votes, for the page."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.board.folder import COMPARISON, NotThereError, read_end
from lorakit.board.runs import LOCK, is_locked
from lorakit.config.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.comparison.votes import Ballot

_MOST = 64 << 20  # bytes of comparison.json


def read(folder: Path) -> dict[str, Any]:
    """Return comparison.json. Raises LorakitError if it is damaged."""
    text, whole = read_end(folder / COMPARISON, _MOST)
    try:
        values = json.loads(text) if whole else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise LorakitError(f"the {COMPARISON} of this comparison is damaged")
    return values


def summaries(found: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return what the list says of comparisons: their ids, their names and their states.

    Several of one name have their ids beside it: a file that says no name gives all the same.

    Args:
        found: The folders of the comparisons by their ids.

    Returns:
        {"id", "name", "state"} for each, in the order of `found`.
    """
    listed = [_summary(path, id_) for id_, path in found.items()]
    names = Counter(each["name"] for each in listed)
    for each in listed:
        if names[each["name"]] > 1:
            each["name"] = f"{each['name']} ({each['id']})"
    return listed


def _summary(folder: Path, id_: str) -> dict[str, Any]:
    try:
        found = (folder / COMPARISON).stat()
        name, done = _said(folder, found.st_mtime_ns, found.st_size)
    except (LorakitError, OSError):
        return {"id": id_, "name": folder.name, "state": "failed"}
    going_on = is_locked(folder / LOCK)
    return {
        "id": id_,
        "name": name or folder.name,
        "state": "running" if going_on else "finished" if done else "stopped",
    }


@lru_cache(maxsize=1000)
def _said(folder: Path, changed: int, size: int) -> tuple[str, bool]:
    """Return the name of a comparison and whether all its runs have ended.

    The page asks every two seconds. The file is read again when its time or its size has `changed`.
    Raises LorakitError if it is damaged.
    """
    values = read(folder)
    found, name = values.get("runs"), values.get("name")
    runs = [run for run in found if isinstance(run, dict)] if isinstance(found, list) else []
    done = all(run.get("state") in ("finished", "failed") for run in runs)
    return name if isinstance(name, str) else "", done


def ballot(folder: Path, first: str, second: str) -> "Ballot":
    """Return the votes on two runs, whose answers must lie in the folder of the comparison.

    Raises NotThereError if they do not, and LorakitError if the runs cannot be compared.
    """
    from lorakit.comparison.votes import FILE, Ballot  # which takes seconds

    files = [f"{name}.jsonl" for name in (first, second)]
    for path in [*(folder / "predictions" / name for name in files), folder / FILE]:
        inside = path.name in (*files, FILE) and "\0" not in path.name and path.resolve() == path
        if not inside or (path.name != FILE and not path.is_file()):
            raise NotThereError(f"there are no answers of {first[:100]!r} and {second[:100]!r}")
    return Ballot(folder, first, second)


def next_pair(votes: "Ballot") -> dict[str, Any]:
    """Return the next blind pair, or {"done": True, "share"} when all have a vote."""
    pair = votes.next()
    return share(votes) | {"done": True} if pair is None else pair._asdict()


def share(votes: "Ballot") -> dict[str, Any]:
    """Return what the votes say so far, as {"share": {...}}."""
    found = votes.share()
    low, high = found.interval
    names = ("first", "second", "ties", "same", "left_over", "votes", "value", "p_value")
    return {"share": {name: getattr(found, name) for name in names} | {"low": low, "high": high}}
