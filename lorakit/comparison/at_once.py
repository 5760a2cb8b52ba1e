"""Several runs of a comparison at once, each a process of its own.

The process of the comparison holds its lock and writes comparison.json. That of a run does what the
comparison does with one run after the other, and leaves the same files; what it prints goes to
output.log in the run's folder. Each of them takes the next GPU in turn, or without GPUs its share
of the cores.

Ctrl-C and SIGTERM are passed on: a run that trains ends after its step, with a checkpoint. On Linux
that is so too when the comparison itself was killed, which can tell nobody.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorakit.comparison.record import read_again
from lorakit.comparison.work import Job
from lorakit.kernels import processors
from lorakit.training.interrupt import interrupt
from lorakit.training.log import say

OUTPUT = "output.log"
POLL = 0.1  # s between two looks at the processes
_MAIN = "from lorakit.comparison.one_run import main; main()"

Note = Callable[[Job, str, str | None], None]
"""Takes a run, its state and why it failed, and writes both down."""


@dataclass
class _Going:
    job: Job
    place: int  # of the processes that go on at once, from 0 on
    process: "subprocess.Popen[bytes]"


def make_at_once(chosen: Sequence[Job], most: int, note: Note) -> bool:
    """Make the runs that are not finished, `most` at once. Return whether a signal has ended that.

    Args:
        chosen: The runs, in the order in which they begin.
        most: The number of processes, at least 1.
        note: Called whenever the state of a run changes.
    """
    waiting = [job for job in chosen if job.record.state != "finished"]
    total, going = len(waiting), list[_Going]()
    with interrupt() as stop, _ended(going):
        told = False
        while going or (waiting and not stop.is_set()):
            while waiting and len(going) < most and not stop.is_set():
                place = min(set(range(most)) - {each.place for each in going})
                job = waiting.pop(0)
                note(job, "running", None)
                where = job.run.folder / OUTPUT
                say(f"run {total - len(waiting)} of {total}: {job.run.id} (prints to {where})")
                going.append(_Going(job, place, _started(job, place, most)))
            if stop.is_set() and not told:
                told = True
                for each in going:
                    each.process.terminate()
            for each in [each for each in going if each.process.poll() is not None]:
                going.remove(each)
                _note_end(each, stop.is_set(), note)
            time.sleep(POLL)
        return stop.is_set()


@contextmanager
def _ended(going: Sequence[_Going]) -> Iterator[None]:
    """End all processes where the block is left by an error, such as a second Ctrl-C."""
    try:
        yield
    finally:
        for each in going:
            each.process.terminate()
        for each in going:
            each.process.wait()


def _started(job: Job, place: int, most: int) -> "subprocess.Popen[bytes]":
    """Start the process of a run."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        devices = named.split(",")[:count] if named else [str(i) for i in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % count]
    else:
        environment["OMP_NUM_THREADS"] = str(_threads(os.environ.get("OMP_NUM_THREADS"), most))
    job.run.folder.mkdir(parents=True, exist_ok=True)
    with open(job.run.folder / OUTPUT, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C of the terminal comes once, by the comparison
        )
    assert process.stdin is not None
    with process.stdin as given:
        pickle.dump((job.config, job.run.id, os.getpid()), given)
    return process


def _threads(named: str | None, most: int) -> int:
    """Return how many threads each of `most` runs has: its share, or the fewer that are named."""
    share = max(1, processors.usable() // most)
    first = (named or "").split(",")[0].strip()  # a number for each level of nesting
    return min(share, max(1, int(first))) if first.isdecimal() else share


def _note_end(ended: _Going, stopped: bool, note: Note) -> None:
    """Note how a process has ended, by what it has written and its exit code."""
    job, code = ended.job, ended.process.returncode
    read_again(job.run, job.record)
    state, error = job.record.state, job.record.error
    if state == "running":  # it could not say how it ended
        state, error = "failed", f"its process ended with code {code}; {OUTPUT} may say why"
        if code < 0:
            error = f"its process was killed by {signal.Signals(-code).name}"
            state = "stopped" if stopped and -code == signal.SIGTERM else state
    note(job, state, error if state == "failed" else None)
    say(f"{job.run.id}: {state}" if state != "failed" else f"{job.run.id} failed: {error}")
