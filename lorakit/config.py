"""The configurations: of a model, a quantization, an adapter, a training run. Frozen dataclasses.

Field names are the ones people know: a model's are those of Hugging Face's config.json, an
adapter's those of PEFT's adapter_config.json, a run's those of TRL.

Every value that comes from a file goes through `from_mapping`, which checks names and types: an
unknown name is an error that says the nearest valid one, and nothing is converted in silence.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

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
        return isinstance(value, Mapping)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


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
            kind = _type_name(kinds[name])
            raise LorakitError(f"{where}: {name} must be {kind}, not {value!r}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in known:
            raise LorakitError(f"{where}: {name} is missing")
    try:
        return cls(**known)
    except LorakitError as error:
        raise LorakitError(f"{where}: {error}") from None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise LorakitError(message)


# ---- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `rope_type` is "default", "linear" or "llama3"; the rest parametrize it."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        kinds = ("default", "linear", "llama3")
        _check(
            self.rope_type in kinds,
            f"rope_type {self.rope_type!r} is not supported; supported are {', '.join(kinds)}",
        )
        _check(self.rope_theta > 0 and self.factor > 0, "rope_theta and factor must be positive")
        _check(
            self.high_freq_factor > self.low_freq_factor,
            "rope: high_freq_factor must exceed low_freq_factor",
        )


@dataclass(frozen=True)
class Family:
    """What a model_type says beyond the keys of its config.json."""

    architecture: str
    """transformers' class"""
    windows: bool = False
    """whether sliding_window is a key of the family; elsewhere it is a leftover without meaning"""
    fields: dict[str, Any] = field(default_factory=dict)
    """ModelConfig fields that every model of the family has"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """transformers' defaults of keys that config.json may leave out, where they are not Llama's"""


_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", windows=True, defaults={"sliding_window": 4096}),
    "qwen2": Family(
        "Qwen2ForCausalLM", windows=True, fields={"qkv_bias": True}, defaults=_QWEN_WINDOW
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        windows=True,
        fields={"qk_norm": True},
        defaults=_QWEN_WINDOW | {"head_dim": 128},
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """What distinguishes one decoder from another. Names and defaults follow config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, before the rotary embedding"""
    sliding_window: int | None = None
    """positions that a sliding layer sees, its own included"""
    sliding_layers: list[bool] = field(default_factory=list)
    """per layer whether it slides; empty: none does"""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        _check(
            self.model_type in FAMILIES,
            f"model_type {self.model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}{nearest(self.model_type, FAMILIES)}",
        )
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ]:
            _check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        _check(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        _check(
            len(self.sliding_layers) in (0, self.num_hidden_layers),
            f"layer_types names {len(self.sliding_layers)} of {self.num_hidden_layers} layers",
        )
        window = self.sliding_window
        _check(window is None or window > 0, f"sliding_window must be positive, not {window}")
        _check(not any(self.sliding_layers) or window is not None, "sliding_window is missing")

    def window(self, layer: int) -> int | None:
        """How many positions `layer` sees, or None where it sees all before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    @property
    def eos_token_ids(self) -> list[int]:
        """The end tokens as a list, whether config.json holds none, one or several."""
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    @classmethod
    def from_hf(cls, values: Any, where: str = "config.json") -> "ModelConfig":
        """From the contents of a Hugging Face config.json, in transformers 4's or 5's spelling.

        Keys that do not change the computation are ignored. Raises LorakitError, naming `where`,
        for an unknown model_type, a wrong type, a missing size, or a feature lorakit lacks.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must hold a JSON object, not {type(values).__name__}")
        values = dict(values)
        _check("model_type" in values, f"{where}: model_type is missing")
        family = FAMILIES.get(str(values["model_type"]), Family(""))
        values = family.defaults | values
        act = values.get("hidden_act", "silu")
        _check(act == "silu", f"{where}: hidden_act {act!r} is not supported; it must be 'silu'")
        if values.get("quantization_config") is not None:
            raise LorakitError(
                f"{where}: the checkpoint is already quantized (quantization_config); "
                "load its 16-bit original"
            )
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        if values.get("head_dim") is None:
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if type(hidden) is int and type(heads) is int and heads > 0:
                _check(
                    hidden % heads == 0,
                    f"{where}: head_dim is not set, and hidden_size ({hidden}) is no multiple of "
                    f"num_attention_heads ({heads})",
                )
                values["head_dim"] = hidden // heads
        values["rope"] = _rope_from_hf(values, where)
        values["qkv_bias"] = values["o_bias"] = values.get("attention_bias", False)
        if not family.windows:
            values["sliding_window"] = values["layer_types"] = None
        values["sliding_layers"] = _sliding_layers(values, where)
        return from_mapping(cls, values | family.fields, where, ignore_unknown=True)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json in transformers 4's spelling, which every version reads."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rope, sliding = values.pop("rope"), values.pop("sliding_layers")
        values["architectures"] = [FAMILIES[self.model_type].architecture]
        values["attention_bias"] = values.pop("o_bias")
        del values["qkv_bias"], values["qk_norm"]
        if any(sliding):
            first = values["max_window_layers"] = sliding.index(True)
            values["use_sliding_window"] = True
            if sliding != [i >= first for i in range(len(sliding))]:
                names = ("full_attention", "sliding_attention")
                values["layer_types"] = [names[slides] for slides in sliding]
        values["hidden_act"] = "silu"
        values["rope_theta"] = rope.rope_theta
        values["rope_scaling"] = None
        if rope.rope_type != "default":
            values["rope_scaling"] = {"rope_type": rope.rope_type, "factor": rope.factor}
        if rope.rope_type == "llama3":
            values["rope_scaling"] |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
            }
        return values


def _rope_from_hf(values: Mapping, where: str) -> RopeConfig:
    """transformers 5: one rope_parameters; transformers 4: rope_theta beside rope_scaling."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if isinstance(given, Mapping):
        given = {"rope_type" if name == "type" else name: v for name, v in given.items()}
        beside = {"rope_theta": values.get("rope_theta")}
        if given.get("rope_type") == "llama3":
            original = values.get("max_position_embeddings")
            beside["original_max_position_embeddings"] = original
        given = {name: v for name, v in beside.items() if v is not None} | given
    return from_mapping(RopeConfig, given, f"{where}, rope parameters", ignore_unknown=True)


def _sliding_layers(values: Mapping, where: str) -> Any:
    """Which layers have a sliding window: layer_types, or what stood in its place before."""
    layers, window = values.get("num_hidden_layers"), values.get("sliding_window")
    if values.get("layer_types") is not None:
        names = {"full_attention": False, "sliding_attention": True}
        kinds = values["layer_types"]
        if not isinstance(kinds, list) or not all(kind in names for kind in map(str, kinds)):
            raise LorakitError(
                f"{where}: layer_types must list {' or '.join(names)}, not {kinds!r}"
            )
        sliding = [names[kind] for kind in kinds]
        return sliding if any(sliding) else []
    # Mistral's window holds for all layers; Qwen's from max_window_layers on, if it is used at all
    first = 0
    if "use_sliding_window" in values:
        first = values.get("max_window_layers", 0)
        window = window if values["use_sliding_window"] else None
    if window is None or type(layers) is not int or type(first) is not int or first >= layers:
        return []
    return [i >= first for i in range(min(layers, 10_000))]


# ---- quantization, adapters, runs ---------------------------------------------------------------


@dataclass(frozen=True)
class QuantConfig:
    """How the frozen weights of linear layers are stored."""

    quant_type: str = "nf4"
    block_size: int = 64
    """values that share one scale: a power of two from 32 to 4096"""
    double_quant: bool = True
    """store the scales in 8 bits too"""
    skip_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    """layers that stay dense: the last part of their name, or the whole"""

    def __post_init__(self):
        _check(self.quant_type == "nf4", f"quant_type is {self.quant_type!r}; it must be 'nf4'")
        _check(
            self.block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            f"block_size is {self.block_size}; it must be a power of two from 32 to 4096",
        )


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter. The update is scaled by lora_alpha / r, or / sqrt(r) with use_rslora."""

    r: int = 8
    lora_alpha: int | float = 8
    target_modules: str | list[str] = "all-linear"
    """"all-linear" (every linear layer but the output head), names, or one regex for whole names"""
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self):
        _check(self.r > 0, f"r must be positive, not {self.r}")
        _check(
            0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)"
        )
        _check(len(self.target_modules) > 0, "target_modules is empty: name at least one layer")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


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
    """"cosine", "linear" or "constant", each after a linear warm-up"""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_seq_length: int = 1024
    over_length: str = "truncate"
    """what to do with a longer row: "truncate" (the prompt's start first), "drop" or "raise" """
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    """evaluate on the validation rows every so many steps; null: only at the end"""
    seed: int = 0

    def __post_init__(self):
        for name in [
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "max_grad_norm",
            "max_seq_length",
        ]:
            _check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _check(self.max_seq_length > 1, "max_seq_length must be at least 2")
        for name in ("max_steps", "eval_steps"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name} must be positive or null, not {value}")
        _check(
            self.lr_scheduler_type in ("cosine", "linear", "constant"),
            f"lr_scheduler_type is {self.lr_scheduler_type!r}; choose cosine, linear or constant",
        )
        _check(
            self.over_length in ("truncate", "drop", "raise"),
            f"over_length is {self.over_length!r}; choose truncate, drop or raise",
        )
        _check(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be in [0, 2^63)")
        _check(
            0 <= self.warmup_ratio <= 1,
            f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1]",
        )
        _check(
            0 <= self.weight_decay < 1, f"weight_decay is {self.weight_decay}; it must be in [0, 1)"
        )


@dataclass(frozen=True)
class DataConfig:
    """JSONL files of rows with the text fields `prompt` and `completion`."""

    train: str
    validation: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """A run file: what to train, on what, and how."""

    model: str
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    quantize: QuantConfig | None = None
    dtype: str = "bfloat16"
    train: TrainConfig = TrainConfig()

    @classmethod
    def from_dict(cls, values: Any, where: str = "run file") -> "RunConfig":
        """From the mapping of a run file: `model`, `data`, `lora`, `quantize`, `dtype`, and
        TrainConfig's fields beside them.

        Raises LorakitError with the nearest valid name for a key that is none of these.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
        values = dict(values)
        own = [f.name for f in dataclasses.fields(cls) if f.name != "train"]
        training = [f.name for f in dataclasses.fields(TrainConfig)]
        for name in values:
            if name not in own and name not in training:
                raise LorakitError(f"{where}: unknown key {name!r}{nearest(name, own + training)}")
        data = values.get("data")
        if isinstance(data, str):
            data = {"train": data}
        if data is not None:
            values["data"] = from_mapping(DataConfig, data, f"{where}, data")
        if "lora" in values:
            values["lora"] = from_mapping(LoraConfig, values["lora"], f"{where}, lora")
        values["quantize"] = quant_config(values.get("quantize"), f"{where}, quantize")
        train = {name: values.pop(name) for name in training if name in values}
        values["train"] = from_mapping(TrainConfig, train, where)
        run = from_mapping(cls, values, where)
        to_dtype(run.dtype)
        return run


def quant_config(value: Any, where: str = "quantize") -> QuantConfig | None:
    """None, "nf4", a QuantConfig or a mapping of its fields, as a QuantConfig or None."""
    if value is None or isinstance(value, QuantConfig):
        return value
    if isinstance(value, str):
        value = {"quant_type": value}
    return from_mapping(QuantConfig, value, where)
