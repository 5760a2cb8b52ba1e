"""Carried out of lorakit/config.py."""

import typing
from dataclasses import dataclass, field

from lorakit.config.errors import check, nearest
from lorakit.config.fields import check_types

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
)
# bits of AdamW's state, and whether it is paged
OPTIMIZERS = {
    "adamw_torch": (32, False),
    "adamw_8bit": (8, False),
    "paged_adamw_32bit": (32, True),
    "paged_adamw_8bit": (8, True),
}
OBJECTIVES = ("sft", "dpo", "orpo")
OVER_LENGTH = ("truncate", "drop", "raise")
TRAIN_ON = ("completion", "last_turn", "all")
METRICS = (
    "accuracy",
    "macro_f1",
    "weighted_f1",
    "exact_match",
    "partial_match",
    "entity_f1",
    "rouge_l",
)


def check_metrics(names: typing.Iterable[str]) -> None:
    """Raise LorakitError, with the nearest name, unless each is one of METRICS."""
    for name in names:
        check(
            name in METRICS,
            f"unknown metric {name!r}{nearest(name, METRICS)}; beside loss and perplexity there "
            f"are {', '.join(METRICS)}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The optimizer step averages over per_device_train_batch_size x
    gradient_accumulation_steps rows, weighted by their label tokens."""

    output_dir: str = "runs/lorakit"
    max_steps: int | None = None
    """optimizer steps; null: num_train_epochs decides"""
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    """"constant", "constant_with_warmup" (the same), "linear", "cosine", "cosine_with_min_lr",
    "cosine_with_restarts" or "inverse_sqrt", each after a linear warm-up"""
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    """of the warm-up; null: warmup_ratio of all steps"""
    min_lr_ratio: float = 0.0
    """where cosine_with_min_lr ends, as a part of learning_rate"""
    num_cycles: int = 1
    """of cosine_with_restarts"""
    optim: str = "adamw_torch"
    """AdamW with fp32 state ("adamw_torch") or 8-bit state ("adamw_8bit"), or with paged state
    ("paged_adamw_32bit", "paged_adamw_8bit"), which on a CPU lies in a file in output_dir"""
    loraplus_lr_ratio: float | None = None
    """LoRA+: lora_B learns so many times as fast as lora_A, 16 say; null: as fast"""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_seq_length: int = 1024
    over_length: str = "truncate"
    """what to do with a longer row: "truncate" (the prompt's start first), "drop" or "raise" """
    objective: str = "sft"
    """"sft": learn the rows; "dpo" or "orpo": prefer `chosen` to `rejected` (preference.py)"""
    beta: float = 0.1
    """of dpo and orpo: how strongly"""
    packing: bool = False
    """put several rows into one, of per_device_train_batch_size * max_seq_length tokens at most, in
    which they do not see each other, instead of padding them"""
    label_smoothing_factor: float = 0.0
    z_loss: float = 0.0
    """weight of the square of the logits' normalizer in the loss"""
    neftune_noise_alpha: float | None = None
    """noise on the embeddings while training (NEFTune): 5, say"""
    train_on: str = "completion"
    """which tokens are learned: "completion" (of a chat every turn of the assistant), "last_turn"
    of a chat, or "all" """
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    """with gradient_checkpointing, keep the blocks' inputs in host memory"""
    eval_steps: int | None = None
    """evaluate on the validation rows every so many steps; null: only at the end"""
    eval_metrics: list[str] = field(default_factory=list)
    """what to score the model's own completions of them by, beside the loss: names in `METRICS`"""
    early_stopping_patience: int | None = None
    """stop after so many evaluations without a better loss"""
    load_best_model_at_end: bool = False
    """end with the adapter of the best evaluation"""
    save_steps: int | None = None
    """write a checkpoint every so many steps and at the end; null: only when interrupted"""
    save_total_limit: int = 2
    """how many checkpoints to keep; the best one stays besides"""
    resume: str | None = None
    """"auto": go on from output_dir's last checkpoint, or start; or a checkpoint's directory"""
    report_to: str | None = None
    """"tensorboard": write its files too"""
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        for name in [
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "max_grad_norm",
            "max_seq_length",
        ]:
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(self.num_train_epochs < 1e9, "num_train_epochs must be below 10^9")
        ratio = self.loraplus_lr_ratio
        check(ratio is None or ratio > 0, f"loraplus_lr_ratio must be positive, not {ratio}")
        check(self.max_seq_length > 1, "max_seq_length must be at least 2")
        for name in ("max_steps", "eval_steps", "save_steps", "early_stopping_patience"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be positive or null, not {value}")
        check(self.save_total_limit > 0, "save_total_limit must be at least 1")
        check_metrics(self.eval_metrics)
        for name in ("label_smoothing_factor", "z_loss"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name} is {value}; it must be in [0, 1)")
        check(
            self.objective in OBJECTIVES,
            f"objective is {self.objective!r}; choose {', '.join(OBJECTIVES)}",
        )
        pairs, smoothing = self.objective != "sft", self.label_smoothing_factor
        check(not (pairs and self.z_loss), "z_loss is of sft alone; dpo and orpo do not know it")
        check(
            not smoothing or self.objective != "orpo",
            "label_smoothing_factor is of sft and dpo; orpo does not know it",
        )
        check(
            smoothing < 0.5 or not pairs,
            f"label_smoothing_factor is {smoothing}; for pairs it must be in [0, 0.5)",
        )
        check(self.beta > 0, f"beta must be positive, not {self.beta}")
        noise = self.neftune_noise_alpha
        check(noise is None or noise > 0, f"neftune_noise_alpha must be positive, not {noise}")
        check(
            self.gradient_checkpointing or not self.activation_offloading,
            "activation_offloading keeps what gradient_checkpointing keeps: set that too",
        )
        check(
            self.report_to in (None, "tensorboard"),
            f"report_to is {self.report_to!r}; choose tensorboard or null",
        )
        for name, valid in (("lr_scheduler_type", SCHEDULES), ("optim", tuple(OPTIMIZERS))):
            value, choices = getattr(self, name), f"{', '.join(valid[:-1])} or {valid[-1]}"
            check(value in valid, f"{name} is {value!r}; choose {choices}")
        check(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps must be null or not negative, not {self.warmup_steps}",
        )
        check(
            0 <= self.min_lr_ratio <= 1,
            f"min_lr_ratio is {self.min_lr_ratio}; it must be in [0, 1]",
        )
        check(self.num_cycles > 0, f"num_cycles must be positive, not {self.num_cycles}")
        for name, usual, schedule in (
            ("min_lr_ratio", 0, "cosine_with_min_lr"),
            ("num_cycles", 1, "cosine_with_restarts"),
        ):
            check(
                getattr(self, name) == usual or self.lr_scheduler_type == schedule,
                f"{name} is of lr_scheduler_type {schedule} alone, not of {self.lr_scheduler_type}",
            )
        check(
            self.over_length in OVER_LENGTH,
            f"over_length is {self.over_length!r}; choose truncate, drop or raise",
        )
        check(
            self.train_on in TRAIN_ON,
            f"train_on is {self.train_on!r}; choose completion, last_turn or all",
        )
        check(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be in [0, 2^63)")
        check(
            0 <= self.warmup_ratio <= 1,
            f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1]",
        )
        check(
            0 <= self.weight_decay < 1, f"weight_decay is {self.weight_decay}; it must be in [0, 1)"
        )
