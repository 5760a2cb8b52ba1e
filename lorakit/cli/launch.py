"""`lorakit train --nproc N`: N processes of this machine, started by torchrun's launcher.

Each of them runs the same command without --nproc, and finds its number in the environment. The
first one speaks. Ctrl-C and SIGTERM go on to all of them, and they end with a checkpoint. On Linux
they do so too when the launcher itself was killed, which can tell them nothing.
"""

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import lorakit as lk

PATIENCE = 3.0  # s in which the first process says an error that all processes have
FEW = 8  # processes that a machine of fewer cores may try; a thousand would take all its memory
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent has ended
LAST_STEP = 900  # s that the processes have for their last step and checkpoint after a signal


def launch(args: argparse.Namespace) -> int:
    """Start the processes, wait for them, and return the exit code of the command."""
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus, cores = torch.cuda.device_count(), lk.kernels.processors.usable()
    most = gpus or max(FEW, cores)
    if not 1 <= args.nproc <= most:
        raise lk.LorakitError(f"--nproc is {args.nproc}; on this machine it is from 1 to {most}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(LAST_STEP))
    logging.disable(logging.ERROR)  # the launcher's; the processes say what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=args.nproc,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    flags = ["--debug"] * args.debug + ["--profile"] * args.profile
    command = ["-m", "lorakit", "train", str(args.run_file), *args.overrides, *flags]
    try:
        elastic_launch(config, sys.executable)(*command)
    except SignalException:  # the processes have ended
        return 130
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0 and -code != signal.SIGTERM:  # which the launcher sends to the others
                name = signal.Signals(-code).name
                print(f"lorakit: rank {rank} was killed by {name}", file=sys.stderr)
        return 130 if 130 in codes.values() else 1
    return 0


@contextmanager
def one_of_many() -> Iterator[None]:
    """Let one of several processes be silent in the block, unless it is the first.

    It still says its errors, with its number, if the first one does not have the same. It gets
    SIGTERM when the launcher is gone.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            yield
        except (lk.LorakitError, OSError) as error:
            time.sleep(PATIENCE)  # the launcher ends this process when the first one fails
            raise lk.LorakitError(f"rank {rank}: {error}") from error
