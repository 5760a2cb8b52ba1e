"""The settings of a training run."""

import math
from typing import get_args

import pytest

import lorakit as lk
from lorakit.config.training import (
    OPTIMIZERS,
    OVER_LENGTH,
    SCHEDULES,
    TRAIN_ON,
    Objective,
    Optimizer,
)


def test_endless_epochs():
    with pytest.raises(lk.LorakitError, match="num_train_epochs must be float, not inf"):
        lk.TrainConfig(num_train_epochs=math.inf)


def test_every_optimizer_has_a_state():
    assert tuple(OPTIMIZERS) == get_args(Optimizer)


def test_the_learning_rate_follows_what_learns():
    """The weights themselves take a tenth of an adapter's rate, unless the run says another."""
    assert lk.TrainConfig().peak_learning_rate == 2e-4
    assert lk.TrainConfig(train="full").peak_learning_rate == 2e-5
    assert lk.TrainConfig(train="full", learning_rate=1e-3).peak_learning_rate == 1e-3


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("lr_scheduler_type", SCHEDULES),
        ("over_length", OVER_LENGTH),
        ("train_on", TRAIN_ON),
        ("objective", get_args(Objective)),
        ("optim", tuple(OPTIMIZERS)),
        ("report_to", ("tensorboard", "trackio", "wandb", "mlflow", None)),
    ],
)
def test_a_setting_takes_its_choices_alone(field, choices):
    for choice in choices:
        needed = {
            "grpo": {"grpo": lk.GrpoConfig([lk.RewardConfig("exact_match")])},
            "distillation": {"distillation": lk.DistillationConfig("teacher")},
            "muon": {"train": "full"},
        }.get(choice, {})
        assert getattr(lk.TrainConfig(**{field: choice}, **needed), field) == choice
    listed = ["null" if choice is None else choice for choice in choices]
    with pytest.raises(lk.LorakitError) as caught:
        lk.TrainConfig(**{field: "none of these"})
    assert str(caught.value) == (
        f"{field} is 'none of these'; choose {', '.join(listed[:-1])} or {listed[-1]}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be positive or null, not 0"),
        ({"max_seq_length": 1}, "max_seq_length must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive or null, not 0.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5; it must be in [0, 1]"),
        ({"weight_decay": 1.0}, "weight_decay is 1.0; it must be in [0, 1)"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio must be positive or null, not 0.0"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha must be positive or null, not -1.0"),
        ({"beta": 0.0}, "beta must be positive, not 0.0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be in [0, 2^63)"),
        (
            {"activation_offloading": True},
            "activation_offloading keeps what gradient_checkpointing keeps: set that too",
        ),
    ],
)
def test_what_a_run_cannot_be(options, message):
    with pytest.raises(lk.LorakitError) as caught:
        lk.TrainConfig(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "orpo", "label_smoothing_factor": 0.1},
            "label_smoothing_factor does not go with objective orpo, which has none",
        ),
        (
            {"objective": "orpo", "z_loss": 0.1},
            "z_loss goes with objective sft only; orpo has none",
        ),
        (
            {"objective": "dpo", "z_loss": 0.1},
            "z_loss goes with objective sft only; dpo has none",
        ),
        (
            {"objective": "dpo", "label_smoothing_factor": 0.5},
            "label_smoothing_factor is 0.5; for pairs it must be in [0, 0.5)",
        ),
        (
            {"objective": "dpo", "loss_type": "hinge", "label_smoothing_factor": 0.1},
            "label_smoothing_factor does not go with loss_type hinge, which has none",
        ),
        (
            {"objective": "dpo", "loss_type": "robust"},
            "loss_type robust needs label_smoothing_factor, the share of pairs that are the wrong "
            "way round",
        ),
        (
            {"loss_type": "dft", "label_smoothing_factor": 0.1},
            "label_smoothing_factor does not go with loss_type dft, which has none",
        ),
        (
            {"loss_type": "dft", "z_loss": 0.1},
            "z_loss goes with loss_type nll only; dft has none",
        ),
        (
            {"loss_type": "hinge"},
            "loss_type hinge does not go with objective sft; it has nll, dft",
        ),
        (
            {"objective": "cpo", "loss_type": "apo_zero"},
            "loss_type apo_zero does not go with objective cpo; it has sigmoid, hinge, ipo",
        ),
        (
            {"objective": "orpo", "loss_type": "ipo"},
            "loss_type ipo does not go with objective orpo, which has one form only",
        ),
        (
            {"objective": "cpo", "simpo_gamma": 1.0},
            "simpo_gamma goes with objective simpo, not with cpo",
        ),
        ({"desirable_weight": 2.0}, "desirable_weight goes with objective kto, not with sft"),
        (
            {"objective": "kto", "per_device_train_batch_size": 1},
            "kto estimates how far the model is from its reference within a batch: give "
            "per_device_train_batch_size, above 1, and gradient_accumulation_steps as numbers",
        ),
        (
            {"objective": "kto", "gradient_accumulation_steps": "auto"},
            "kto estimates how far the model is from its reference within a batch: give "
            "per_device_train_batch_size, above 1, and gradient_accumulation_steps as numbers",
        ),
    ],
)
def test_options_that_an_objective_does_not_have(options, message):
    with pytest.raises(lk.LorakitError) as caught:
        lk.TrainConfig(**options)
    assert str(caught.value) == message
