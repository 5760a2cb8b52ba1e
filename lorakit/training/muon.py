"""Muon for the matrices of a model, and AdamW for all else that trains (kernels/ops/muon).

Embedding and head are tables of rows, of which a step moves few; norms and biases are no matrices;
and the small layers that decide (routers, gates) are nearly vectors. All of these stay with AdamW,
with the same learning rate.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.config.quantization import DECIDING_LAYERS
from lorakit.kernels import muon_step
from lorakit.models.decoder import Decoder
from lorakit.training.adamw import AdamW, Group, State, check_tensors, decay_groups, remainder_of
from lorakit.training.paged_state import REMAINDER, has_remainder

MOMENTUM = "momentum_buffer"
"""The name of a matrix's running mean in its state, which is torch.optim.Muon's."""


class Muon(AdamW):
    """Muon (Jordan et al. 2024), scaled as in arXiv:2502.16982, with AdamW for other groups.

    The groups whose `muon` is true, as `muon_groups` makes them, have matrices. The state of a
    matrix is its momentum, fp32, 4 bytes per value; a bfloat16 matrix has `remainder` beside, as
    in `AdamW`, so that small steps add up. Other groups take the steps of AdamW, with fp32 state.

    Args:
        params: Matrices, or groups as mappings with "params" and settings of their own.
        lr: The learning rate of matrices and of the rest.
        momentum: The decay rate of the momentum, in [0, 1).
        weight_decay: The part of each value that decays in a step, times lr.
        betas: The decay rates of AdamW's moments, in [0, 1).
        eps: What AdamW adds to the root of the second moment.

    Raises:
        LorakitError: An argument is out of its range, or a parameter of a group for Muon is no
            matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not 0 <= momentum < 1:
            raise LorakitError(f"Muon: momentum must be in [0, 1), not {momentum}")
        self._of_muon = {"muon": True, "momentum": momentum}
        super().__init__(params, lr, betas, eps, weight_decay)

    @property
    def needs_host(self) -> bool:
        """Whether the host takes part in a step, which it does; see device_step.py."""
        return True

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, for Muon unless it says otherwise.

        Raises LorakitError if that holds another parameter than matrices.
        """
        super().add_param_group({**self._of_muon, **param_group})
        group = self.param_groups[-1]
        for p in group["params"] if group["muon"] else []:
            if p.dim() != 2:
                raise LorakitError(
                    f"Muon: a parameter of shape {tuple(p.shape)} is no matrix; give it in a group "
                    "with muon=False"
                )

    def _take(self, group: Group, params: list[Tensor]) -> None:
        if not group["muon"]:
            super()._take(group, params)
            return
        for halves in (False, True):
            some = [p for p in params if has_remainder(p) == halves]
            states = [self.state[p] for p in some]
            muon_step(
                some,
                [p.grad for p in some if p.grad is not None],
                [state[MOMENTUM] for state in states],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                remainders=[state[REMAINDER] for state in states] if halves else None,
            )

    def _start(self, params: list[Tensor], group: Group) -> None:
        if not group["muon"]:
            super()._start(params, group)
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(_zero_state(p))

    def _check_state(self, number: int, p: Tensor, state: Mapping[str, Any]) -> None:
        if not any(p is each for g in self.param_groups if g["muon"] for each in g["params"]):
            super()._check_state(number, p, state)
            return
        expected = {name: (t.dtype, tuple(t.shape)) for name, t in _shapes(p).items()}
        check_tensors(number, p, state, expected)


def _zero_state(p: Tensor) -> State:
    """Return the state of a matrix before its first step."""
    return {MOMENTUM: torch.zeros_like(p, dtype=torch.float32), **remainder_of(p)}


def _shapes(p: Tensor) -> State:
    """Return the state of a matrix as tensors without memory."""
    return _zero_state(torch.empty_like(p, device="meta"))


def matrices(model: Decoder) -> Iterator[Tensor]:
    """Yield the weights of a model that Muon moves: those of its blocks' linear layers that train.

    Layers that decide (routers, and gates of one row) are left to AdamW.
    """
    for name, module in model.model.layers.named_modules():
        decides = name.rpartition(".")[2] in DECIDING_LAYERS
        if isinstance(module, nn.Linear) and module.weight.requires_grad and not decides:
            yield module.weight


def muon_groups(model: Decoder, lr: float, weight_decay: float) -> list[Group]:
    """Return the parameters of a model that train, in groups for `Muon`.

    Args:
        model: A model whose own weights train.
        lr: The learning rate of all groups.
        weight_decay: The decay of the matrices and tables; biases and norms do not decay.

    Returns:
        The matrices of its blocks, and the rest in one group or two for AdamW.

    Raises:
        LorakitError: No parameter trains.
    """
    chosen = set(matrices(model))
    groups: list[Group] = []
    for group in decay_groups(model, lr, weight_decay):
        for muon in (True, False):
            params = [p for p in group["params"] if (p in chosen) == muon]
            if params:
                groups.append({**group, "params": params, "muon": muon})
    return groups


def momentum_bytes(p: Tensor) -> int:
    """Return the bytes of a matrix's state."""
    return sum(t.nbytes for t in _shapes(p).values())
