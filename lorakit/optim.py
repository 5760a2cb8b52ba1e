"""AdamW and learning-rate schedules.

`AdamW` has torch's param_groups, state and state_dict; its step is `kernels.adamw_step` over all
the tensors of a group, or `kernels.adamw_step_8bit`. A schedule is a function of the step alone:
nothing to save, nothing to resume.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from .config import LorakitError
from .kernels import Moment8bit, adamw_step, adamw_step_8bit

# Values of a parameter with 8-bit state (bitsandbytes' rule); fewer are not worth the noise.
MIN_8BIT_SIZE = 4096
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Plain:
    """Methods of torch's Optimizer as they were written: decorated as they are there, each imports
    torch's compiler when it is first called, which takes seconds and 150 MB.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101); its state has 32 or 8 bits.

    state_bits=32: fp32 tensors exp_avg and exp_avg_sq beside every parameter, 8 bytes per value.
    state_bits=8: their codes, uint8 [n], and exp_avg_absmax and exp_avg_sq_absmax, fp32
    [ceil(n / 256)], 2.03 bytes per value; parameters of fewer than 4096 values keep fp32 state.
    A group of parameters may have its own.

    Raises LorakitError for a negative lr, eps or weight_decay, a beta outside of [0, 1), and other
    state_bits.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise LorakitError(
                f"AdamW: lr, eps and weight_decay must not be negative and betas be in [0, 1): "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults | {"state_bits": state_bits})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _Plain.add_param_group(self, param_group)
        bits = self.param_groups[-1]["state_bits"]
        if bits not in (32, 8):
            raise LorakitError(f"AdamW: state_bits is {bits!r}; it must be 32 or 8")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast every tensor of the state to the dtype of its parameter:
        here each keeps its own.
        """
        _Plain.load_state_dict(self, state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _Plain.zero_grad(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            fresh = [p for p in params if not self.state[p]]
            for p, state in zip(fresh, _zero_states(fresh, group["state_bits"]), strict=True):
                self.state[p].update(state)
            group["step"] += 1
            options = {name: group[name] for name in ("step", "lr", "betas", "eps", "weight_decay")}
            in_8bit = [p for p in params if "exp_avg_absmax" in self.state[p]]
            in_fp32 = [p for p in params if "exp_avg_absmax" not in self.state[p]]
            adamw_step(
                in_fp32,
                [p.grad for p in in_fp32],
                [self.state[p]["exp_avg"] for p in in_fp32],
                [self.state[p]["exp_avg_sq"] for p in in_fp32],
                **options,
            )
            adamw_step_8bit(
                in_8bit,
                [p.grad for p in in_8bit],
                [self._moment(p, "exp_avg") for p in in_8bit],
                [self._moment(p, "exp_avg_sq") for p in in_8bit],
                **options,
            )
        return loss

    def _moment(self, p: Tensor, name: str) -> Moment8bit:
        return Moment8bit(self.state[p][name], self.state[p][f"{name}_absmax"])


def _zero_states(params: list[Tensor], state_bits: int) -> Iterator[dict[str, Tensor]]:
    """The states before the first step. Those in fp32 lie side by side: made one by one, in the
    middle of training, they would cut the heap's free memory into pieces too short for activations.
    """
    in_8bit = [state_bits == 8 and p.numel() >= MIN_8BIT_SIZE for p in params]
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
    """Zeros in fp32 of the same shapes, in one memory per device."""
    flat = {}
    for device in {p.device for p in params}:
        total = sum(p.numel() for p in params if p.device == device)
        flat[device] = torch.zeros(total, dtype=torch.float32, device=device)
    found = []
    for p in params:
        mine, flat[p.device] = flat[p.device].split([p.numel(), flat[p.device].numel() - p.numel()])
        found.append(mine.view(p.shape))
    return found


def loraplus_groups(
    module: nn.Module, lr: float, loraplus_lr_ratio: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for LoRA+ (arXiv:2402.12354): every lora_B, and what has one dimension (a
    bias, DoRA's magnitude), learns loraplus_lr_ratio times as fast as the rest that trains. What
    has one dimension does not decay.

    Raises LorakitError for a ratio that is not positive, or where nothing trains.
    """
    if not loraplus_lr_ratio > 0:
        raise LorakitError(f"loraplus_lr_ratio must be positive, not {loraplus_lr_ratio}")
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            fast = name.endswith("lora_B") or p.dim() == 1
            groups.setdefault((fast, p.dim() > 1), []).append(p)
    if not groups:
        raise LorakitError("loraplus_groups: no parameter trains; attach an adapter first")
    return [
        {
            "params": params,
            "lr": lr * (loraplus_lr_ratio if fast else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (fast, decays), params in groups.items()
    ]


def learning_rate(kind: str, step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """The rate of step 0 <= step < total: a linear warm-up to `peak`, then by kind.

    "constant" stays; "linear" falls to 0 at `total`; "cosine" falls to 0 along half a cosine. The
    warm-up takes ceil(warmup_ratio * total) steps, and its first is not zero.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * falls[kind]
