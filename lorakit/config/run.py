"""The configurations: of a model, a quantization, an adapter, a training run. Frozen dataclasses.

Field names are the ones people know: a model's are those of Hugging Face's config.json, an
adapter's those of PEFT's adapter_config.json, a run's those of TRL.

Every value that comes from a file goes through `from_mapping`, which checks names and types: an
unknown name is an error that says the nearest valid one, and nothing is converted in silence.
"""

import dataclasses
import difflib
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .aliases import ALIASES, own_names

log = logging.getLogger("lorakit")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LorakitError(ValueError):
    """Something the caller gave cannot be used. One sentence: what, where, what to do."""


def to_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its torch name; raises LorakitError for one that no model runs in."""
    if name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise LorakitError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """' (did you mean ...?)' with the valid name closest to `name`; '' where none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _accepts(kind: Any, value: Any) -> bool:
    """Whether `value`, as JSON or YAML reads it, is of the annotated type `kind`."""
    if kind is Any:
        return True
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_accepts(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _accepts(args[0], k) and _accepts(args[1], v) for k, v in value.items()
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # no nan
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _refusal(name: str, kind: Any, value: Any) -> str:
    size = " (too large)" if isinstance(value, int) and abs(value) >= 2**63 else ""
    return f"{name} must be {_type_name(kind)}, not {value!r:.60}{size}"


def from_mapping(cls: type, values: Any, where: str, *, ignore_unknown: bool = False) -> Any:
    """Build dataclass `cls` from a mapping read from a file, named `where` in messages.

    Raises LorakitError for a value that is no mapping, an unknown name (unless ignored), a missing
    required one, or one of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown and not ignore_unknown:
        raise LorakitError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], fields)}")
    kinds = typing.get_type_hints(cls)
    known = {name: value for name, value in values.items() if name in fields}
    for name, value in known.items():
        if not _accepts(kinds[name], value):
            raise LorakitError(f"{where}: {_refusal(name, kinds[name], value)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in known:
            raise LorakitError(f"{where}: {name} is missing")
    try:
        return cls(**known)
    except LorakitError as error:
        raise LorakitError(f"{where}: {error}") from None


def check_types(config: Any) -> None:
    """Raise LorakitError unless every field of a config is of the type that it is declared as."""
    kinds = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        check(_accepts(kinds[f.name], value), _refusal(f.name, kinds[f.name], value))


def check(condition: bool, message: str) -> None:
    """Raise LorakitError with `message` unless `condition`."""
    if not condition:
        raise LorakitError(message)


STORAGE = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class QuantConfig:
    """How the frozen weights are stored."""

    quant_type: str = "nf4"
    """of the linear layers: "nf4", "fp4", or "int8" with one scale per row"""
    block_size: int = 64
    """values that share one scale in 4 bits: a power of two from 32 to 4096"""
    double_quant: bool = True
    """store the scales of 4-bit weights in 8 bits too"""
    search_scales: bool = False
    """look for the scales with the least squared error: slower to quantize, free to use"""
    embed_tokens: str | None = None
    """of the embeddings: "nf4", "fp4", "int8", or null for dense; of a tied head with them"""
    lm_head: str | None = None
    """of an output head of its own: "nf4", "fp4", "int8", or null for dense"""
    skip_modules: list[str] = field(default_factory=lambda: ["gate"])
    """what stays dense: names of layers or of what holds them, whole or a part between dots. `gate`
    is the router of a mixture of experts: small, and what follows depends on its every choice"""

    def __post_init__(self):
        storage = ", ".join(STORAGE)
        check(
            self.quant_type in STORAGE,
            f"quant_type is {self.quant_type!r}; it must be one of {storage}",
        )
        for name in ("embed_tokens", "lm_head"):
            kind = getattr(self, name)
            check(
                kind is None or kind in STORAGE,
                f"{name} is {kind!r}; it must be one of {storage}, or null",
            )
            check(
                kind is None or name not in self.skip_modules,
                f"{name} is to be stored as {kind}, and stands in skip_modules too",
            )
        check(
            type(self.block_size) is int
            and self.block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            f"block_size is {self.block_size}; it must be a power of two from 32 to 4096",
        )


MOST_RANK = 1 << 16  # no layer is so wide; what is larger is a slip, and would fill the memory
INITIALIZATIONS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "eva")


def check_initialization(kind: bool | str) -> None:
    """Raise LorakitError, with the nearest name, unless `kind` is True, False, one of
    INITIALIZATIONS or "pissa_niter_" and a whole number up to 1000.
    """
    known = [name for name in INITIALIZATIONS if name != "pissa_niter_N"]
    numbered = isinstance(kind, str) and re.fullmatch(r"pissa_niter_(1000|[0-9]{1,3})", kind)
    check(
        isinstance(kind, bool) or kind in known or bool(numbered),
        f"init_lora_weights is {kind!r}{nearest(kind, INITIALIZATIONS)}; it must be true, false or "
        f"one of {', '.join(INITIALIZATIONS)}, N a whole number up to 1000",
    )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which layers an adapter goes on: what every method that adapts layers is told alike."""

    target_modules: str | list[str] = "all-linear"
    """"all-linear" (every linear layer but the output head), names, or one regex for whole names"""
    exclude_modules: str | list[str] | None = None
    """what target_modules would select and is to stay as it is; by the same rules"""
    layers_to_transform: int | list[int] | None = None
    """only in the layers of these numbers: the first number in a layer's name"""
    layers_pattern: str | list[str] | None = None
    """what stands before that number, as `layers` does, where names hold several"""
    modules_to_save: list[str] | None = None
    """modules to train whole beside the adapted layers; they are saved with the adapter"""
    fan_in_fan_out: bool = False
    """also adapt layers that store their weight [in, out], like the Conv1D of GPT-2"""

    def __post_init__(self):
        check_types(self)
        check(len(self.target_modules) > 0, "target_modules is empty: name at least one layer")
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            check(valid_regex(pattern), f"layers_pattern: {pattern!r} is no valid regex")
        check(
            self.layers_pattern is None or self.layers_to_transform is not None,
            "layers_pattern says where layers_to_transform finds its numbers: give these too",
        )


@dataclass(frozen=True)
class LoraConfig(TargetConfig):
    """A low-rank adapter. The update is scaled by lora_alpha / r, or / sqrt(r) with use_rslora."""

    r: int = 8
    lora_alpha: int | float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another r for some layers: names, ends of names after a dot, or regexes of these"""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """another lora_alpha, by the same rules"""
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    """learn the length of every row of the weight beside its direction (DoRA)"""
    lora_bias: bool = False
    """a bias on the low-rank path, in layers that have one already"""
    bias: str = "none"
    """train the biases of the base too: "none", "lora_only" of the adapted layers, or "all" """
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """rows of the embedding to train; with several embeddings, by the name of each"""
    ensure_weight_tying: bool = False
    """adapt a tied embedding and its head alike; without it a tied embedding is refused"""
    init_lora_weights: bool | str = True
    """how A and B start. true: B zero; false: both random, which changes the model at once; or one
    of the names in `INITIALIZATIONS`"""

    def __post_init__(self):
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            check(0 < r <= MOST_RANK, f"{name} must be positive, and {MOST_RANK} at most, not {r}")
        check(
            0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)"
        )
        check(
            self.bias in ("none", "all", "lora_only"),
            f"bias is {self.bias!r}; choose none, lora_only or all",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                check(valid_regex(key), f"{name}: {key!r} is no valid regex")
        init = self.init_lora_weights
        check_initialization(init)
        check(
            not (self.lora_bias and self.use_dora),
            "lora_bias and use_dora do not go together: choose one",
        )
        check(
            not self.lora_bias or isinstance(init, bool),
            "lora_bias goes with init_lora_weights true or false only",
        )

    def rank(self, name: str) -> int:
        """r of the layer called `name`."""
        return of_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> int | float:
        """lora_alpha of the layer called `name`."""
        return of_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """The factor of B A in the layer called `name`."""
        r = self.rank(name)
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)


def valid_regex(pattern: str) -> bool:
    """Whether it can be matched, also as a group of a larger one."""
    try:
        re.compile(f"({pattern})")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def endings(names: typing.Iterable[str]) -> set[str]:
    """All that follows a dot in one of them."""
    return {name[i + 1 :] for name in names for i, sign in enumerate(name) if sign == "."}


def each_alone(values: Mapping[str, Any], names: typing.Iterable[str]) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern of values by layer: every entry means, of the layers `names`,
    one alone. A bare name, which every reader of the file knows, would also mean a layer whose name
    ends so after a dot; a ^ before it ends that.
    """
    unclear = endings(names)
    return {f"^{name}" if name in unclear else name: value for name, value in values.items()}


def in_pattern(key: str, name: str) -> bool:
    """Whether an entry of rank_pattern or alpha_pattern means the layer called `name`."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def of_pattern(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first entry of a rank_pattern or alpha_pattern that means layer `name`."""
    return next((value for key, value in pattern.items() if in_pattern(key, name)), otherwise)


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


@dataclass(frozen=True)
class DataConfig:
    """Files of rows: JSONL, JSON, CSV or Parquet."""

    train: str
    validation: str | None = None
    format: str | None = None
    """what their rows are: "messages", "sharegpt", "prompt_completion", "preference", "alpaca" or
    "text"; null: what the fields of the first row say"""


@dataclass(frozen=True)
class RunConfig:
    """A run file: what to train, on what, and how."""

    model: str
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    quantize: QuantConfig | None = None
    dtype: str = "bfloat16"
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        check(
            self.quantize is not None or self.lora.init_lora_weights != "loftq",
            "init_lora_weights: loftq starts from the error of a quantization; set quantize too",
        )

    @classmethod
    def from_dict(cls, values: Any, where: str = "run file") -> "RunConfig":
        """From the mapping of a run file: the fields of this class, with TrainConfig's beside
        them, or the names of TRL and Axolotl (see aliases.py).

        Raises LorakitError with the nearest valid name for a key that is none of these, for two
        names of one setting, and for an alias that cannot be honoured.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
        try:
            values, notes = own_names(values)
        except ValueError as error:
            raise LorakitError(f"{where}: {error}") from None
        own = [f.name for f in dataclasses.fields(cls) if f.name != "train"]
        training = [f.name for f in dataclasses.fields(TrainConfig)]
        for name in values:
            if name not in own and name not in training:
                known = [*own, *training, *sorted(ALIASES)]
                raise LorakitError(f"{where}: unknown key {name!r}{nearest(name, known)}")
        if values.get("data") is not None:
            values["data"] = from_mapping(DataConfig, values["data"], f"{where}, data")
        if "lora" in values:
            values["lora"] = from_mapping(LoraConfig, values["lora"], f"{where}, lora")
        values["quantize"] = quant_config(values.get("quantize"), f"{where}, quantize")
        train = {name: values.pop(name) for name in training if name in values}
        values["train"] = from_mapping(TrainConfig, train, where)
        run = from_mapping(cls, values, where)
        to_dtype(run.dtype)
        for note in notes:
            log.warning("lorakit: %s: %s", where, note)
        return run


def quant_config(value: Any, where: str = "quantize") -> QuantConfig | None:
    """None, "nf4", a QuantConfig or a mapping of its fields, as a QuantConfig or None."""
    if value is None or isinstance(value, QuantConfig):
        return value
    if isinstance(value, str):
        value = {"quant_type": value}
    return from_mapping(QuantConfig, value, where)
