"""A process that makes one run of a comparison, while others make other ones; see at_once.py."""

import ctypes
import os
import pickle
import signal
import sys

from lorakit.comparison.compare import jobs_of
from lorakit.comparison.record import write_record
from lorakit.comparison.work import attempt
from lorakit.training.log import say

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent has ended


def main() -> None:
    """Make the run that the standard input names, and write down how it ended."""
    config, run, parent = pickle.load(sys.stdin.buffer)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return  # it has ended already
    [job] = [job for job in jobs_of(config)[0] if job.run.id == run]
    job.record.state, job.record.error = attempt(job, say)
    write_record(job.run, job.record)
