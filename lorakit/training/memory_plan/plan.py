"""`plan_memory`: how much memory a run takes, before it runs.

lorakit's own code takes two steps on tensors without memory, and every byte is booked.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import to_dtype
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.config.training import TrainConfig
from lorakit.files import hub
from lorakit.files.local import read_json
from lorakit.kernels.dispatch import has_triton
from lorakit.kernels.pretend import H100
from lorakit.models.config import ModelConfig
from lorakit.training.memory_plan.elsewhere import forecast_elsewhere
from lorakit.training.memory_plan.forecast import Forecast, Setting, forecast
from lorakit.training.memory_plan.layers import forecast_by_layers, forecast_by_rows
from lorakit.training.memory_plan.ledger import Kind

LONGEST = 1 << 24  # tokens of a row that can be forecast, since they stand in a list


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run, in bytes.

    A forecast on a GPU counts what torch's allocator counts. The CUDA context (some 500 MB) and
    other processes on the card come on top of `reserved`.
    """

    peak: int
    """The most bytes that torch holds at a time."""
    reserved: int
    """What torch's allocator takes of the card for that, which is an estimate where few layers tell
    of all; on a CPU the same as peak."""
    host: int
    """Bytes in host memory that belong to it: paged state, activations and weights that wait
    there. On a CPU 0."""
    when: str
    """Phase of the peak: "loading", "forward", "head", "backward", "optimizer" or "generate"."""
    resident: dict[str, int]
    """Bytes between two steps, by kind."""
    at_peak: dict[str, int]
    """Bytes at the peak, by kind; their sum is `peak`."""
    phases: dict[str, int]
    """The peak of each phase."""
    activations: dict[str, int]
    """The activations at the peak, by the part of the model that made them."""
    seconds: float
    """The time that the forecast took."""


def plan_memory(
    model: str | Path | ModelConfig | Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    quantize: str | Mapping[str, Any] | QuantConfig | None = None,
    lora: TargetConfig | None = None,
    train: TrainConfig | None = None,
    tokens: int | None = None,
    documents: Sequence[int] | None = None,
    label_share: float = 1.0,
    device: Literal["cuda", "cpu"] = "cuda",
    capability: tuple[int, int] = H100,
    ranks: int = 1,
    shard: Literal["none", "full"] = "none",
    offload_weights: bool = False,
    generate: tuple[int, int, int] | None = None,
    kept_layers: int | None = None,
    vocabulary: int = 0,
    classifier: ClassifierConfig | None = None,
) -> MemoryPlan:
    """Forecast the memory of a run, without its weights and without its device.

    Args:
        model: A directory or Hub id, of which config.json is read, its contents, or a ModelConfig.
        dtype: As `load_model` takes it.
        quantize: As `load_model` takes it.
        lora: The adapter; None means LoraConfig(), and for generation none.
        train: The settings of the run; None means TrainConfig().
        tokens: The tokens of each row, in grpo of each prompt; None means train.max_seq_length.
        documents: The tokens of each document in a packed row; None: as many as the batch has rows.
        label_share: The share of tokens that are learned, in (0, 1]; grpo learns completions.
        device: "cuda" for an NVIDIA GPU with Triton, or "cpu" for this machine.
        capability: The GPU's compute capability.
        ranks: How many processes share the run; the plan is that of the first one.
        shard: "full" if the weights are divided among the ranks; see elsewhere.py.
        offload_weights: Whether the frozen weights wait in host memory; see elsewhere.py too.
        generate: Rows, tokens of the prompt, and new tokens, to forecast inference instead.
        kept_layers: How many blocks keep gate and up; None takes mlp_activations "auto" for "keep".
        vocabulary: How many tokens the model gets rows for, as by `add_tokens`, if it has fewer.
        classifier: As `load_model` takes it.

    Returns:
        The plan.

    Raises:
        LorakitError: A setting is unknown, or not for a forecast, or Triton is missing for a GPU.
        RuntimeError: The other process failed.
    """
    started = time.perf_counter()
    train, lora = train or TrainConfig(), lora or (None if generate else LoraConfig())
    config, new = model_config(model, classifier), generate and generate[2]
    _check(device, ranks, train, shard, offload_weights, generate)
    given = quant_config(quantize), lora, train, _rows(train, tokens, documents, generate)
    layers, kept = list(range(config.num_hidden_layers)), kept_of(config, train, kept_layers)
    where = _learned(train, given[3], label_share), device, capability
    setting = Setting(config, layers, kept, to_dtype(dtype), *given, *where, new, ranks)
    setting = replace(setting, divided=shard == "full" and ranks > 1, offload=offload_weights)
    setting = replace(setting, vocabulary=vocabulary, teacher=None if new else teacher_of(train))
    found = forecast_by_rows(setting, lambda rows: forecast_by_layers(rows, _made))
    return _plan(found, device, time.perf_counter() - started)


def teacher_of(train: TrainConfig) -> ModelConfig | None:
    """Return the config of the model that distillation loads as its teacher; None: there is none.

    Raises LorakitError if it cannot be read.
    """
    settings = train.distillation
    if settings is None or settings.teacher is None or settings.logits is not None:
        return None
    return model_config(settings.teacher)


def _made(setting: Setting) -> Forecast:
    """Return a forecast, by the other process if it changes torch."""
    return forecast_elsewhere(setting) if setting.is_elsewhere else forecast(setting)


def kept_of(config: ModelConfig, train: TrainConfig, said: int | None = None) -> int:
    """Return how many blocks keep gate and up for backward, which may be `said`."""
    if said is not None:
        return said
    return 0 if train.mlp_activations == "recompute" else config.num_hidden_layers


def _check_rows(tokens: int | None, documents: Sequence[int] | None) -> None:
    """Raise LorakitError for rows that no run can have."""
    if tokens is not None and tokens < 2:
        raise LorakitError(f"plan_memory: tokens is {tokens}; a row has at least 2")
    if documents is not None and (not documents or min(documents) < 2):
        raise LorakitError("plan_memory: documents must hold lengths of at least 2")


def _check(
    device: str,
    ranks: int,
    train: TrainConfig,
    shard: str,
    offload_weights: bool,
    generate: tuple[int, int, int] | None,
) -> None:
    """Raise LorakitError for what cannot be forecast."""
    if train.grpo is not None and generate is None and (offload_weights or shard == "full"):
        raise LorakitError(
            "plan_memory: grpo samples from whole weights: leave out shard: full and "
            "offload_weights"
        )
    if ranks < 1:
        raise LorakitError(f"plan_memory: ranks is {ranks}; there is at least 1")
    if train.train == "full" and offload_weights:
        raise LorakitError(
            "plan_memory: train: full changes the weights, which then cannot wait in host memory: "
            "leave out offload_weights"
        )
    if generate is not None and (len(generate) != 3 or min(generate) < 1):
        raise LorakitError("plan_memory: generate is (rows, tokens of a prompt, new tokens)")
    if device == "cuda" and not has_triton():
        raise LorakitError(
            "plan_memory: a GPU's kernels are Triton's: pip install lorakit[triton], or plan for a "
            "cpu"
        )


def _learned(train: TrainConfig, rows: Sequence[int], label_share: float) -> float:
    """Return the share of tokens that are learned: in grpo, of the longest completions."""
    if train.grpo is None:
        return label_share
    return min(1.0, train.grpo.max_completion_length / max(rows))


def model_config(
    model: str | Path | ModelConfig | Mapping[str, Any], classifier: ClassifierConfig | None = None
) -> ModelConfig:
    """Return the config of a model, of whose files config.json alone is read.

    `classifier` is a new head for classes that it is given.
    """
    if classifier is not None:
        return replace(model_config(model), classifier=classifier)
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, Mapping):
        return ModelConfig.from_hf(dict(model))
    path = hub.resolve(model, ["config.json"])
    return ModelConfig.from_hf(read_json(path / "config.json"), str(path / "config.json"))


def _rows(
    train: TrainConfig,
    tokens: int | None,
    documents: Sequence[int] | None,
    generate: tuple[int, int, int] | None,
) -> tuple[int, ...]:
    """Return the tokens of each row of a micro-batch, or document of a packed one, or prompt."""
    _check_rows(tokens, documents)
    if generate is not None:
        if generate[1] > LONGEST:
            raise LorakitError(f"plan_memory: a prompt has at most {LONGEST:,} tokens")
        return (generate[1],) * generate[0]
    if documents is not None:
        if not train.packing:
            raise LorakitError("plan_memory: documents are those of a packed row: set packing")
        return tuple(documents)
    completion = 0 if train.grpo is None else train.grpo.max_completion_length
    longest = (tokens or train.max_seq_length) + completion
    if longest > LONGEST:
        raise LorakitError(f"plan_memory: a row has at most {LONGEST:,} tokens, not {longest:,}")
    return (longest,) * train.rows_at_a_time


def _by_name(kinds: Mapping[Kind, float]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (name, _), size in kinds.items():
        found[name] += round(size)
    return {name: size for name, size in found.most_common() if size}


def _plan(found: Forecast, device: str, seconds: float) -> MemoryPlan:
    totals = {mark: sum(kinds.values()) for mark, kinds in found.peaks.items()}
    phases: dict[str, int] = {}
    for mark, total in totals.items():
        phases[mark.phase] = max(phases.get(mark.phase, 0), round(total))
    mark = max(totals, key=totals.__getitem__)
    kinds = found.peaks[mark]
    at_peak = _by_name(kinds)
    peak = sum(at_peak.values())
    parts = {part: round(size) for (_, part), size in kinds.items() if part and size}
    return MemoryPlan(
        peak=peak,
        reserved=round(found.reserved) if device == "cuda" else peak,
        host=round(found.host) if device == "cuda" else 0,
        when=mark.phase,
        resident=_by_name(found.resident),
        at_peak=at_peak,
        phases=phases,
        activations=dict(sorted(parts.items(), key=lambda each: -each[1])),
        seconds=seconds,
    )
