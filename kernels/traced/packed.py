"""A weight as a schema can say it: its tensors, and a string for the rest.

    dense      [W]                                     "1 dense"
    int8       [values, scale]                         "2 int8 bfloat16"
    4 bits     [codes, absmax]                         "2 nf4 64 bfloat16 4096 4096"
               [codes, absmax, nested_absmax, offset]  "4 nf4 64 bfloat16 4096 4096"

The string says how many tensors there are, what they are, and the dtype of the original; of a 4-bit
tensor also its block size and shape.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..dispatch import DTYPES
from ..ops.frozen_linear import frozen_linear
from ..ops.frozen_linear.dense import Packed
from ..ops.int8 import Int8Tensor
from ..ops.nf4 import NF4Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parts(w: Any) -> tuple[list[Tensor], str]:
    """Return the tensors of a weight and the string; they share its memory.

    Raises TypeError for a weight that is stored in another way: it has no schema.
    """
    if isinstance(w, NF4Tensor):
        held = [w.codes, w.absmax]
        if w.nested_absmax is not None and w.offset is not None:
            held += [w.nested_absmax, w.offset]
        shape = " ".join([str(n) for n in w.shape])
        return held, f"{len(held)} {w.quant_type} {w.block_size} {NAMES[w.dtype]} {shape}"
    if isinstance(w, Int8Tensor):
        return [w.values, w.scale], f"2 int8 {NAMES[w.dtype]}"
    if isinstance(w, Tensor):
        return [w], "1 dense"
    raise TypeError(f"a weight stored as {type(w).__name__} cannot be part of a traced graph")


def whole(held: Sequence[Tensor], form: str) -> Tensor | Packed:
    """Return the weight that `parts` took apart."""
    _, kind, *words = form.split()
    if kind == "dense":
        return held[0]
    if kind == "int8":
        return Int8Tensor(held[0], held[1], DTYPES[words[0]])
    nested, offset = held[2:] if len(held) == 4 else (None, None)
    shape = tuple(int(n) for n in words[2:])
    size, dtype = int(words[0]), DTYPES[words[1]]
    return NF4Tensor(held[0], held[1], nested, offset, shape, size, dtype, kind)


def packed(held: Sequence[Tensor], form: str) -> Packed:
    """Return the packed weight that `parts` took apart."""
    w = whole(held, form)
    assert not isinstance(w, Tensor)
    return w


def whole_of_each(held: Sequence[Tensor], forms: Sequence[str]) -> list[Tensor | Packed]:
    """Return the weights whose parts lie side by side in `held`."""
    found, start = [], 0
    for form in forms:
        count = int(form.split()[0])
        found.append(whole(held[start : start + count], form))
        start += count
    return found


class Frozen(NamedTuple):
    """A frozen linear layer, as the ops with adapters ask for it."""

    stored: Tensor | Packed
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [M, K] W^T + bias, [M, N]."""
        if isinstance(self.stored, Tensor):
            return F.linear(x, self.stored, self.bias)
        return frozen_linear(x, self.stored, self.bias)
