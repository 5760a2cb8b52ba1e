"""What a run takes its steps with: optimizer, sum of gradients and update, as what trains is.

Weights that the ranks divide have their own kinds of sum and update (divided.py).
"""

from collections.abc import Sequence

from torch import Tensor

from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.files.local import as_path
from lorakit.training import state as run_state
from lorakit.training.adamw import AdamW, decay_groups, loraplus_groups
from lorakit.training.device_step import DeviceStep, HostStep, optimizer_step
from lorakit.training.divided import DividedStep, DividedSum
from lorakit.training.gradients import GradientSum
from lorakit.training.muon import Muon, muon_groups
from lorakit.training.ranks import Ranks
from lorakit.training.step import has_experts
from lorakit.training.trainable import Trained


def gradient_sum(trained: Trained, config: TrainConfig, ranks: Ranks) -> GradientSum:
    """Return what adds the gradients of a step over its micro-batches and the ranks."""
    if trained.divided is not None:
        return DividedSum(ranks.meeting(), trained.divided)
    params, several = list(trained.trained().values()), config.batches_of_step > 1
    return ranks.gradients(params, config.reduce, has_experts(trained.model), several)


def run_update(
    trained: Trained,
    optimizer: AdamW,
    rates: Sequence[Sequence[float]],
    max_norm: float,
    ranks: Ranks,
) -> DeviceStep | HostStep:
    """Return what clips and steps; `rates` and `max_norm` are as of `DeviceStep`."""
    options = optimizer, list(trained.trained().values()), rates, max_norm
    if trained.divided is not None:
        return DividedStep(*options, trained.divided, ranks.meeting())
    return optimizer_step(*options)


def whole_optimizer_state(trained: Trained, optimizer: AdamW, ranks: Ranks) -> dict[str, Tensor]:
    """Return the state by the names of a checkpoint. Of divided weights rank 0 alone has it."""
    if trained.divided is not None:
        return trained.divided.joined_state(optimizer, ranks.meeting())
    return run_state.optimizer_tensors(optimizer)


def run_optimizer(trained: Trained, config: TrainConfig) -> tuple[AdamW, list[float]]:
    """Return the optimizer, and the share of the scheduled rate that each of its groups takes.

    Raises LorakitError if it cannot take parts of divided weights.
    """
    model, divided = trained.model, trained.divided
    ratio, decay = config.loraplus_lr_ratio, config.weight_decay
    betas = config.adam_beta1, config.adam_beta2
    if config.optim == "muon":
        groups = muon_groups(model, 1.0, decay)
        shares = [group["lr"] for group in groups]
        return Muon(groups, betas=betas, eps=config.adam_epsilon), shares
    if ratio is None:
        groups = decay_groups(model, 1.0, decay)
    else:
        groups = loraplus_groups(model, 1.0, ratio, weight_decay=decay)
    if divided is not None:
        groups = divided.in_groups(groups)
    state_bits, paged = OPTIMIZERS[config.optim]
    optimizer = AdamW(
        groups,
        betas=betas,
        eps=config.adam_epsilon,
        state_bits=state_bits,
        paged=paged,
        page_dir=as_path(config.output_dir),
        numbers=None if divided is None else divided.numbers(),
    )
    if divided is not None:
        divided.check_blocks(optimizer)
    return optimizer, [group["lr"] for group in groups]
