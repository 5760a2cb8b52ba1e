"""Calls of the C++ kernels in cpu.cpp, for lists of tensors that fit (lists.py), in host memory."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from ... import dispatch
from ...dispatch import FLOAT, INT64, POINTER
from ..nf4 import ABSMAX_FLOOR
from .lists import Numbers, Update, changed, work
from .state import Moment8bit, signed_map, unsigned_map

SIZE = 8192  # values of a piece: whole blocks, which the second cache holds
ALIGNMENT = 1  # bytes, of every tensor


class Step(ctypes.Structure):
    """`Step` of cpu.cpp: the arguments of both kernels."""

    _fields_ = (
        *((name, POINTER) for name in ("tensors", "pieces")),
        *((name, POINTER) for name in ("m_levels", "m_edges", "v_levels", "v_edges")),
        *((name, INT64) for name in ("count", "size")),
        *((name, FLOAT) for name in ("decay", "beta1", "rest1", "beta2", "rest2")),
        *((name, FLOAT) for name in ("rate", "correction", "eps", "floor")),
    )


def _run(
    op: str, groups: Sequence[tuple[Tensor, ...]], maps: list[Tensor], numbers: Numbers
) -> None:
    _, tensors, pieces = work(groups, SIZE)
    pointers = [t.data_ptr() for t in (tensors, pieces, *maps)] + [None] * (4 - len(maps))
    step = Step(*pointers, len(pieces), SIZE, *numbers, ABSMAX_FLOOR)
    dispatch.function(op, POINTER)(ctypes.addressof(step))


def adamw_step(update: Update[Tensor]) -> None:
    """Call the C++ kernel `adamw`; see cpu.cpp."""
    _run("adamw", list(zip(*update.lists, strict=True)), [], update.numbers)
    changed(update)


def adamw_step_8bit(update: Update[Moment8bit]) -> None:
    """Call the C++ kernel `adamw_8bit`; see cpu.cpp."""
    groups = [(p, g, *m, *v) for p, g, m, v in zip(*update.lists, strict=True)]
    device = update.params[0].device
    _run("adamw_8bit", groups, [*signed_map(device), *unsigned_map(device)], update.numbers)
    changed(update)
