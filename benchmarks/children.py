"""Sides of a benchmark, each in a process of its own, which works when it is asked to.

The parent imports the standard library only. A child imports one side of `sides.py`, and says so;
then it runs the methods that `Child.ask` names, one at a time, so that the sides of one run take
turns and whatever else the machine does hits all of them. Requests and answers are lines of JSON
through pipes. What a library prints goes to stderr.

A child has a session of its own: Ctrl-C in a terminal reaches the parent alone, which ends its
children on the way out. A child whose parent was killed reads the end of its requests, and ends.

The peak of resident memory is the operating system's for the whole process: libraries and mapped
files count. Linux starts a process's peak at that of the process which started it; here that is the
parent, with 20 MB.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from typing import Any

# of mallopt, in glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


class SideError(Exception):
    """What went wrong in a child, in one line."""


class Child:
    """One side, in its process; a context manager that ends it.

    side: a name in sides.SIDES. tuned: with `tune_allocator` before anything else.
    """

    def __init__(self, side: str, *, tuned: bool = False):
        command = [sys.executable, __file__, side, *(["tuned"] if tuned else [])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # all that is read lies on the disk
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env=environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def started(self) -> dict[str, Any]:
        """Waits for the imports; once, and first. Raises SideError."""
        return self._answer()

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What the side's method returns, and "peak_mb" after it. Raises SideError."""
        with suppress(BrokenPipeError):  # it is gone; the answer says how
            print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise SideError(f"the process was ended {how}")
        answer = json.loads(text)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


def exit_on_terminate() -> None:
    """Lets SIGTERM, as `timeout` sends it, clean up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


# ---- inside the child ---------------------------------------------------------------------------


def tune_allocator() -> None:
    """Let glibc keep freed memory. By default it maps large tensors again each time, and every page
    of them costs a fault. The price shows in the peak of memory.
    """
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
        if not libc.mallopt(option, value):
            raise RuntimeError(f"mallopt({option}, {value}) was refused")


def peak_mb() -> float:
    """The most resident memory so far, MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def serve(name: str, tuned: bool) -> None:
    """Answers the parent until it has no more requests, or until something goes wrong."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(**values: Any) -> None:
            print(json.dumps(values), file=answers, flush=True)

        try:
            if tuned:
                tune_allocator()
            side = importlib.import_module("sides").SIDES[name]()
            answer(peak_mb=peak_mb())
            for line in sys.stdin:
                method, arguments = json.loads(line)
                found = getattr(side, method)(**arguments)
                answer(**found, peak_mb=peak_mb())
        except Exception as error:
            traceback.print_exc()
            answer(error=last_line(error))


if __name__ == "__main__":
    serve(sys.argv[1], "tuned" in sys.argv[2:])
