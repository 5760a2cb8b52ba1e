"""The optimizer's part of a step: clip the gradients, and let AdamW take a step if all is finite.

A step gets the losses of its micro-batches, and returns a small tensor that says how it went:
`Told`, when it is read. There are two kinds:

    DeviceStep  on a GPU: rates, counts and the decision lie in tensors (kernels.ClippedAdamW). The
                host waits for nothing, and one call is like another, so that a CUDA graph may hold
                it. Each step of such a graph counts, though Python does not see it.
    HostStep    on a CPU, where nothing has to be waited for, for paged state, whose pages the
                host moves, and for Muon: the norm is read, and then the step is taken or not

A rate belongs to the number of the step, and steps that are skipped have a number. The corrections
of bias belong to the number of steps taken.

A HostStep clips the gradients in memory. A DeviceStep clips them as it reads them, which saves
writing 4 bytes per value; `clip` does it in memory too, for whoever reads them after the step.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.kernels import AdamWGroup, AdamWRow, ClippedAdamW
from lorakit.kernels.dispatch import pick
from lorakit.training.adamw import AdamW


class Told(NamedTuple):
    """What a step has to tell."""

    norm: float
    taken: bool
    first: int  # the place of the first parameter that is not finite, or -1
    losses: list[float]


def read(told: Sequence[float]) -> Told:
    """Return what the numbers of a step say."""
    norm, taken, first, *losses = told
    return Told(norm, taken == 1, int(first), losses)


def optimizer_step(
    optimizer: AdamW, params: Sequence[Tensor], rates: Sequence[Sequence[float]], max_norm: float
) -> "DeviceStep | HostStep":
    """Return the kind of step that fits the optimizer; its arguments are those of `DeviceStep`."""
    on_host = optimizer.needs_host or pick(params[0].device, "cpu", "triton") == "cpu"
    return (HostStep if on_host else DeviceStep)(optimizer, params, rates, max_norm)


class DeviceStep:
    """Clips and steps without the host; see the module.

    While it is in use, nothing else may let the optimizer take steps. The optimizer's own numbers,
    `group["step"]` and `group["lr"]`, are brought up to date when its state_dict is asked for.

    Args:
        optimizer: The optimizer, whose state is resident and on one device.
        params: Its parameters, in the order in which one is looked for that is not finite.
        rates: The rates of every group, for each step from the next one on. The last ones stay.
        max_norm: The norm that longer gradients are shortened to.
    """

    def __init__(
        self,
        optimizer: AdamW,
        params: Sequence[Tensor],
        rates: Sequence[Sequence[float]],
        max_norm: float,
    ):
        groups = optimizer.param_groups
        self.optimizer, self.params, self.rates = optimizer, list(params), rates
        self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._taken_before = [group["step"] for group in groups]
        names = ("step", "betas", "eps", "weight_decay")
        options = [AdamWGroup(*(group[name] for name in names)) for group in groups]
        self.clipped = ClippedAdamW(options, rates, max_norm, self.params[0].device)
        optimizer.register_state_dict_pre_hook(lambda _: self.sync())

    @torch.no_grad()
    def __call__(self, losses: Tensor) -> Tensor:
        """Take a step with the gradients that are there, if they and the losses are finite.

        Args:
            losses: fp32 [n], n >= 1, on the device of the parameters; dense.

        Returns:
            fp32 [3 + n], on that device, in new memory: what `read` takes.
        """
        rows = []
        self.optimizer.start()
        for p in self.params:
            if p.grad is not None:
                first, second = self.optimizer.moments(p)
                remainder = self.optimizer.remainder(p)
                rows.append(AdamWRow(self._group_of[p], p, p.grad, first, second, remainder))
        with _noted():
            return self.clipped(rows, losses)

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the gradients as the last step has read them, if it was taken."""
        grads = [p.grad for p in self.params if p.grad is not None]
        factor, taken = self.clipped.numbers[0, 8:].unbind()
        torch._foreach_mul_(grads, torch.where(taken != 0, factor, 1.0))

    def sync(self) -> None:
        """Give the optimizer the numbers of the steps so far. The host waits for the device."""
        begun, taken = self.clipped.counters.tolist()
        for i, group in enumerate(self.optimizer.param_groups):
            group["step"] = self._taken_before[i] + taken
            if begun:
                group["lr"] = self.rates[min(begun, len(self.rates)) - 1][i]


def _noted() -> AbstractContextManager[object]:
    """Return a context that tells a profiler of the step as torch's optimizers do."""
    if not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function("Optimizer.step#DeviceStep")


class HostStep:
    """Clips and steps from the host; see the module. The arguments are those of `DeviceStep`."""

    def __init__(
        self,
        optimizer: AdamW,
        params: Sequence[Tensor],
        rates: Sequence[Sequence[float]],
        max_norm: float,
    ):
        self.optimizer, self.params, self.rates = optimizer, list(params), rates
        self.max_norm, self._begun = max_norm, 0

    @torch.no_grad()
    def __call__(self, losses: Tensor) -> Tensor:
        """Take a step with the gradients that are there, if they and the losses are finite.

        Args:
            losses: fp32 [n], on the device of the parameters.

        Returns:
            fp32 [3 + n], in host memory: what `read` takes.
        """
        groups = self.optimizer.param_groups
        rates = self.rates[min(self._begun, len(self.rates) - 1)]
        self._begun += 1
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        with_gradient = [p for group in groups for p in group["params"] if p.grad is not None]
        # as torch's clip_grad_norm_, but what is not finite stays as it is, to be named
        norm = torch.linalg.vector_norm(self.norms(with_gradient))
        values = torch.cat([norm.view(1), losses]).tolist()  # here the host waits for a device
        taken = all(map(math.isfinite, values))
        if taken:
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(_gradients(with_gradient), factor)
            self.optimizer.step()
        bad = [] if taken else self.not_finite()
        first = bad.index(True) if True in bad else -1
        return torch.tensor([values[0], taken, first, *values[1:]], device="cpu")

    def clip(self) -> None:
        """Do nothing: the gradients are clipped."""

    def norms(self, params: Sequence[Tensor]) -> Tensor:
        """Return the norm of each parameter's gradient, fp32 [n]."""
        return torch.stack(torch._foreach_norm(_gradients(params), dtype=torch.float32))

    def not_finite(self) -> list[bool]:
        """Return for each parameter whether its gradient has a value that is not finite."""
        grads = [p.grad for p in self.params]
        return [grad is not None and not torch.isfinite(grad).all() for grad in grads]


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]
