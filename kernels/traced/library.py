"""The library `lorakit` of operators, and how an operator is put into it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lorakit", "DEF")


class Kept(SimpleNamespace):
    """The context of an autograd function that runs inside an operator."""

    saved_tensors: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors where autograd's own context has them."""
        self.saved_tensors = tensors


def define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Put an operator into the library.

    Args:
        name: what it is called in torch.ops.lorakit.
        schema: its arguments and results, as torch writes them: "(Tensor x) -> Tensor".
        run: computes it, on any device.
        fake: returns results of the right shape, dtype and device; they are contiguous.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorakit::{name}", fake, lib=LIBRARY)


def gradient(name: str, keep: Callable, backward: Callable) -> None:
    """Give an operator its gradient, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(f"lorakit::{name}", backward, setup_context=keep, lib=LIBRARY)


def recomputed(name: str, arguments: str, tensors: int, run: Callable) -> Callable:
    """Put an operator `name`_backward into the library, which runs the forward pass again.

    Args:
        name: of the operator that it belongs to.
        arguments: those of that operator; the first `tensors` are what gradients are computed for.
        tensors: how many.
        run: computes that operator on tensors that autograd sees.

    Returns:
        A function of the gradients of the results, of which tensors need a gradient, and of the
        arguments. It returns a gradient or None for every argument.
    """

    def again(grads: list[Tensor], need: list[bool], *given: Any) -> list[Tensor]:
        first = zip(given[:tensors], need, strict=True)
        leaves = [t if t is None else t.detach().requires_grad_(needed) for t, needed in first]
        with torch.enable_grad(), _autograd_sees():
            out = run(*leaves, *given[tensors:])
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        outs = [out] if isinstance(out, Tensor) else list(out)
        return apart(torch.autograd.grad(outs, sought, grads))

    def fake(grads: list[Tensor], need: list[bool], *given: Any) -> list[Tensor]:
        return like([t for t, needed in zip(given[:tensors], need, strict=True) if needed])

    schema = f"(Tensor[] grads, bool[] need, {arguments}) -> Tensor[]"
    define(f"{name}_backward", schema, again, fake)
    operator = operator_of(f"{name}_backward")

    def backward(grads: Sequence[Tensor], need: Sequence[bool], given: Sequence[Any]) -> tuple:
        need = list(need)[:tensors]
        if not any(need):
            return (None,) * len(given)
        found = iter(operator(list(grads), need, *given))
        wanted = (next(found) if needed else None for needed in need)
        return *wanted, *(None,) * (len(given) - tensors)

    return backward


@contextmanager
def _autograd_sees() -> Iterator[None]:
    """Let autograd note what runs inside an operator, where torch has left it behind."""
    key = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
    ):
        yield


def differentiable(
    name: str, arguments: str, results: str, tensors: int, run: Callable, fake: Callable
) -> None:
    """Put an operator into the library whose backward is `recomputed`.

    Args:
        name: what it is called.
        arguments: its arguments; the first `tensors` are differentiable, and none is a list of
            tensors.
        results: its results, all of them differentiable.
        tensors: how many arguments are differentiable.
        run: computes it.
        fake: returns the results without values.
    """

    def dense(*given: Any) -> Any:
        out = run(*given)
        return out.contiguous() if isinstance(out, Tensor) else tuple(apart(out))

    define(name, f"({arguments}) -> {results}", dense, fake)
    backward = recomputed(name, arguments, tensors, run)

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        held = [t if isinstance(t, Tensor) else None for t in inputs]
        ctx.save_for_backward(*held)
        ctx.others = [None if isinstance(t, Tensor) else t for t in inputs]

    def of_kept(ctx: Any, *grads: Tensor) -> tuple:
        held = zip(ctx.saved_tensors, ctx.others, strict=True)
        given = [other if t is None else t for t, other in held]
        return backward(grads, ctx.needs_input_grad, given)

    gradient(name, keep, of_kept)


def operator_of(name: str) -> Callable:
    """Return the operator of that name."""
    return getattr(torch.ops.lorakit, name).default


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a contiguous tensor without values for each of `tensors`."""
    return [t.new_empty(t.shape) for t in tensors]


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors contiguous, and those that share memory with one before as copies."""
    found: list[Tensor] = []
    seen: set[int] = set()
    for t in tensors:
        t = t.contiguous()
        memory = t.untyped_storage().data_ptr()
        found.append(t.clone() if memory in seen else t)
        seen.add(memory)
    return found
