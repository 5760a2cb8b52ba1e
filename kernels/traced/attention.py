"""The operator of attention.

Its backward computes attention again, a quarter of what attention takes in all: what each backend
keeps for backward is its own business.
"""

from collections.abc import Sequence

from torch import Tensor

from ..ops import attention as op
from ..ops.attention.documents import PaddedDocuments
from .library import differentiable, operator_of


def listed(lengths: Sequence[int] | None) -> list[int] | None:
    """Return the lengths of documents as an operator takes them.

    Raises:
        TypeError: they are `PaddedDocuments`.
    """
    if isinstance(lengths, PaddedDocuments):
        raise TypeError("PaddedDocuments change under a CUDA graph; a traced graph takes lengths")
    return None if lengths is None else list(lengths)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
) -> Tensor:
    return op.attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        softcap=softcap,
        window=window,
        lengths=lengths,
        sinks=sinks,
    )


differentiable(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? mask, float? scale, float? softcap, "
    "SymInt? window, SymInt[]? lengths",
    "Tensor",
    4,
    _attend,
    lambda q, *rest: q.new_empty(q.shape),
)
_operator = operator_of("attention")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend as the op does; the arguments are those of a backend."""
    return _operator(q, k, v, sinks, mask, scale, softcap, window, listed(lengths))
