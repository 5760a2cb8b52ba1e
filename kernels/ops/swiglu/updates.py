"""Low-rank updates that the products before an activation have left to be added."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch

MOST_RANK = 64  # of an update that the kernels add; of larger ones registers would spill


class Update(NamedTuple):
    """A sum that is still to be added to gate, up [M, I] or their y's gradient.

    It is low B^T for gate and up, and low A for the gradient.
    """

    low: Tensor  # [M, r], whose rows may lie apart
    matrix: Tensor  # B [I, r] or A [r, I], contiguous


Updates = tuple[Update | None, Update | None, Update | None]  # of dy, gate and up


def adds_updates(x: Tensor, ranks: list[int]) -> bool:
    """Return whether kernels add updates of these ranks to tensors that are like x.

    Triton does so in 16 bits, where the GPU has matrix instructions for bf16.
    """
    if max(ranks) > MOST_RANK or x.dtype == torch.float32 or not dispatch.triton_runs(x):
        return False
    return dispatch.compiles_to() == "amdgcn" or dispatch.capability(x.device) >= (8, 0)
