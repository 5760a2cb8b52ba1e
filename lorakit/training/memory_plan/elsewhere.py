"""A process that makes forecasts of divided weights, since these change torch; see several.py.

It starts with the first such forecast, which takes some seconds, and stays for further ones. It
ends with this process, or by `end`. Both processes run the same code and talk in pickles.
"""

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.training.memory_plan.forecast import Forecast, Setting, forecast

SECONDS = 600.0  # that a forecast may take

_lock = threading.Lock()
_helper: "_Helper | None" = None


def forecast_elsewhere(setting: Setting) -> Forecast:
    """Return `forecast(setting)`, made by the other process.

    Raises:
        LorakitError: As `forecast` does.
        RuntimeError: The other process has ended, or failed.
    """
    global _helper
    with _lock:
        if _helper is None or not _helper.is_mine():
            _helper = _Helper()
        try:
            return _helper.ask(setting)
        except LorakitError:
            raise
        except BaseException:  # an interrupt too: its answer would be taken for the next one's
            _helper.end()
            _helper = None
            raise


def end() -> None:
    """End the other process, if there is one."""
    global _helper
    with _lock:
        if _helper is not None and _helper.is_mine():
            _helper.end()
        _helper = None


class _Helper:
    """The other process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout

    def is_mine(self) -> bool:
        """Return whether this process started it, and not one that it was forked from."""
        return self.owner == os.getpid()

    def ask(self, setting: Setting) -> Forecast:
        """Return a forecast, or raise what making it has raised."""
        late = threading.Timer(SECONDS, self.process.kill)
        late.start()
        try:
            pickle.dump(setting, self.questions)
            self.questions.flush()
            found: Forecast | Exception = pickle.load(self.answers)
        except (EOFError, OSError) as error:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "it said nothing"
            raise RuntimeError(f"the process that makes the forecast has ended: {last}") from error
        finally:
            late.cancel()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """End the process, which does so where its input ends."""
        try:
            self.questions.close()
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.answers.close()
        self.errors.close()


atexit.register(end)


def serve() -> None:
    """Make the forecasts that the standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    while True:
        try:
            setting: Setting = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(setting), answers)
        answers.flush()


def _answer(setting: Setting) -> Any:
    try:
        return forecast(setting)
    except LorakitError as error:
        return LorakitError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
