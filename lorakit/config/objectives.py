"""The objectives of a run: the forms of their losses, and which settings go with them."""

from typing import TYPE_CHECKING, Literal

from lorakit.config.errors import LorakitError
from lorakit.config.fields import check_below_one, check_positive

if TYPE_CHECKING:
    from lorakit.config.training import TrainConfig

Objective = Literal[
    "sft",
    "dpo",
    "orpo",
    "cpo",
    "simpo",
    "kto",
    "grpo",
    "distillation",
    "classification",
    "reward",
]
LossType = Literal[
    "nll",
    "dft",
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "apo_zero",
    "apo_down",
    "kto",
    "apo_zero_unpaired",
]

# objective -> its forms of the loss, the default first
LOSS_TYPES: dict[Objective, tuple[LossType, ...]] = {
    "sft": ("nll", "dft"),
    "dpo": ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "kto": ("kto", "apo_zero_unpaired"),
}
SMOOTHED = ("nll", "sigmoid", "robust")  # those that have label smoothing
BY_TOKENS = ("sft", "distillation")  # those whose mean is over label tokens
PAIRS: tuple[Objective, ...] = ("dpo", "orpo", "cpo", "simpo")
HEADED: tuple[Objective, ...] = ("classification", "reward")  # which need a head for classes


def check_loss(config: "TrainConfig") -> None:
    """Raise LorakitError for settings of the loss that do not go together."""
    check_below_one(config, "label_smoothing_factor", "z_loss")
    if config.center_rewards_coefficient < 0:
        raise LorakitError("center_rewards_coefficient must not be negative")
    check_positive(config, "beta", "desirable_weight", "undesirable_weight")
    check_positive(config, "neftune_noise_alpha", or_null=True)
    objective, z_loss = config.objective, config.z_loss
    if config.frozen_dtype is not None and config.compares:
        raise LorakitError(
            f"frozen_dtype float8 does not go with objective {objective}, which compares with "
            "answers of the model in its own dtype"
        )
    if objective != "sft" and z_loss:
        raise LorakitError(f"z_loss goes with objective sft only; {objective} has none")
    if config.form == "dft" and z_loss:
        raise LorakitError("z_loss goes with loss_type nll only; dft has none")
    forms = LOSS_TYPES.get(objective, ())
    if config.loss_type is not None and config.loss_type not in forms:
        others = f"; it has {', '.join(forms)}" if forms else ", which has one form only"
        if objective == "grpo":
            others = "; say that of grpo in the mapping `grpo`"
        raise LorakitError(
            f"loss_type {config.loss_type} does not go with objective {objective}{others}"
        )
    for name, of, default in (
        ("simpo_gamma", "simpo", 0.5),
        ("desirable_weight", "kto", 1.0),
        ("undesirable_weight", "kto", 1.0),
        ("center_rewards_coefficient", "reward", 0.0),
    ):
        if getattr(config, name) != default and objective != of:
            raise LorakitError(f"{name} goes with objective {of}, not with {objective}")
    _check_smoothing(config)
    if config.form == "kto" and (config.splits_itself or config.per_device_train_batch_size == 1):
        raise LorakitError(
            "kto estimates how far the model is from its reference within a batch: give "
            "per_device_train_batch_size, above 1, and gradient_accumulation_steps as numbers"
        )


def _check_smoothing(config: "TrainConfig") -> None:
    smoothing, form = config.label_smoothing_factor, config.form
    smoothed = config.objective in ("simpo", "classification") or form in SMOOTHED
    if smoothing and not smoothed:
        what = f"loss_type {form}" if config.loss_type else f"objective {config.objective}"
        raise LorakitError(f"label_smoothing_factor does not go with {what}, which has none")
    if config.pairs and smoothing >= 0.5:
        raise LorakitError(
            f"label_smoothing_factor is {smoothing}; for pairs it must be in [0, 0.5)"
        )
    if form == "robust" and not smoothing:
        raise LorakitError(
            "loss_type robust needs label_smoothing_factor, the share of pairs that are the "
            "wrong way round"
        )
