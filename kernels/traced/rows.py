"""The operators that go over rows and heads: norms, rotations, gated activations."""

from typing import Any

import torch
from torch import Tensor

from ..ops import rms_norm as norms
from ..ops import rope as rotations
from ..ops import swiglu
from .library import apart, define, differentiable, gradient, like, operator_of, recomputed


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str) -> Tensor:
    return norms.rms_norm(x, weight, eps, weight_offset=offset, casting_mode=casting_mode)


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str
) -> tuple[Tensor, Tensor]:
    return norms.add_rms_norm(
        x, residual, weight, eps, weight_offset=offset, casting_mode=casting_mode
    )


def _norm_of_sum(
    total: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str
) -> tuple[Tensor, Tensor]:
    """Return the norm of a sum, and the sum: `_add_norm` of it and zeros, which it had made."""
    zeros = total.new_zeros(total.shape[-1]).expand_as(total)
    return _add_norm(total, zeros, weight, eps, offset, casting_mode)


NORM = "float eps, float weight_offset, str casting_mode"
differentiable(
    "rms_norm",
    f"Tensor x, Tensor weight, {NORM}",
    "Tensor",
    2,
    _norm,
    lambda x, *rest: x.new_empty(x.shape),
)
define(
    "add_rms_norm",
    f"(Tensor x, Tensor residual, Tensor weight, {NORM}) -> (Tensor, Tensor)",
    lambda *given: tuple(apart(_add_norm(*given))),
    lambda x, *rest: tuple(like([x, x])),
)
_norm_of_sum_backward = recomputed(
    "add_rms_norm", f"Tensor total, Tensor weight, {NORM}", 2, _norm_of_sum
)


def _keep_sum(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep the sum alone, of which the gradients of both terms are made."""
    _, _, weight, *ctx.options = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_of_sum(ctx: Any, *grads: Tensor) -> tuple:
    of_x, of_residual, of_weight, *_ = ctx.needs_input_grad
    given = [*ctx.saved_tensors, *ctx.options]
    dx, dw, *others = _norm_of_sum_backward(grads, [of_x or of_residual, of_weight], given)
    return dx if of_x else None, dx if of_residual else None, dw, *others


gradient("add_rms_norm", _keep_sum, _backward_of_sum)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(apart(rotations.rope(q, k, cos, sin)))


define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _turn,
    lambda q, k, *tables: tuple(like([q, k])),
)


def _turn_back(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
    cos, sin = ctx.saved_tensors
    return *torch.ops.lorakit.rope(dq, dk, cos, -sin), None, None


gradient("rope", lambda ctx, inputs, output: ctx.save_for_backward(*inputs[2:]), _turn_back)


def _norm_turn(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    offset: float,
    casting_mode: str,
) -> tuple[Tensor, Tensor]:
    return rotations.norm_rope(
        q, k, q_weight, k_weight, eps, cos, sin, weight_offset=offset, casting_mode=casting_mode
    )


differentiable(
    "norm_rope",
    "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin, "
    "float weight_offset, str casting_mode",
    "(Tensor, Tensor)",
    4,
    _norm_turn,
    lambda q, k, *rest: tuple(like([q, k])),
)

define(
    "gated",
    "(Tensor gate, Tensor up, str hidden_act) -> Tensor",
    lambda gate, up, hidden_act: swiglu.gated(gate, up, hidden_act).contiguous(),
    lambda gate, up, hidden_act: gate.new_empty(gate.shape),
)


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, hidden_act: str) -> list[Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    into = torch.empty_like(gate), torch.empty_like(up)
    y = grad.clone(memory_format=torch.contiguous_format)  # what is given is not written over
    swiglu.gated_backward_(y, gate, up, hidden_act, into)
    return list(into)


define(
    "gated_backward",
    "(Tensor grad, Tensor gate, Tensor up, str hidden_act) -> Tensor[]",
    _gated_backward,
    lambda grad, gate, up, hidden_act: like([gate, up]),
)


def _keep_gated(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.hidden_act = inputs[2]


def _backward_of_gated(ctx: Any, grad: Tensor) -> tuple:
    return *torch.ops.lorakit.gated_backward(grad, *ctx.saved_tensors, ctx.hidden_act), None


gradient("gated", _keep_gated, _backward_of_gated)
rms_norm = operator_of("rms_norm")
add_rms_norm = operator_of("add_rms_norm")
rope = operator_of("rope")
norm_rope = operator_of("norm_rope")
gated = operator_of("gated")
