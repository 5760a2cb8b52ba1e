"""Stop, resume and start runs, and forecast their memory: processes of the `lorakit` command.

A run that the board starts is a process in a session of its own, which outlives the board. What it
prints goes to output.log in its folder. From its first moment on, before it has loaded its model,
it holds the lock of the file .started, which it inherits from the board; the file has its process
id. So whoever looks at the folder sees that it goes on, also another board, and the id is that of a
process that lives.
"""

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.board import runs
from lorakit.board.folder import DEPTH, RECORD, STARTED, Folder
from lorakit.config.errors import LorakitError
from lorakit.files.local import write_text
from lorakit.files.yaml_text import parse_yaml

FORECAST_SECONDS = 120
FORECASTS = 100  # the latest that are kept
_RESUMED = ".resumed.yaml"  # the run file that a run is resumed with
_MODULE = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module('lorakit', run_name='__main__', alter_sys=True)"
)
_NAME = re.compile(r"\w([\w .+,=@-]*[\w+=@-])?")


class Control:
    """The processes that a board starts, and the way to those of others."""

    def __init__(self, folder: Folder):
        """Start nothing yet.

        Args:
            folder: The folder of the runs.
        """
        self.folder = folder
        self.children: list[subprocess.Popen[bytes]] = []
        self.plans: set[asyncio.subprocess.Process] = set()
        self.forecasts: dict[str, Any] = {}
        self.asked: dict[Path, int] = {}  # which process of a run was asked to end
        self.one_at_a_time = threading.Lock()

    def reap(self) -> None:
        """Forget the processes that have ended, so that the system does too."""
        self.children = [child for child in self.children if child.poll() is None]

    def close(self) -> None:
        """End the forecasts that are being made; runs go on."""
        for plan in self.plans:
            plan.kill()

    # ---- stop ----

    def stop(self, run: Path) -> None:
        """Ask the process of a run to end after its step, with a checkpoint.

        A run that has not come to its first step ends at once.

        Args:
            run: The folder of the run.

        Raises:
            LorakitError: The run is not going on, was asked before, or its process cannot be
                reached from here.
        """
        with self.one_at_a_time:
            pid = self._process_of(run)
            if self.asked.get(run) == pid:  # a second signal would end it without a checkpoint
                raise LorakitError("the run was asked to end already; it does after its step")
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                raise LorakitError("the run has just ended") from None
            except PermissionError:
                raise LorakitError("the run belongs to another user") from None
            self.asked[run] = pid

    def _process_of(self, run: Path) -> int:
        if runs.is_locked(run / STARTED):
            started = runs.read_started(run)
            pid = started.get("pid")
            if not isinstance(pid, int):
                raise LorakitError("the run is just being started: try again in a moment")
            _write_started(run, {**started, "stopped": True})
            return pid
        if runs.is_locked(run / runs.LOCK):
            return _recorded_pid(run)
        raise LorakitError("the run is not going on")

    # ---- resume and start ----

    def resume(self, run: Path) -> None:
        """Go on with a run from its last checkpoint, or from its beginning if it has none.

        Args:
            run: The folder of the run.

        Raises:
            LorakitError: The run goes on already or has finished, or it has no run file.
        """
        with self.one_at_a_time:
            self._resume(run)

    def _resume(self, run: Path) -> None:
        record = runs.read_record(run)
        state, _ = runs.state_of(run, record)
        if state in ("running", "finished"):
            done = "goes on already" if state == "running" else "has finished"
            raise LorakitError(f"the run {done}")
        values, ranks = record.get("run_file"), record.get("ranks")
        if isinstance(values, dict):
            write_text(run / _RESUMED, json.dumps(values, indent=2))  # which is YAML too
            name, cwd = _RESUMED, record.get("cwd")
        else:
            runs.run_file(run)  # raises if there is none
            name, cwd = runs.RUN_FILE, runs.read_started(run).get("cwd")
        several = isinstance(ranks, int) and ranks > 1
        options = ["resume=auto", *(["--nproc", str(ranks)] if several else [])]
        self._launch(run, name, options, cwd if isinstance(cwd, str) else os.getcwd())

    def start(self, text: str, name: str) -> str:
        """Start a run from the text of a run file, in a new folder.

        Args:
            text: The run file. Its paths are relative to where the board was started, and its
                output_dir is the new folder, whatever it says.
            name: The path of the new folder below the board's.

        Returns:
            The id of the run.

        Raises:
            LorakitError: The run file is wrong, or there can be no such folder.
        """
        check_run_file(text)
        run = self._new_folder(name)
        write_text(run / runs.RUN_FILE, text)
        self._launch(run, runs.RUN_FILE, [], os.getcwd())
        return name

    def _new_folder(self, name: str) -> Path:
        parts = name.split("/")
        for part in parts:
            if not _NAME.fullmatch(part) or len(part) > 100 or part.startswith("checkpoint-"):
                raise LorakitError(
                    f"{name[:100]!r} is no name for a run: take letters, digits, spaces and . _ - "
                    "+ = @, with / between folders"
                )
        if len(parts) > DEPTH:
            raise LorakitError(f"{name!r} is more than {DEPTH} folders deep")
        run = self.folder.root.joinpath(*parts)
        try:
            if run.parent.resolve() != run.parent:
                raise LorakitError(f"{name!r} leads through a link")
            run.mkdir(parents=True)
        except FileExistsError:
            raise LorakitError(f"there is something called {name!r} already") from None
        except OSError as error:
            raise LorakitError(f"{name!r} cannot be made ({error.strerror})") from None
        return run

    def _launch(self, run: Path, name: str, options: Sequence[str], cwd: str) -> None:
        """Start `lorakit train` on a run file in the folder of a run, which it trains into."""
        if not Path(cwd).is_dir():
            raise LorakitError(f"the run was started in {cwd}, which is gone")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        output_dir = f"output_dir={json.dumps(str(run))}"
        command = ["train", str(run / name), output_dir, *options]
        lock, log = os.open(run / STARTED, flags, 0o666), -1
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log = os.open(run / runs.OUTPUT, flags | os.O_APPEND, 0o666)
            started = {"started": time.time(), "cwd": cwd}
            _write_started(run, started)
            child = subprocess.Popen(
                _lorakit(command),
                cwd=cwd,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock],
            )
            _write_started(run, {**started, "pid": child.pid})
        except BlockingIOError:
            raise LorakitError("the run goes on already") from None
        finally:
            os.close(lock)  # the child holds it
            if log >= 0:
                os.close(log)
        self.children.append(child)

    # ---- forecast ----

    async def forecast(self, text: str) -> Any:
        """Return what `lorakit plan --json` says of a run file. One that is being made ends.

        Args:
            text: The run file.

        Raises:
            LorakitError: The run file is wrong, or the forecast takes too long.
        """
        self.close()  # the page asks again at each change
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / runs.RUN_FILE
            path.write_text(text, encoding="utf-8", errors="replace")
            pipe = asyncio.subprocess.PIPE
            plan = await asyncio.create_subprocess_exec(
                *_lorakit(["plan", str(path), "--json"]),
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                env=_environment(),
            )
            self.plans.add(plan)
            try:
                out, err = await asyncio.wait_for(plan.communicate(), FORECAST_SECONDS)
            except asyncio.TimeoutError:
                raise LorakitError(
                    f"the forecast took more than {FORECAST_SECONDS} seconds: `lorakit plan` "
                    "has no such limit"
                ) from None
            finally:
                self.plans.discard(plan)
                if plan.returncode is None:
                    plan.kill()
                    await plan.wait()
        try:
            found = json.loads(out)
        except ValueError:
            said = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
            reason = said[-1] if said else "the forecast was ended"
            reason = reason.removeprefix("lorakit: ").replace(str(path), "the run file")
            raise LorakitError(reason) from None
        self.forecasts.pop(text, None)
        self.forecasts[text] = found  # the last one of them
        for old in list(self.forecasts)[:-FORECASTS]:
            del self.forecasts[old]
        return found


def check_run_file(text: str) -> None:
    """Raise LorakitError unless a text is a run file without a mistake."""
    from lorakit.config.run import RunConfig

    try:
        values = parse_yaml(text)
    except LorakitError as error:
        raise LorakitError(f"the run file is {error}") from None
    RunConfig.from_dict(values, "the run file")


def _recorded_pid(run: Path) -> int:
    """Return the process of a run that the board did not start, whose lock is held."""
    record, host = runs.read_record(run), socket.gethostname()
    pid, where = record.get("pid"), record.get("host")
    if where not in (host, None):
        raise LorakitError(f"the run goes on on {where}: stop it there")
    fresh = _time_of(run / RECORD) >= _time_of(run / runs.LOCK)  # not that of an earlier run
    if record.get("state") != "running" or not fresh or type(pid) is not int or pid <= 1:
        raise LorakitError("the run does not say yet which process it is: try again in a moment")
    return pid


def _time_of(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def _write_started(run: Path, values: Mapping[str, Any]) -> None:
    """Write .started in place, so that its lock stays."""
    with open(run / STARTED, "r+", encoding="utf-8") as file:
        file.write(json.dumps(values))
        file.truncate()


def _lorakit(command: Sequence[str]) -> list[str]:
    """Return a command line of `lorakit`.

    It runs in the folder where a run was started, in which a stranger may have put Python files. So
    it is not `python -m`, which would look for modules there first.
    """
    return [sys.executable, "-c", _MODULE, *command]


def _environment() -> dict[str, str]:
    """Return an environment in which this lorakit is found, and nothing that lies in the cwd."""
    own, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    path = own if not given else f"{own}{os.pathsep}{given}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
