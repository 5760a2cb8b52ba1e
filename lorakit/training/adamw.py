"""AdamW, and the groups of parameters that it trains.

`AdamW` has the param_groups, state and state_dict of torch's optimizers. Its step is
`kernels.adamw_step`, or `kernels.adamw_step_8bit`, over all the tensors of a group. Its state is
resident, beside the parameters, or paged (paged_state.py). The step over paged state takes one page
after another and gives the same bits.

A parameter in bfloat16 takes the steps of one in fp32. Its state has a third tensor, `remainder`,
which holds what bfloat16 leaves out (kernels/ops/adamw/remainder.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import unwrap
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.kernels import Moment8bit, adamw_step, adamw_step_8bit
from lorakit.training.paged_state import MOMENTS, REMAINDER, PagedState, has_remainder, layout

# A parameter of fewer values keeps fp32 state, as in bitsandbytes: 8 bits are not worth the noise.
MIN_8BIT_SIZE = 4096
PAGE_BUDGET = 64 << 20  # bytes

Group = dict[str, Any]  # the parameters of a group and their settings, as in torch
State = dict[str, Tensor]  # the state of a parameter, or of a part of it, by name


class _Parts(NamedTuple):
    """Parameters or parts of them, with the gradient and the state of each."""

    params: list[Tensor]
    gradients: list[Tensor]
    states: list[State]


class _Plain:
    """Methods of torch's Optimizer without their decorators.

    The decorators import torch's compiler when a method is first called, which takes seconds and
    150 MB.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), with state of 32 or 8 bits.

    State of 32 bits is fp32 tensors exp_avg and exp_avg_sq beside every parameter, 8 bytes per
    value. State of 8 bits is their codes, uint8 [n], and exp_avg_absmax and exp_avg_sq_absmax, fp32
    [ceil(n / 256)], 2.03 bytes per value. Parameters of fewer than 4096 values keep fp32 state.

    The state of a bfloat16 parameter has `remainder` beside, int16 [n], 2 bytes per value: the
    parameter and its remainder are the fp32 number that the steps move, so small ones add up.

    Paged state lies in pages of 8 MB: in pinned host memory for parameters on a CUDA device, in a
    file that the system removes for parameters on the CPU. As many pages are resident as
    `page_budget` bytes hold. The state of every parameter is paged, however small it is, and the
    attribute `state` stays empty. Bits and state_dict are those of resident state. Such an
    optimizer cannot be pickled or copied. It can be saved by its state_dict.

    Args:
        params: Parameters, or groups of them as mappings with "params" and settings of their own.
        lr: The learning rate.
        betas: The decay rates of both moments, in [0, 1).
        eps: What is added to the root of the second moment.
        weight_decay: The part of each value that decays in a step, times lr.
        state_bits: 32 or 8. A group may have its own.
        paged: Whether the state is paged.
        page_budget: The bytes of resident pages, for each device; 64 MB by default.
        numbers: How many values a parameter has in all, of those that are a rank's parts.
        page_dir: The directory of the page file. None takes the system's directory for temporary
            files. It should lie on a disk.

    Raises:
        LorakitError: An argument is out of its range. In `step` with paged state, the disk is full
            or a parameter is not contiguous.
    """

    _paged: PagedState | None = None
    _numbers: Mapping[Tensor, int] = MappingProxyType({})

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
        paged: bool = False,
        page_budget: int = PAGE_BUDGET,
        page_dir: str | Path | None = None,
        numbers: Mapping[Tensor, int] | None = None,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise LorakitError(
                f"AdamW: lr, eps and weight_decay must not be negative and betas be in [0, 1): "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        if numbers is not None:
            self._numbers = numbers
        if paged:
            self._paged = PagedState(page_budget, page_dir)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults | {"state_bits": state_bits})

    def __getstate__(self) -> dict[str, Any]:
        if self._paged is not None:
            raise LorakitError(
                "AdamW: paged state can be neither pickled nor copied; save state_dict() and load "
                "it into a new optimizer"
            )
        return super().__getstate__()

    @property
    def needs_host(self) -> bool:
        """Whether the host takes part in a step, as it moves pages; see device_step.py."""
        return self._paged is not None

    @property
    def paged_bytes(self) -> int:
        """The bytes of all pages of the state, resident or not."""
        return 0 if self._paged is None else self._paged.nbytes

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as torch does. Raises LorakitError if its state_bits are not 32 or 8."""
        _Plain.add_param_group(self, param_group)
        bits = self.param_groups[-1]["state_bits"]
        if bits not in (32, 8):
            raise LorakitError(f"AdamW: state_bits is {bits!r}; it must be 32 or 8")

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's state_dict does; its tensors are the state itself.

        The tensors of paged state are a copy, in host memory that is mapped from a second file in
        page_dir and written page by page. It takes that much of the disk until the tensors are
        gone, and only the memory that the system can spare.
        """
        if self._paged is None:
            return _Plain.state_dict(self)
        self.state.update(self._paged.snapshot())
        try:
            return _Plain.state_dict(self)
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Each tensor keeps its dtype; torch's method would cast the state to the dtype of its
        parameter. State of lorakit 0.1.0 has no remainders, which then are 0. State of either kind,
        resident or paged, can be loaded into either. Paged state is given back first, and written
        page by page from tensors that may be memory-mapped (torch.load(..., mmap=True)).

        Raises LorakitError if the state is not that of AdamW for such parameters. Then nothing has
        changed.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        states: dict[Tensor, State] = {}
        for i, p in zip(saved, params, strict=False):  # torch says if they are not as many
            if state_dict["state"].get(i):
                states[p] = {**remainder_of(p), **state_dict["state"][i]}
                self._check_state(i, p, states[p])
        _Plain.load_state_dict(self, {**state_dict, "state": {}})
        if self._paged is None:
            for p, state in states.items():
                self.state[p].update({name: t.to(p.device) for name, t in state.items()})
        else:
            self._paged.clear()
            self._paged.add({p: _is_8bit(state) for p, state in states.items()})
            self._paged.fill(states)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None, as torch does, or to zero."""
        _Plain.zero_grad(self, set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Return what `closure` does, if it is given.

        The closure computes the gradients and the loss, as with torch's optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradients = self.start()
        for group, _ in with_gradients:
            group["step"] += 1
        if self._paged is not None:
            _step_paged(with_gradients, self._paged)
            return loss
        for group, params in with_gradients:
            self._take(group, params)
        return loss

    def _take(self, group: Group, params: list[Tensor]) -> None:
        """Take a step of a group over its parameters that have gradients, and resident state."""
        gradients = [_gradient(p).contiguous() for p in params]
        _update(group, _Parts(params, gradients, [self.state[p] for p in params]))

    def start(self) -> list[tuple[Group, list[Tensor]]]:
        """Give zero state to the parameters that have a gradient and no state.

        Returns:
            The groups of which parameters have gradients, and these parameters.
        """
        with_gradients: list[tuple[Group, list[Tensor]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._start(params, group)
                with_gradients.append((group, params))
        return with_gradients

    def moments(self, p: Tensor) -> tuple[Tensor, Tensor] | tuple[Moment8bit, Moment8bit]:
        """Return the resident state of a parameter, its exp_avg and its exp_avg_sq."""
        return _moments(self.state[p])

    def remainder(self, p: Tensor) -> Tensor | None:
        """Return what a bfloat16 parameter leaves out, int16 of its shape; None for others."""
        return self.state[p].get(REMAINDER)

    def _start(self, params: list[Tensor], group: Group) -> None:
        """Give zero state to those of the parameters of a group that have none."""
        state_bits = group["state_bits"]
        if self._paged is not None:
            fresh = [p for p in params if p not in self._paged]
            self._paged.add({p: self._in_8bit(p, state_bits) for p in fresh})
            return
        fresh = [p for p in params if not self.state[p]]
        in_8bit = [self._in_8bit(p, state_bits) for p in fresh]
        for p, state in zip(fresh, _zero_states(fresh, in_8bit), strict=True):
            self.state[p].update(state)

    def _check_state(self, number: int, p: Tensor, state: Mapping[str, Any]) -> None:
        """Raise LorakitError if `state` is not that of this optimizer for parameter `p`."""
        in_8bit = _is_8bit(state)
        expected = {
            name: (dtype, (count,) if in_8bit and name != REMAINDER else tuple(p.shape))
            for name, (dtype, count) in layout(p.numel(), in_8bit, has_remainder(p)).items()
        }
        check_tensors(number, p, state, expected)

    def in_8bit(self, p: Tensor) -> bool:
        """Return whether the state of one of the parameters has, or will have, 8 bits."""
        groups = (g for g in self.param_groups if any(p is each for each in g["params"]))
        return self._in_8bit(p, next(groups)["state_bits"])

    def _in_8bit(self, p: Tensor, state_bits: int) -> bool:
        return _in_8bit(self._numbers.get(p, p.numel()), state_bits)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _step_paged(groups: list[tuple[Group, list[Tensor]]], paged: PagedState) -> None:
    """Update the parameters of groups, piece by piece as their state lies in the pages."""
    flat = {p: (p.view(-1), _gradient(p).reshape(-1)) for _, params in groups for p in params}
    number_of = {p: i for i, (_, params) in enumerate(groups) for p in params}
    for places in paged.walk(flat):
        parts = [_Parts([], [], []) for _ in groups]
        for p, piece, state in places:
            values, gradient = (t[piece.start : piece.stop] for t in flat[p])
            part = parts[number_of[p]]
            part.params.append(values)
            part.gradients.append(gradient)
            part.states.append(state)
        for (group, _), part in zip(groups, parts, strict=True):
            _update(group, part)


def _update(group: Group, parts: _Parts) -> None:
    """Take one step of a group over parameters, or parts of them, and their state."""
    options = {name: group[name] for name in ("step", "lr", "betas", "eps", "weight_decay")}
    rows: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
    for p, g, state in zip(*parts, strict=True):
        kind = _is_8bit(state), REMAINDER in state
        row = (p, g, *_moments(state), state.get(REMAINDER))
        rows.setdefault(kind, []).append(row)
    for (in_8bit, halves), some in rows.items():
        *lists, remainders = ([row[i] for row in some] for i in range(5))
        op = adamw_step_8bit if in_8bit else adamw_step
        op(*lists, remainders=remainders if halves else None, **options)


def _moments(state: State) -> tuple[Tensor, Tensor] | tuple[Moment8bit, Moment8bit]:
    """Return the two moments of a parameter's state, as the kernels take them."""
    if not _is_8bit(state):
        return state["exp_avg"], state["exp_avg_sq"]
    first, second = (Moment8bit(state[name], state[f"{name}_absmax"]) for name in MOMENTS)
    return first, second


def _in_8bit(n: int, state_bits: int) -> bool:
    return state_bits == 8 and n >= MIN_8BIT_SIZE


def state_bytes(p: Tensor, state_bits: int) -> int:
    """Return the bytes of a parameter's state, resident or in pages."""
    tensors = layout(p.numel(), _in_8bit(p.numel(), state_bits), has_remainder(p)).values()
    return sum(count * dtype.itemsize for dtype, count in tensors)


def _is_8bit(state: Mapping[str, Tensor]) -> bool:
    return "exp_avg_absmax" in state


def remainder_of(p: Tensor) -> State:
    """Return the remainder of a parameter as it is before the first step, if it has one."""
    return {REMAINDER: torch.zeros_like(p, dtype=torch.int16)} if has_remainder(p) else {}


def check_tensors(
    number: int,
    p: Tensor,
    state: Mapping[str, Any],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Raise LorakitError unless the state of `p` has tensors of these dtypes and shapes."""
    found = {n: (t.dtype, tuple(t.shape)) if isinstance(t, Tensor) else t for n, t in state.items()}
    if found != dict(expected):
        raise LorakitError(
            f"optimizer: the saved state of parameter {number}, of shape {tuple(p.shape)}, has "
            f"{found} instead of {dict(expected)}"
        )


def _zero_states(params: list[Tensor], in_8bit: list[bool]) -> Iterator[State]:
    """Yield the states before the first step.

    Those in fp32 lie side by side. Made one by one, in the middle of training, they would cut the
    heap's free memory into pieces too short for activations.
    """
    wide = [p for p, few_bits in zip(params, in_8bit, strict=True) if not few_bits]
    both = [iter(_side_by_side(wide)) for _ in MOMENTS]
    for p, few_bits in zip(params, in_8bit, strict=True):
        state = remainder_of(p)
        for name, tensors in zip(MOMENTS, both, strict=True):
            if few_bits:
                state[name], state[f"{name}_absmax"] = Moment8bit.zeros(p.numel(), p.device)
            else:
                state[name] = next(tensors)
        yield state


def _side_by_side(params: list[Tensor]) -> list[Tensor]:
    """Return fp32 zeros of the parameters' shapes, in one memory per device, each on 64 bytes."""
    sizes = [-(-p.numel() // 16) * 16 for p in params]
    flat: dict[torch.device, Tensor] = {}
    for device in {p.device for p in params}:
        total = sum(n for p, n in zip(params, sizes, strict=True) if p.device == device)
        flat[device] = torch.zeros(total, dtype=torch.float32, device=device)
    found = []
    for p, n in zip(params, sizes, strict=True):
        found.append(flat[p.device][: p.numel()].view(p.shape))
        flat[p.device] = flat[p.device][n:]
    return found


def decays(p: Tensor) -> bool:
    """Return whether weight decay is for a parameter: not for a bias, a norm or a magnitude."""
    return p.dim() > 1


def decay_groups(module: nn.Module, lr: float, weight_decay: float) -> list[Group]:
    """Return the parameters of a module that train, in groups for AdamW.

    Parameters of one dimension or none (a bias, a norm, DoRA's magnitude) do not decay.

    Args:
        module: A module, some parameters of which require gradients.
        lr: The learning rate of all groups.
        weight_decay: The decay of the parameters that decay.

    Returns:
        One group or two, with "params", "lr" and "weight_decay".

    Raises:
        LorakitError: No parameter trains.
    """
    return _groups(module, lr, weight_decay, lambda name, p: 1.0)


def loraplus_groups(
    module: nn.Module, lr: float, loraplus_lr_ratio: float, *, weight_decay: float = 0.0
) -> list[Group]:
    """Return the parameters that train in groups for LoRA+ (arXiv:2402.12354).

    Every lora_B learns loraplus_lr_ratio times as fast as the rest. So do parameters of one
    dimension or none (a bias, DoRA's magnitude), which do not decay.

    Args:
        module: A module, some parameters of which require gradients.
        lr: The learning rate of the rest.
        loraplus_lr_ratio: How many times as fast lora_B learns; the paper suggests 16.
        weight_decay: The decay of the parameters that decay.

    Returns:
        Up to three groups, with "params", "lr" and "weight_decay".

    Raises:
        LorakitError: The ratio is not positive, or no parameter trains.
    """
    if not loraplus_lr_ratio > 0:
        raise LorakitError(f"loraplus_lr_ratio must be positive, not {loraplus_lr_ratio}")

    def share(name: str, p: Tensor) -> float:
        return loraplus_lr_ratio if name.endswith("lora_B") or p.dim() <= 1 else 1.0

    return _groups(module, lr, weight_decay, share)


def _groups(
    module: nn.Module, lr: float, weight_decay: float, share: Callable[[str, Tensor], float]
) -> list[Group]:
    """Group the parameters that train by their share of the rate, and by whether they decay."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault((share(name, p), decays(p)), []).append(p)
    if not groups:
        raise LorakitError("no parameter trains; attach an adapter first")
    return [
        {"params": params, "lr": lr * rate, "weight_decay": weight_decay if decay else 0.0}
        for (rate, decay), params in groups.items()
    ]
