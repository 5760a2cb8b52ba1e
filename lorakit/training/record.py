"""run.json: what a run is, where it runs and how it ended, for whoever looks at its directory.

    {"version": 1, "state": "running", "pid": 4711, "host": "here", "started": 1764547200.0,
     "cwd": "/data", "ranks": 1, "model": "org/name", "objective": "sft", "total_steps": 300,
     "settings": {...}, "run_file": {...}}

The state is "running", "finished", "stopped" (by Ctrl-C or SIGTERM) or "failed", with "ended" and
"error" beside the last three. A run that was killed cannot write how it ended: its state stays
"running", and its lock (state.py) is free. "settings" are those in effect; "run_file" says the same
to `lorakit train`, with the paths relative to "cwd", and is null of a run that a program began by
`train` without one.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.config.run import RunConfig
from lorakit.config.training import TrainConfig
from lorakit.files.local import write_json

RECORD = "run.json"


def settings_in_effect(
    config: TrainConfig, run: RunConfig | None, same: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a run by their names in a run file.

    Args:
        config: The settings of the training.
        run: Those of the run file that it was started from, if it was.
        same: What a run that goes on shares with this one; it knows the adapter.
    """
    around = asdict(run) if run is not None else {"lora": same.get("adapter")}
    return {**around, **asdict(config)}


@contextmanager
def recorded(
    output_dir: Path,
    values: Mapping[str, Any],
    ended: Callable[[], bool],
    say: Callable[[str], None],
) -> Iterator[None]:
    """Keep run.json while a run goes on in the block.

    Args:
        output_dir: The directory of the run, whose lock this process holds.
        values: What run.json says beside the state, the process and the times.
        ended: Whether the run came to its end, asked after the block.
        say: Called with a line if run.json cannot be written; the run goes on.
    """
    record = {
        "version": 1,
        "state": "running",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
        "cwd": os.getcwd(),
        **values,
    }

    def write(**more: Any) -> None:
        try:
            write_json(output_dir / RECORD, {**record, **more})
        except OSError as error:
            say(f"lorakit: {RECORD} could not be written ({error.strerror}); the run goes on")

    write()
    try:
        yield
    except BaseException as error:
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        said = str(error) or type(error).__name__
        write(state=state, ended=time.time(), error=said if state == "failed" else None)
        raise
    write(state="finished" if ended() else "stopped", ended=time.time(), error=None)
