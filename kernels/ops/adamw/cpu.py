"""The kernels of cpu.cpp, for lists of tensors that fit (`lists.py`), in host memory."""

import ctypes

from torch import Tensor

from ... import dispatch
from ...dispatch import FLOAT, INT64, POINTER
from ..nf4 import ABSMAX_FLOOR
from .lists import Options, changed, numbers, work
from .state import Moment8bit, signed_map, unsigned_map

SIZE = 8192  # values of a piece: whole blocks, which the second cache holds
ALIGNMENT = 1  # bytes, of every tensor


class Step(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("tensors", "pieces")),
        *((name, POINTER) for name in ("m_levels", "m_edges", "v_levels", "v_edges")),
        *((name, INT64) for name in ("count", "size")),
        *((name, FLOAT) for name in ("decay", "beta1", "rest1", "beta2", "rest2")),
        *((name, FLOAT) for name in ("rate", "correction", "eps", "floor")),
    )


def _run(op: str, groups: list[tuple[Tensor, ...]], maps: list[Tensor], options: Options) -> None:
    tables = work(groups, SIZE)
    pointers = [t.data_ptr() for t in (*tables, *maps)] + [None] * (4 - len(maps))
    step = Step(*pointers, len(tables[1]), SIZE, *numbers(options), ABSMAX_FLOOR)
    dispatch.function(op, POINTER)(ctypes.addressof(step))


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    options: Options,
) -> None:
    groups = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    _run("adamw", groups, [], options)
    changed(params, exp_avgs, exp_avg_sqs)


def adamw_step_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Moment8bit],
    exp_avg_sqs: list[Moment8bit],
    options: Options,
) -> None:
    groups = zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    device = params[0].device
    maps = [*signed_map(device), *unsigned_map(device)]
    _run("adamw_8bit", [(p, g, *m, *v) for p, g, m, v in groups], maps, options)
    changed(params, exp_avgs, exp_avg_sqs)
