"""What a run has written, read for the page: its state, its figures, its settings, its samples.

Whether a run goes on is told by its lock, which ends with its process, never by a process id. Only
the end of metrics.jsonl is read for the list of runs, so that long runs are listed as fast as short
ones.
"""

import fcntl
import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.board.folder import (
    METRICS,
    RECORD,
    STARTED,
    NotThereError,
    is_file,
    open_file,
    read_end,
)
from lorakit.board.metrics import number, parsed

LOCK, SAMPLES, RUN_FILE, OUTPUT = ".lock", "samples.jsonl", "run.yaml", "output.log"
SAVED = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_END = 64 << 10  # bytes of metrics.jsonl that the list looks at
_LINES = 8  # of them that are parsed, beside the last evaluation
_MOST = 16 << 20  # bytes of a small file, and of the samples that are shown

_LISTED = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "peak_memory_mb": "peak_memory_mb",
}


Ends = dict[Path, tuple[tuple[int, int], dict[str, Any]]]


def summary(run: Path, id_: str, ends: Ends | None = None) -> dict[str, Any]:
    """Return what the list of runs says of a run.

    Args:
        run: The folder of the run.
        id_: Its id.
        ends: What was read of the ends of metrics before, with their sizes and times; it is added
            to. None reads them.

    Returns:
        The id, the name, the state and how far the run has come; None where nothing is known.
    """
    record = read_record(run)
    last = _last_values(run, {} if ends is None else ends)
    state, error = state_of(run, record)
    started = _time(record, "started") or None
    ended = _time(record, "ended") if state != "running" else 0.0
    updated = ended or _last_written(run)
    return {
        "id": id_,
        "name": run.name,
        "state": state,
        "error": error,
        "step": last.get("step", 0),
        "total_steps": _of_type(record, "total_steps", int),
        **{name: last.get(key) for name, key in _LISTED.items()},
        "seconds": max(0.0, updated - started) if started and updated else None,
        "started": started,
        "updated": updated,
        "model": _of_type(record, "model", str),
        "objective": _of_type(record, "objective", str),
        "metrics": sorted(last.keys() - {"step"}),
        "can_resume": state in ("stopped", "failed") and has_run_file(run, record),
    }


def read_record(run: Path) -> dict[str, Any]:
    """Return run.json, {} if there is none or it is damaged."""
    return _object(run / RECORD)


def read_started(run: Path) -> dict[str, Any]:
    """Return what the board wrote when it started a run, {} if it did not."""
    return _object(run / STARTED)


def _object(path: Path) -> dict[str, Any]:
    try:
        text, whole = read_end(path, _MOST)
        value = json.loads(text) if whole else None
    except (NotThereError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- the state ----


def state_of(run: Path, record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the state of a run, and what went wrong if it failed.

    Args:
        run: The folder of the run.
        record: Its run.json.

    Returns:
        "running", "finished", "stopped" or "failed", and a sentence or None.
    """
    if is_locked(run / LOCK) or is_locked(run / STARTED):
        return "running", None
    started = read_started(run)
    if _time(started, "started") > _time(record, "started"):  # it ended before its first step
        return ("stopped", None) if started.get("stopped") else ("failed", last_words(run))
    state = record.get("state")
    if state == "running":
        return "failed", "the process of the run was killed"
    if state in ("finished", "stopped"):
        return str(state), None
    if state is None and any(is_file(run / name) for name in SAVED):  # by an older lorakit
        return "finished", None
    error = record.get("error")
    return "failed", str(error) if error else last_words(run)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file."""
    try:
        file = open_file(path)
    except NotThereError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system
        return False
    finally:
        os.close(file)
    return False


def last_words(run: Path) -> str | None:
    """Return the last line that a run which the board started has printed, None if there is none.

    A line of an error comes before others.
    """
    try:
        text, _ = read_end(run / OUTPUT, _END)
    except NotThereError:
        return None
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("lorakit: ")]
    words = errors[-1:] or lines[-1:]
    return words[0].removeprefix("lorakit: ")[:1000] if words else None


def _time(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    found = number(value)
    return found if found is not None and math.isfinite(found) else 0.0


def _of_type(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    return value if type(value) is kind else None


def _last_written(run: Path) -> float | None:
    """Return when a run has written last."""
    for name in (METRICS, RECORD, STARTED):
        with suppress(OSError):  # it may be removed at any time
            status = (run / name).lstat()
            if stat.S_ISREG(status.st_mode):
                return status.st_mtime
    return None


# ---- figures ----


def _last_values(run: Path, ends: Ends) -> dict[str, Any]:
    """Return the last value of each quantity near the end of metrics.jsonl, and the last step."""
    try:
        status = (run / METRICS).lstat()
    except OSError:
        return {}
    version = status.st_size, status.st_mtime_ns
    before = ends.get(run)
    if before is None or before[0] != version:
        before = ends[run] = version, _read_last_values(run)
    return before[1]


def _read_last_values(run: Path) -> dict[str, Any]:
    lines = _last_lines(run / METRICS, _END).splitlines()
    evaluated = [line for line in lines if b'"eval_' in line]
    values: dict[str, Any] = {}
    for line in parsed(b"\n".join([*evaluated[-1:], *lines[-_LINES:]])):
        if type(line.get("step")) is int:
            values |= {name: value for name, value in line.items() if number(value) is not None}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _last_lines(path: Path, most: int) -> bytes:
    """Return the whole lines among the last bytes of a file, none if there is no such file."""
    try:
        text, whole = read_end(path, most)
    except NotThereError:
        return b""
    text = text[: text.rfind(b"\n") + 1]  # what follows is not written whole
    return text if whole else text.partition(b"\n")[2]


def memory(curves: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Return the memory of a run.

    Args:
        curves: The curves of its metrics, "peak_memory_mb" among them.

    Returns:
        {"peak_mb": [[step, MB], ...]}.
    """
    peak = curves.get("peak_memory_mb", {"step": [], "value": []})
    return {"peak_mb": [list(each) for each in zip(peak["step"], peak["value"], strict=True)]}


# ---- settings and texts ----


def settings(run: Path) -> dict[str, Any]:
    """Return the settings in effect of a run, flat: {"lora.r": 8, ...}; {} if it saved none."""
    found = read_record(run).get("settings")
    return _flat(found, "") if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def has_run_file(run: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a run has a run file, or says what stood in it."""
    return is_file(run / RUN_FILE) or isinstance(record.get("run_file"), dict)


def run_file(run: Path) -> str:
    """Return the text of a run file that says what the one of this run said.

    Raises NotThereError if the run saved none.
    """
    values = read_record(run).get("run_file")
    ours = is_file(run / STARTED) and is_file(run / RUN_FILE)  # the board wrote it as it was typed
    if ours or not isinstance(values, dict):
        try:
            return read_end(run / RUN_FILE, _MOST)[0].decode(errors="replace")
        except NotThereError:
            raise NotThereError("this run was not started from a run file") from None
    import yaml

    first = {name: values[name] for name in ("model", "data") if name in values}
    return yaml.safe_dump({**first, **values}, sort_keys=False, allow_unicode=True)


def started_in(run: Path) -> Path:
    """Return the folder that the paths of a run's settings are relative to."""
    cwd = read_record(run).get("cwd") or read_started(run).get("cwd")
    return Path(cwd) if isinstance(cwd, str) else Path.cwd()


def placed(text: str, cwd: Path) -> str:
    """Return a path that a run names, as it was in the folder where the run was started.

    A text that names nothing there, such as a Hub id, stays.
    """
    there = cwd / text
    try:
        return str(there) if there.exists() else text
    except OSError:  # a name that is too long
        return text


def samples(run: Path) -> list[dict[str, Any]]:
    """Return the completions that a run has written in its evaluations, the latest if many."""
    return [
        line
        for line in parsed(_last_lines(run / SAMPLES, _MOST))
        if type(line.get("step")) is int and isinstance(line.get("completion"), str)
    ]
