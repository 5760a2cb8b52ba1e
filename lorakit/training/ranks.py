"""The processes of a run, one a GPU or a few cores each: who computes what, and how they meet.

torchrun starts R processes, the ranks 0 to R - 1. All of them load the model, read the rows and go
through the same steps; `Share` says which micro-batches, batches and rows of an evaluation are this
rank's. Rank 0 alone writes, prints and uploads. A process by itself is `Ranks`, which computes all
and waits for nobody; several are a `RankGroup`.

Messages of the host (flags, losses of an evaluation, errors) go through gloo. Gradients go through
NCCL on GPUs, and through gloo else. No message waits for ever: a rank that has died closes its
connections, and one that hangs runs into a limit of time. Then the others look whose pulse has
stopped, or who has come to fewer meetings than they have, and end in a sentence that names it.
"""

import atexit
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.evaluation.share import ALL, Share
from lorakit.training.gradients import ALONE, FastSum, GradientSum, Meeting, OrderedSum, WideSum
from lorakit.training.pulse import Pulse

PATIENT = timedelta(hours=1)  # for what a rank may do while others wait: load, save, upload, score
STEP = timedelta(minutes=15)  # for a micro-batch

T = TypeVar("T")


class Ranks:
    """One process that computes everything; the base class of several."""

    rank, size, share = 0, 1, ALL
    on_machine = 1
    """How many of the processes are on this one's machine, itself among them."""
    grace = 0.0
    """Seconds after a signal in which another one is taken for the same; see interrupt.py."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes and prints what belongs to the run."""
        return self.rank == 0

    def first(self, function: Callable[[], T]) -> T:
        """Return what the function returns on rank 0, which alone calls it.

        Its result must be small, and something that pickle takes. An error there is one everywhere.
        """
        return function()

    def meeting(self) -> Meeting:
        """Return the ranks as those that gradients are sent between.

        Raises LorakitError if there is one process.
        """
        raise LorakitError("train: full: the weights are divided, and one process trains alone")

    def together(self, function: Callable[[], None]) -> None:
        """Call the function on all ranks, which meet in it. An error on rank 0 is one everywhere.

        On rank 0 it goes through all its meetings before it raises an error.
        """
        function()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any rank has set it."""
        return list(flags)

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Raise LorakitError, which names a value, unless all of them are equal on all ranks."""

    def wait(self) -> None:
        """Wait until all ranks have come here."""

    def gradients(
        self, params: Sequence[Tensor], reduce: str, varies: bool, several: bool = False
    ) -> GradientSum:
        """Return what adds the gradients of a step; see gradients.py for the arguments.

        `several` says whether a step has more than one micro-batch.
        """
        wide = several and any(p.dtype == torch.bfloat16 for p in params)
        return WideSum(params) if wide else ALONE


class RankGroup(Ranks):
    """One of several processes; see the module.

    Args:
        device: The device of this rank's model.
    """

    grace = 5.0  # a cluster may send a signal to torchrun, which passes it on, and to the ranks

    def __init__(self, device: torch.device):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.share = Share(self.rank, self.size, self._collect)
        self.meetings = 0
        # torch 2.13 has a new name for it, which earlier ones lack
        old = r".torch\.distributed\.all_gather_into_tensor. is deprecated"
        warnings.filterwarnings("ignore", message=old, category=FutureWarning)
        self.places = [f"rank {rank}" for rank in range(self.size)]
        self.pulse = Pulse(self)
        with self._meeting():
            self.host = dist.new_group(timeout=STEP, backend="gloo")
            self.patient = dist.new_group(timeout=PATIENT, backend="gloo")
            self.data = self.host
            if device.type == "cuda":
                self.data = dist.new_group(timeout=STEP, backend="nccl")
        machines = self._all(socket.gethostname())
        self.on_machine = machines.count(machines[self.rank])
        if len(set(machines)) > 1:
            self.places = [f"rank {rank} on {name}" for rank, name in enumerate(machines)]

    # ---- messages of the host ----

    def first(self, function: Callable[[], T]) -> T:
        found: list[Any] = [None, None]
        problem: BaseException | None = None
        if self.rank == 0:
            try:
                found[0] = function()
            except BaseException as error:
                problem, found[1] = error, str(error) or type(error).__name__
        with self._meeting():
            dist.broadcast_object_list(found, src=0, group=self.patient)
        if problem is not None:
            raise problem
        if found[1] is not None:
            raise LorakitError(found[1])
        result: T = found[0]
        return result

    def meeting(self) -> Meeting:
        return self

    def together(self, function: Callable[[], None]) -> None:
        problem: Exception | None = None
        try:
            function()
        except Exception as error:
            problem = error

        def tell() -> None:
            if problem is not None:
                raise problem

        self.first(tell)
        tell()

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.uint8)
        with self._meeting():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return found.bool().tolist()

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        of_first, *others = self._all(dict(values()))
        for name, value in of_first.items():
            for rank, theirs in enumerate(others, 1):
                if theirs.get(name) != value:
                    raise LorakitError(
                        f"train: {self.places[rank]} has another {name} than rank 0; all ranks "
                        "need the same"
                    )

    def wait(self) -> None:
        with self._meeting():
            dist.barrier(group=self.patient)

    def _collect(self, mine: list[Any]) -> list[Any]:
        """Return the items of all ranks, dealt as `Share` deals them."""
        parts = self._all(mine)
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def _all(self, mine: Any) -> list[Any]:
        """Return what each rank has."""
        found: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(found, mine, group=self.patient)
        return found

    # ---- gradients ----

    def gradients(
        self, params: Sequence[Tensor], reduce: str, varies: bool, several: bool = False
    ) -> GradientSum:
        kind = OrderedSum if reduce == "ordered" else FastSum
        return kind(self, params, varies, params[0].device)

    def exchange(self, received: Tensor, sent: Tensor) -> None:
        """Send slice k of `sent` to rank k, and receive one of each; both dense, of one size."""
        with self._meeting():  # as bytes, which every library sends, whatever the dtype is
            dist.all_to_all_single(_bytes(received), _bytes(sent), group=self.data)

    def gather(self, received: Tensor, sent: Tensor) -> None:
        """Receive what each rank has sent, one after the other; both dense."""
        with self._meeting():
            dist.all_gather_into_tensor(_bytes(received), _bytes(sent), group=self.data)

    def collect(self, received: Tensor | None, sent: Tensor, where: int) -> None:
        """Let rank `where` receive what each rank has sent, one after the other; all dense."""
        parts = None if received is None else list(_bytes(received).chunk(self.size))
        with self._meeting():
            dist.gather(_bytes(sent), parts, group=self.data, group_dst=where)

    def add_up(self, values: Tensor) -> None:
        """Add the values of all ranks, in any order, in place."""
        with self._meeting():
            dist.all_reduce(values, group=self.data)

    # ---- the end ----

    def leave(self, *, done: bool) -> None:
        """End the connections: when all are done, or at once, so that the others notice."""
        self.pulse.end()
        groups = {self.host, self.patient}
        for group in groups | {self.data} if done else groups:  # NCCL may wait for who is gone
            dist.destroy_process_group(group)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Turn the error of a message that did not get through into a sentence."""
        self.meetings += 1
        try:
            yield
        except RuntimeError as error:
            raise LorakitError(self._what_is_wrong(error)) from error

    def _what_is_wrong(self, error: RuntimeError) -> str:
        again = "the run cannot go on; with resume: auto it goes on from its last checkpoint"
        reason = str(error).partition("\n")[0][:200]
        silent, behind = self.pulse.look_around()
        names = ", ".join(self.places[rank] for rank in silent or behind)
        if silent:
            return f"train: {names} ended or hangs: {again}"
        if behind:
            return f"train: {names} did not come to where the others wait ({reason}): {again}"
        return f"train: the ranks have lost each other ({reason}): {again}"


def _bytes(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.uint8)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, or a group that is initialised already.

    A process that torchrun has not started is alone.

    Args:
        device: The device of this rank's model.

    Yields:
        The ranks.

    Raises:
        LorakitError: Ranks are missing.
    """
    if not start_group(device):
        yield Ranks()
        return
    group = RankGroup(device)
    done = False
    try:
        yield group
        group.wait()
        done = True
    finally:
        group.leave(done=done)


def start_group(device: torch.device) -> bool:
    """Start the group of the processes that torchrun has started, unless somebody has.

    Args:
        device: The device of this rank's model.

    Returns:
        Whether there are several processes.

    Raises:
        LorakitError: Ranks are missing, or the environment does not say which they are.
    """
    if dist.is_available() and not dist.is_initialized() and _started_by_torchrun():
        _start(device)
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _started_by_torchrun() -> bool:
    """Return whether the environment tells of several processes, of which this is one.

    Raises LorakitError if what it tells is not complete, or cannot be.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    found = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise LorakitError(
                f"train: {name} is {text!r} in the environment, where torchrun sets a number; "
                "start the processes with torchrun, or unset RANK and WORLD_SIZE"
            )
        found[name] = int(text)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise LorakitError(
            f"train: RANK is {found['RANK']} in the environment, and WORLD_SIZE "
            f"{found['WORLD_SIZE']}; ranks are counted from 0"
        )
    if not os.environ.get("MASTER_ADDR"):
        raise LorakitError(
            "train: MASTER_ADDR is not in the environment; start the processes with torchrun, or "
            "unset RANK and WORLD_SIZE"
        )
    return found["WORLD_SIZE"] > 1


def _start(device: torch.device) -> None:
    """Start the group of processes that torchrun's environment tells of."""
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENT))
        own = dist.PrefixStore(name_of_start(store, rank, size), store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENT)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise LorakitError(f"train: the ranks did not find each other ({reason})") from error
    atexit.register(_end)


def name_of_start(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the ranks of this start share, and no others have ever had.

    When torchrun starts all ranks again, its store may hold what the last ones have written. They
    would look for each other at the old addresses, and wait. So rank 0 offers a name, each rank
    answers with a word of its own, and whoever finds its word in the result takes the name.

    Raises RuntimeError if a rank does not answer.
    """
    end, word, offered = time.monotonic() + PATIENT.total_seconds(), uuid.uuid4().hex, ""
    if rank == 0:
        store.set("lorakit/offer", word)
    while time.monotonic() < end:
        name = store.get("lorakit/offer").decode()
        if name != offered:
            offered = name
            store.set(f"lorakit/{name}/{rank}", word)
        answers = [f"lorakit/{name}/{each}" for each in range(size)]
        if rank == 0 and store.check(answers):
            words = [store.get(answer).decode() for answer in answers]
            store.set(f"lorakit/{name}/all", " ".join(words))
        there = store.check([f"lorakit/{name}/all"])
        if there and word in store.get(f"lorakit/{name}/all").decode().split():
            return f"lorakit/{name}"
        time.sleep(0.05)
    raise RuntimeError("a rank did not answer")


def _end() -> None:
    """End the group, unless somebody has."""
    if dist.is_initialized():
        dist.destroy_process_group()
