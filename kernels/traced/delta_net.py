"""The operators of delta nets; their backwards compute the forward again."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import causal_conv as conv
from ..ops import delta_net
from .attention import listed
from .library import apart, define, differentiable, gradient, operator_of, recomputed


def _convolve(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Sequence[int] | None
) -> Tensor:
    return conv.causal_conv(x, weight, state=state, lengths=lengths)


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    lengths: Sequence[int] | None,
) -> Tensor:
    return delta_net.gated_delta_net(q, k, v, g, beta, state=state, lengths=lengths)


def _read_with_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    return tuple(apart(delta_net.gated_delta_net(q, k, v, g, beta, state=state, with_state=True)))


def _fake_with_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, _, nv, dv = v.shape
    return v.new_empty(v.shape), g.new_empty(B, nv, q.shape[-1], dv)


TOKENS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state"
differentiable(
    "causal_conv",
    "Tensor x, Tensor weight, Tensor? state, SymInt[]? lengths",
    "Tensor",
    2,
    _convolve,
    lambda x, *rest: x.new_empty(x.shape),
)
differentiable(
    "gated_delta_net",
    f"{TOKENS}, SymInt[]? lengths",
    "Tensor",
    5,
    _read,
    lambda q, k, v, *rest: v.new_empty(v.shape),
)
define(
    "gated_delta_net_with_state",
    f"({TOKENS}) -> (Tensor, Tensor)",
    _read_with_state,
    _fake_with_state,
)
_backward_of_values = recomputed(
    "gated_delta_net_with_state", TOKENS, 5, lambda *given: _read_with_state(*given)[0]
)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    return _backward_of_values([grad], ctx.needs_input_grad, ctx.saved_tensors)


gradient("gated_delta_net_with_state", _keep, _backward)
_conv_operator = operator_of("causal_conv")
_operator, _with_state = (
    operator_of(name) for name in ("gated_delta_net", "gated_delta_net_with_state")
)


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Sequence[int] | None
) -> Tensor:
    """Convolve as the op does; the arguments are those of a backend."""
    return _conv_operator(x, weight, state, listed(lengths))


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    lengths: Sequence[int] | None,
    with_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read the memory as the op does; the arguments are those of a backend, and `with_state`."""
    if with_state:
        return _with_state(q, k, v, g, beta, state)
    return _operator(q, k, v, g, beta, state, listed(lengths))
