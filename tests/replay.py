"""The rules of a CUDA graph on a CPU: what was recorded runs again as it was, on the same memory.

    recorder = Replays()
    replay, result = recorder.record(f)    # f's operations are noted; all tensors stay as they were
    replay()                               # all of them again, in order; f's Python does not run
    recorder.problems                      # what a capture refuses: waits, shapes decided by data

A number that Python computed (a length, a rate, a seed) is what it was while f was recorded. What
an operation made lies where it lay then. So `replay` has the bits of f if and only if f keeps all
that changes in tensors which stay: the very thing that a graph on a GPU asks for.

Noted are torch's operations, by TorchDispatchMode, backward's too, and the launches of Triton
kernels, which the interpreter runs (tests/triton_interpreter.py). C++ kernels are not: they would
make a recording wrong, so use the backends "reference" and "triton".
"""

import contextlib
import gc
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.kernels import dispatch
from lorakit.training.captured import Recording

WAITS = {"_local_scalar_dense", "is_nonzero", "equal"}
BY_DATA = {"nonzero", "masked_select", "unique", "_unique2", "bincount"}
HOST = {"randint"}  # drawn in host memory, on a machine with a GPU too: the numbers of dropout
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

Operation = Callable[[], None]


class Replays:
    """A recorder (`lorakit.training.captured.Recorder`) whose recordings are lists of operations.

    `recorded` and `replayed` count its calls.
    """

    def __init__(self):
        self.problems: list[str] = []
        self.recorded = self.replayed = 0

    def run(self, function):
        """Run the function as it is."""
        return function()

    def record(self, function) -> Recording:
        """Record the function; whatever tensor exists is as it was before."""
        before = [(t, t.clone()) for t in _all_tensors()]
        noted = _Noted(self.problems)
        with _launches(noted), noted:
            result = function()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for operation in noted.operations:
                    operation()

        return Recording(replay, result)


def _all_tensors() -> list[Tensor]:
    """Every memory that Python holds a tensor of, whole."""
    found: dict[int, Tensor] = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, Parameter) and each.device.type == "cpu" and not each.is_sparse:
            memory = each.untyped_storage()
            if memory.nbytes():
                whole = torch.empty(0, dtype=torch.uint8).set_(memory)
                found[memory.data_ptr()] = whole
    return list(found.values())


class _Noted(TorchDispatchMode):
    def __init__(self, problems: list[str]):
        super().__init__()
        self.operations: list[Operation] = []
        self.problems, self.held, self.inside = problems, [], False
        self.of_host: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch calls ten functions of its own around each operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside:  # of the interpreter's own, while it runs a kernel
            return out
        name = func._schema.name.split("::")[1]
        if name in HOST:
            self.of_host.add(_memory(out))
            self.held.append(out)
            return out
        if name in WAITS and _memory(args[0]) in self.of_host:
            return out
        if name in WAITS | BY_DATA:
            self.problems.append(f"{name} in {_where()}")
        self.held.append((args, kwargs, out))  # as a graph's memory stays its own
        given = {_memory(t) for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(out) if _memory(t) not in given]
        a_view = _tensors(out) and not made and not func._schema.is_mutable
        if name in MEMORY or a_view:
            return out

        def again() -> None:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.shape != new.shape:
                    raise RuntimeError(f"{name} made {old.shape} once, now {new.shape}")
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)

        self.operations.append(again)
        return out


@contextlib.contextmanager
def _launches(noted: _Noted):
    """Note the launches of Triton kernels, if the interpreter is at hand."""
    if dispatch.compiles_to() != "interpreted":
        yield
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run  # the interpreter's

    def note(function, *args, **options):
        noted.operations.append(lambda: launch(function, *args, **options))
        noted.inside = True
        try:
            return launch(function, *args, **options)
        finally:
            noted.inside = False

    with mock.patch.object(JITFunction, "run", note):
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/lorakit/" in frame.filename or "/kernels/" in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return "torch"
