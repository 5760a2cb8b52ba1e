"""AdamW and learning-rate schedules.

`AdamW` has torch's param_groups, state and state_dict; its step is `kernels.adamw_step` over all
the tensors of a group, or `kernels.adamw_step_8bit`. Its state is resident, beside the parameters,
or paged (`paged_state.py`): then the same step goes over what lies in one page after another, with
the same bits. A schedule is a function of the step alone: nothing to save, nothing to resume.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.kernels import Moment8bit, adamw_step, adamw_step_8bit
from lorakit.training.paged_state import MOMENTS, PagedState, layout

# Values of a parameter with 8-bit state (bitsandbytes' rule); fewer are not worth the noise.
MIN_8BIT_SIZE = 4096
PAGE_BUDGET = 64 << 20


class _Plain:
    """Methods of torch's Optimizer as they were written: decorated as they are there, each imports
    torch's compiler when it is first called, which takes seconds and 150 MB.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101); its state has 32 or 8 bits.

    state_bits=32: fp32 tensors exp_avg and exp_avg_sq beside every parameter, 8 bytes per value.
    state_bits=8: their codes, uint8 [n], and exp_avg_absmax and exp_avg_sq_absmax, fp32
    [ceil(n / 256)], 2.03 bytes per value; parameters of fewer than 4096 values keep fp32 state.
    A group of parameters may have its own.

    paged: the state lies in pages of 8 MB, in pinned host memory for parameters on a CUDA device,
    in a file that the system removes for those on the CPU; of them as many are resident as
    `page_budget` bytes hold, 64 MB unless given. The file is in `page_dir`, or the system's
    directory for temporary files; there should be a disk behind it. Bits and state_dict are those
    of resident state, every tensor pages, and the attribute `state` stays empty. Such an optimizer
    cannot be pickled or copied; it can be saved by its state_dict.

    Raises LorakitError for a negative lr, eps or weight_decay, a beta outside of [0, 1), other
    state_bits, a page_budget below one page; and in `step`, where paged, for a full disk and for a
    parameter that is not contiguous.
    """

    _paged: PagedState | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
        paged: bool = False,
        page_budget: int = PAGE_BUDGET,
        page_dir: str | Path | None = None,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise LorakitError(
                f"AdamW: lr, eps and weight_decay must not be negative and betas be in [0, 1): "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _Plain.add_param_group(self, param_group)
        bits = self.param_groups[-1]["state_bits"]
        if bits not in (32, 8):
            raise LorakitError(f"AdamW: state_bits is {bits!r}; it must be 32 or 8")

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose tensors are the state itself.

        Of paged state it is a copy, in host memory that is mapped from a second file in page_dir
        and written page by page: it takes that much of the disk until the tensors are gone, and of
        memory only what the system can spare.
        """
        if self._paged is None:
            return _Plain.state_dict(self)
        self.state.update(self._paged.snapshot())
        try:
            return _Plain.state_dict(self)
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast every tensor of the state to the dtype of its parameter:
        here each keeps its own. State of either kind, resident or paged, can be loaded into either.

        Paged state is written page by page from tensors that may be memory-mapped themselves
        (torch.load(..., mmap=True)); what was there before is given back first.

        Raises LorakitError for state that is not AdamW's of such parameters, and then nothing has
        changed.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        states = {}
        for i, p in zip(saved, params, strict=False):  # torch says it if they are not as many
            if state_dict["state"].get(i):
                states[p] = state_dict["state"][i]
                _check_state(i, p, states[p])
        _Plain.load_state_dict(self, {**state_dict, "state": {}})
        if self._paged is None:
            for p, state in states.items():
                self.state[p].update({name: t.to(p.device) for name, t in state.items()})
        else:
            self._paged.clear()
            self._paged.add({p: _is_8bit(state) for p, state in states.items()})
            self._paged.fill(states)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _Plain.zero_grad(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = []  # with what has a gradient
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._start(params, group["state_bits"])
                groups.append((group, params))
        for group, _ in groups:
            group["step"] += 1
        if self._paged is not None:
            self._step_paged(groups)
            return loss
        for group, params in groups:
            gradients = [p.grad.contiguous() for p in params]
            _update(group, params, gradients, [self.state[p] for p in params])
        return loss

    def _start(self, params: list[Tensor], state_bits: int) -> None:
        """Zero state for those that have none."""
        if self._paged is not None:
            fresh = [p for p in params if p not in self._paged]
            self._paged.add({p: _in_8bit(p, state_bits) for p in fresh})
            return
        fresh = [p for p in params if not self.state[p]]
        for p, state in zip(fresh, _zero_states(fresh, state_bits), strict=True):
            self.state[p].update(state)

    def _step_paged(self, groups: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        flat = {p: (p.view(-1), p.grad.reshape(-1)) for _, params in groups for p in params}
        number_of = {p: i for i, (_, params) in enumerate(groups) for p in params}
        for places in self._paged.walk(flat):
            parts = [([], [], []) for _ in groups]
            for p, piece, state in places:
                values, gradient = (t[piece.start : piece.stop] for t in flat[p])
                for part, new in zip(parts[number_of[p]], (values, gradient, state), strict=True):
                    part.append(new)
            for (group, _), part in zip(groups, parts, strict=True):
                _update(group, *part)


def _update(
    group: Mapping[str, Any],
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
) -> None:
    """One step of a group, for parameters or parts of them and their state."""
    options = {name: group[name] for name in ("step", "lr", "betas", "eps", "weight_decay")}
    rows = list(zip(params, gradients, states, strict=True))
    wide = [row for row in rows if not _is_8bit(row[2])]
    adamw_step(
        [p for p, _, _ in wide],
        [g for _, g, _ in wide],
        *([state[name] for _, _, state in wide] for name in MOMENTS),
        **options,
    )
    narrow = [row for row in rows if _is_8bit(row[2])]
    adamw_step_8bit(
        [p for p, _, _ in narrow],
        [g for _, g, _ in narrow],
        *(
            [Moment8bit(state[name], state[f"{name}_absmax"]) for _, _, state in narrow]
            for name in MOMENTS
        ),
        **options,
    )


def _in_8bit(p: Tensor, state_bits: int) -> bool:
    return state_bits == 8 and p.numel() >= MIN_8BIT_SIZE


def _is_8bit(state: Mapping[str, Tensor]) -> bool:
    return "exp_avg_absmax" in state


def _check_state(number: int, p: Tensor, state: Mapping[str, Any]) -> None:
    in_8bit = _is_8bit(state)
    expected = {
        name: (dtype, (count,) if in_8bit else tuple(p.shape))
        for name, (dtype, count) in layout(p.numel(), in_8bit).items()
    }
    found = {
        name: (t.dtype, tuple(t.shape)) if isinstance(t, Tensor) else t for name, t in state.items()
    }
    if found != expected:
        raise LorakitError(
            f"AdamW: the saved state of parameter {number}, of shape {tuple(p.shape)}, has "
            f"{found} instead of {expected}"
        )


def _zero_states(params: list[Tensor], state_bits: int) -> Iterator[dict[str, Tensor]]:
    """The states before the first step. Those in fp32 lie side by side: made one by one, in the
    middle of training, they would cut the heap's free memory into pieces too short for activations.
    """
    in_8bit = [_in_8bit(p, state_bits) for p in params]
    wide = [p for p, few_bits in zip(params, in_8bit, strict=True) if not few_bits]
    both = [iter(_side_by_side(wide)) for _ in MOMENTS]
    for p, few_bits in zip(params, in_8bit, strict=True):
        state = {}
        for name, tensors in zip(MOMENTS, both, strict=True):
            if few_bits:
                state[name], state[f"{name}_absmax"] = Moment8bit.zeros(p.numel(), p.device)
            else:
                state[name] = next(tensors)
        yield state


def _side_by_side(params: list[Tensor]) -> list[Tensor]:
    """Zeros in fp32 of the same shapes, in one memory per device, each on 64 bytes."""
    sizes = [-(-p.numel() // 16) * 16 for p in params]
    flat = {}
    for device in {p.device for p in params}:
        total = sum(n for p, n in zip(params, sizes, strict=True) if p.device == device)
        flat[device] = torch.zeros(total, dtype=torch.float32, device=device)
    found = []
    for p, n in zip(params, sizes, strict=True):
        found.append(flat[p.device][: p.numel()].view(p.shape))
        flat[p.device] = flat[p.device][n:]
    return found


def decay_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of what trains, at most two: what has one dimension or none (a bias, a norm,
    DoRA's magnitude) does not decay.

    Raises LorakitError where nothing trains.
    """
    return _groups(module, lr, weight_decay, lambda name, p: 1.0)


def loraplus_groups(
    module: nn.Module, lr: float, loraplus_lr_ratio: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for LoRA+ (arXiv:2402.12354): every lora_B, and what has one dimension or
    none (a bias, DoRA's magnitude), learns loraplus_lr_ratio times as fast as the rest that trains.
    Decay is that of `decay_groups`.

    Raises LorakitError for a ratio that is not positive, or where nothing trains.
    """
    if not loraplus_lr_ratio > 0:
        raise LorakitError(f"loraplus_lr_ratio must be positive, not {loraplus_lr_ratio}")

    def share(name: str, p: Tensor) -> float:
        return loraplus_lr_ratio if name.endswith("lora_B") or p.dim() <= 1 else 1.0

    return _groups(module, lr, weight_decay, share)


def _groups(
    module: nn.Module, lr: float, weight_decay: float, share: Callable[[str, Tensor], float]
) -> list[dict[str, Any]]:
    """What trains, by its share of the rate and whether it decays."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault((share(name, p), p.dim() > 1), []).append(p)
    if not groups:
        raise LorakitError("no parameter trains; attach an adapter first")
    return [
        {"params": params, "lr": lr * rate, "weight_decay": weight_decay if decays else 0.0}
        for (rate, decays), params in groups.items()
    ]
