"""AdaLoRA (arXiv:2303.10512): a low-rank update whose rank moves to the layers that need it.

The update has the form of a singular value decomposition:

    y = W x + s B diag(E) A x        A [r, in], E [r, 1], B [out, r], s = lora_alpha / init_r

Every layer starts with rank `init_r`. A row of A, a number of E and a column of B are a triplet.
How much the loss depends on a triplet is its score: for each number w, with I = |w dL/dw|,

    S = mean of I,  U = mean of |I - S|        running means, by beta1 and beta2
    score of a triplet = S U of E + mean of S U over the row of A + mean of S U over the column of B

`adalora_allocate` sets E of the triplets with the lowest scores, of all layers, to zero. The number
that stays falls from init_r a layer to target_r. None goes until step `tinit`; then some go every
`deltaT` steps, along a cubic curve; in the last `tfinal` steps the choice stands.
`adalora_orthogonality` keeps A and B near orthogonal. Without it E would not be the size of a
triplet.

    for step, batch in enumerate(batches):
        (loss(batch) + lorakit.adalora_orthogonality(model)).backward()
        optimizer.step()
        lorakit.adalora_allocate(model, step)    # reads the gradients
        optimizer.zero_grad()

`lorakit.train` takes `adalora_allocate` as its `after_step`, but knows no penalty. In training
AdaLoRA keeps two more numbers for every trained one. Only the triplets that are left are saved.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.lora import LowRankLinear, LowRankPart
from lorakit.adapters.manage import require_attached
from lorakit.adapters.methods.method import LinearMethod, linear_parts
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.peft_files.layout import AdapterFiles, name_in
from lorakit.adapters.plan import Plan
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError, check


@dataclass(frozen=True)
class AdaLoraConfig(TargetConfig):
    """An adapter whose ranks move between layers in training (AdaLoRA).

    Steps of the optimizer count from 0.
    """

    total_step: int
    """The number of steps of the whole training, which the schedule divides."""
    init_r: int = 12
    """The rank that every layer starts with."""
    target_r: int = 8
    """The mean rank of a layer that is left in the end."""
    lora_alpha: int | float = 8
    """Strength of the update, which is scaled by lora_alpha / init_r."""
    lora_dropout: float = 0.0
    """The share of a layer's inputs that is dropped before A, in training."""
    tinit: int = 0
    """The number of steps before the first triplet goes."""
    tfinal: int = 0
    """The number of steps at the end in which no triplet goes."""
    deltaT: int = 1
    """The number of steps between two allocations."""
    beta1: float = 0.85
    """Decay of the running mean of each number's importance."""
    beta2: float = 0.85
    """Decay of the running mean of how far the importance is from its own mean."""
    orth_reg_weight: float = 0.5
    """Strength of the penalty that keeps A and B near orthogonal."""
    rank_pattern: dict[str, list[bool]] | None = None
    """The triplets that each lora_E still has, as a saved adapter lists them; null means all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("total_step", "init_r", "target_r", "deltaT"):
            check(getattr(self, name) > 0, f"{name} must be at least 1")
        for name in ("beta1", "beta2"):
            check(0 < getattr(self, name) < 1, f"{name} must be between 0 and 1")
        p = self.lora_dropout
        check(0 <= p < 1, f"lora_dropout is {p}; it must be in [0, 1)")
        check(self.orth_reg_weight >= 0, "orth_reg_weight must not be negative")
        check(
            self.tinit < self.total_step - self.tfinal,
            "tinit and tfinal leave no step to allocate in: total_step must be larger than both",
        )

    def rank(self, place: str) -> int:
        """Return how many triplets the layer called `place` has."""
        pattern = (self.rank_pattern or {}).get(f"{place}.lora_E")
        return self.init_r if pattern is None else sum(pattern)

    def budget(self, step: int, whole: int, layers: int) -> int:
        """Return how many of `whole` triplets in `layers` layers stay at `step`."""
        start, end = self.tinit, self.total_step - self.tfinal
        target = self.target_r * layers
        if step <= start:
            return whole
        if step > end:
            return target
        return int((whole - target) * (1 - (step - start) / (end - start)) ** 3 + target)


class AdaLoraPart(LowRankPart):
    """The triplets of one layer: lora_A [r, in], lora_E [r, 1] and lora_B [out, r], fp32.

    `left` [r] says which of them are left. `means` holds the running means S and U of each tensor
    by its name, while the schedule runs.
    """

    left: Tensor

    def __init__(self, config: AdaLoraConfig, r: int, in_features: int, out_features: int):
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        # PEFT adds 1e-5 to the rank, and its adapters have learned with that.
        super().__init__(config, r, alpha / (config.init_r + 1e-5), config.lora_dropout)
        self.lora_A = nn.Parameter(torch.randn(r, in_features) * 0.02)
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.lora_B = nn.Parameter(torch.randn(out_features, r) * 0.02)
        self.register_buffer("left", torch.ones(r, dtype=torch.bool), persistent=False)
        self.means: dict[str, tuple[Tensor, Tensor]] = {}

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def pattern(self) -> list[bool]:
        """Return which of the init_r triplets are left."""
        return self.left.tolist() + [False] * (self.config.init_r - self.r)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the running means with the gradients of a step."""
        for name, p in self.named_parameters():
            # An expert that no token chose has no gradient.
            size = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            S, U = self.means.get(name) or (torch.zeros_like(p), torch.zeros_like(p))
            S = self.config.beta1 * S + (1 - self.config.beta1) * size
            U = self.config.beta2 * U + (1 - self.config.beta2) * (size - S).abs()
            self.means[name] = S, U

    def scores(self) -> Tensor:
        """Return the score of each triplet, [r]."""
        product = {name: S * U for name, (S, U) in self.means.items()}
        vectors = product["lora_A"].mean(1) + product["lora_B"].mean(0)
        return product["lora_E"][:, 0] + vectors

    @torch.no_grad()
    def cut(self) -> None:
        """Set E of the triplets that are not left to zero."""
        self.lora_E.masked_fill_(~self.left[:, None], 0.0)


class AdaLoraLinear(LowRankLinear[AdaLoraPart]):
    """A linear layer whose update is B diag(E) A."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        part = self.part_of(name)
        return {"lora_A": part.lora_A, "lora_B": part.lora_B, "lora_E": part.lora_E}

    def tensors_to_save(self, name: str) -> dict[str, Tensor]:
        part = self.part_of(name)
        A, B, E = part.lora_A[part.left], part.lora_B[:, part.left], part.lora_E[part.left]
        return {"lora_A": A.float(), "lora_B": B.float(), "lora_E": E.float()}


def _selected_parts(module: nn.Module, caller: str) -> list[AdaLoraPart]:
    layers = require_attached(module, caller).values()
    found = [m.part for m in layers if isinstance(m, AdaLoraLinear) and m.selected is not None]
    if not found:
        raise LorakitError(f"{caller}: the selected adapter is no AdaLoRA")
    return found


def adalora_allocate(module: nn.Module, step: int) -> None:
    """Move ranks between the layers of the selected AdaLoRA adapter (arXiv:2303.10512).

    Call it after every optimizer step and before `zero_grad`. It notes how important each triplet
    is, and sets E to zero in those that the schedule has no room for.

    Args:
        module: The model that the adapter is attached to.
        step: The number of the optimizer step that was made, from 0.

    Raises:
        LorakitError: No AdaLoRA is selected, its target_r is above its init_r, or no parameter
            has a gradient.
    """
    parts = _selected_parts(module, "adalora_allocate")
    config = parts[0].config
    check(
        config.target_r <= config.init_r,
        f"adalora_allocate: target_r is {config.target_r}, more than init_r, {config.init_r}; "
        "lower it",
    )
    last = config.total_step - config.tfinal
    if step < last:
        if all(part.lora_E.grad is None for part in parts):
            raise LorakitError(
                "adalora_allocate: there are no gradients; call it after the optimizer's step and "
                "before zero_grad"
            )
        for part in parts:
            part.observe()
    due = config.tinit < step <= last and (step % config.deltaT == 0 or step == last)
    if due and parts[0].means:
        whole = sum(part.r for part in parts)
        _choose(parts, whole - config.budget(step, whole, len(parts)))
    elif step > last:
        for part in parts:
            part.cut()
    if step == last:
        for part in parts:
            part.means.clear()


def _choose(parts: Sequence[AdaLoraPart], going: int) -> None:
    """Leave all triplets but the `going` ones with the lowest scores."""
    if going <= 0:
        return
    scores = [part.scores() for part in parts]
    limit = torch.cat(scores).kthvalue(going).values
    for part, score in zip(parts, scores, strict=True):
        part.left.copy_(score > limit)
        part.cut()


def adalora_orthogonality(module: nn.Module) -> Tensor:
    """Return the penalty that keeps A and B of the selected AdaLoRA adapter near orthogonal.

    It is orth_reg_weight times the mean of ||A A^T - 1|| and ||B^T B - 1|| over the layers, in
    Frobenius' norm, as PEFT has it (arXiv:2303.10512 squares the norms). Add it to the loss.

    Args:
        module: The model that the adapter is attached to.

    Returns:
        The penalty, a scalar with gradients.

    Raises:
        LorakitError: No AdaLoRA is selected.
    """
    parts = _selected_parts(module, "adalora_orthogonality")
    sides = [side for part in parts for side in (part.lora_A, part.lora_B.t())]
    total = sum((_from_orthogonal(side) for side in sides), start=torch.zeros(()).to(sides[0]))
    return parts[0].config.orth_reg_weight * total / len(sides)


def _from_orthogonal(M: Tensor) -> Tensor:
    """Return how far the rows of M [r, n] are from orthonormal: ||M M^T - 1||, a scalar."""
    square = M @ M.t()
    return torch.linalg.norm(square - torch.eye(len(square)).to(square))


class AdaLora(LinearMethod[AdaLoraConfig]):
    """The method whose ranks move to the layers that need them."""

    peft_type = "ADALORA"
    config_type = AdaLoraConfig

    def plan(self, model: nn.Module, config: AdaLoraConfig) -> Plan:
        """Plan the triplets of every selected layer."""
        plan = Plan(model)
        for name in plan.select_linear(config):
            layer = plan.wrap_linear(name, AdaLoraLinear)
            if layer is not None:
                rank = config.rank(name)
                part = AdaLoraPart(config, rank, layer.in_features, layer.out_features)
                plan.add(layer, part.to(layer.device))
        plan_modules_to_save(plan, config)
        return plan

    def config_values(self, model: nn.Module, name: str, config: AdaLoraConfig) -> dict[str, Any]:
        """Return every field; rank_pattern says which triplets are left, if some are gone."""
        patterns = {
            f"{place}.lora_E": part.pattern() for place, part in linear_parts(model, name).items()
        }
        cut = any(not all(pattern) for pattern in patterns.values())
        values = super().config_values(model, name, config)
        return values | {"rank_pattern": patterns if cut else None}

    def read_config(self, files: AdapterFiles, model: nn.Module) -> AdaLoraConfig:
        """Return the config with its names of layers as `model` has them."""
        config = super().read_config(files, model)
        kept = (config.rank_pattern or {}).items()
        renamed = {name_in(model, key): triplets for key, triplets in kept}
        return dataclasses.replace(config, rank_pattern=renamed) if renamed else config
