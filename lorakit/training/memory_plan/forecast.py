"""A training run on tensors without memory: lorakit's own code, every byte booked.

It loads a model of empty tensors as `load_model` does, attaches an adapter, and takes two steps: in
the second one the optimizer's state is there. Nothing is computed (kernels/pretend.py). Of several
ranks the first one is forecast (several.py).
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import attach
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.config.training import TrainConfig
from lorakit.data.encode import (
    IGNORE,
    AnyExample,
    Example,
    JudgedExample,
    LabelledExample,
    PairExample,
)
from lorakit.inference.decode import Decoding
from lorakit.kernels.pretend import pretend_cpu, pretend_gpu
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.empty import empty_model, fill_empty
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.resize import resize_embeddings
from lorakit.models.sharding import shard
from lorakit.training.captured import CapturedStep, Function, Recording, why_eager
from lorakit.training.device_step import optimizer_step
from lorakit.training.divided import DividedStep, DividedSum
from lorakit.training.float8 import check_frozen_dtype, start_float8
from lorakit.training.gradients import FastSum, GradientSum, OrderedSum
from lorakit.training.memory_plan.ledger import Kind, Ledger
from lorakit.training.memory_plan.pool import Pool
from lorakit.training.memory_plan.sampled import graded_step, sample
from lorakit.training.memory_plan.several import Absent, pretended_mesh
from lorakit.training.memory_plan.teacher import compared_with
from lorakit.training.memory_plan.watch import NO_LAYER, Mark, Watch
from lorakit.training.memory_plan.workspace import cublas
from lorakit.training.ranks import Ranks
from lorakit.training.step import backward, prepare
from lorakit.training.stepping import run_optimizer
from lorakit.training.trainable import trained_part

STEPS = 2  # the first has no optimizer state
RATES = 1000  # steps whose rates lie on the device; 16 bytes each


@dataclass(frozen=True)
class Setting:
    """What is forecast.

    Attributes:
        config: The model, perhaps with a few of its layers.
        numbers: The number of each of its layers in the whole model.
        kept_layers: How many of them keep gate and up for backward.
        dtype: What the model computes in.
        quantize: How its weights are packed.
        lora: The adapter; None for none.
        train: The settings of the run.
        rows: The tokens of each row of a micro-batch, or of each document of a packed one.
        label_share: The share of tokens that are learned.
        device: "cuda" or "cpu".
        capability: The GPU's compute capability.
        new_tokens: How many tokens follow each of `rows`, which are prompts; None: a step trains.
        ranks: How many processes share the run; this is the first of them.
        divided: Whether each of them has its part of the weights alone.
        offload: Whether the frozen weights wait in host memory.
        vocabulary: How many tokens the model is given rows for, if it has fewer.
        teacher: The model that distillation learns from, if it is another one.
    """

    config: ModelConfig
    numbers: list[int]
    kept_layers: int
    dtype: torch.dtype
    quantize: QuantConfig | None
    lora: TargetConfig | None
    train: TrainConfig
    rows: tuple[int, ...]
    label_share: float
    device: str
    capability: tuple[int, int]
    new_tokens: int | None = None
    ranks: int = 1
    divided: bool = False
    offload: bool = False
    vocabulary: int = 0
    teacher: ModelConfig | None = None

    @property
    def label(self) -> str:
        """The label of all rows, if the model has a head for classes."""
        head = self.config.classifier
        return "0" if head is None or head.regression else head.labels[0]

    @property
    def is_elsewhere(self) -> bool:
        """Whether the forecast changes torch, and so is made by a process of its own."""
        return self.divided or self.offload


@dataclass(frozen=True)
class Forecast:
    """The bytes of a run, by kind: between two steps, at the peak of each moment, and so on.

    Attributes:
        resident: What is held between two steps.
        peaks: What is held at the peak of each moment.
        reserved: What CUDA's allocator takes of the card for it.
        host: The most bytes of copies in host memory.
    """

    resident: Mapping[Kind, float]
    peaks: Mapping[Mark, Mapping[Kind, float]]
    reserved: float
    host: float


def forecast(setting: Setting) -> Forecast:
    """Return what a run takes; see the module."""
    on_gpu = setting.device == "cuda"
    ledger = Ledger("meta", Pool() if on_gpu else None)
    model = empty_model(setting.config, setting.dtype, setting.quantize)
    with ExitStack() as stack:
        if setting.is_elsewhere:
            mesh = pretended_mesh(setting.ranks if setting.divided else 1, ledger)
            # a CPU's memory is the host's
            shard(model, stack.enter_context(mesh), offload=setting.offload and on_gpu)
        stack.enter_context(_pretending(setting))
        stack.enter_context(ledger)
        _load(model, ledger, setting.numbers)
        if setting.vocabulary > setting.config.vocab_size:
            resize_embeddings(model, setting.vocabulary)
            own_weights(ledger, model)
        if setting.train.train == "full" and setting.new_tokens is None:
            for p in model.parameters():  # as those of a model that was loaded do
                p.requires_grad_(p.is_floating_point())
        elif setting.lora is not None:
            attach(model, plain(setting.lora))
        own_weights(ledger, model)
        teacher = _loaded_teacher(setting, ledger)
        with Watch(ledger, model, setting.numbers) as watch:
            if setting.new_tokens is not None:
                resident, paged = _generate(setting, model, ledger, watch), 0
            else:
                resident, paged = _steps(setting, model.train(), teacher, ledger, watch)
    peaks = {mark: peak.kinds for mark, peak in ledger.peaks.items() if mark}
    reserved = ledger.pool.peak_reserved if ledger.pool is not None else 0
    return Forecast(resident, peaks, reserved, ledger.most_on_host + paged)


def _pretending(setting: Setting) -> AbstractContextManager[None]:
    return pretend_gpu(setting.capability) if setting.device == "cuda" else pretend_cpu()


def plain(lora: TargetConfig) -> TargetConfig:
    """Return an adapter of the same sizes that starts from nothing but random numbers."""
    return replace(lora, init_lora_weights=True) if isinstance(lora, LoraConfig) else lora


def _loaded_teacher(setting: Setting, ledger: Ledger) -> Decoder | None:
    """Return the teacher of a run, if it is another model, as the run loads it."""
    settings, config = setting.train.distillation, setting.teacher
    if settings is None or config is None:
        return None
    quantize = None if settings.quantize is None else quant_config(settings.quantize)
    teacher = empty_model(config, setting.dtype, quantize)
    _load(teacher, ledger, [NO_LAYER] * config.num_hidden_layers)
    ledger.own(("teacher", ""), teacher.parameters())
    return teacher


def _load(model: Decoder, ledger: Ledger, numbers: Sequence[int]) -> None:
    """Fill a model tensor by tensor, as `load_model` does; its layers have these numbers."""
    ledger.kind = "loading", ""
    for name, place in fill_empty(model, torch.device("meta")):
        parts = name.split(".")
        layer = numbers[int(parts[2])] if parts[1:2] == ["layers"] else NO_LAYER
        ledger.mark = Mark("loading", layer)
        place()
        own_weights(ledger, model.get_submodule(name.rpartition(".")[0]), name)


def own_weights(ledger: Ledger, module: nn.Module, prefix: str = "") -> None:
    """Book the parameters of a module by what they are."""
    for name, part in module.named_modules():
        for leaf, p in part.named_parameters(recurse=False):
            ledger.own(_kind_of(f"{prefix}.{name}.{leaf}".split("."), part, leaf, p), [p])


def _kind_of(names: Sequence[str], module: nn.Module, leaf: str, p: Tensor) -> Kind:
    if p.requires_grad:
        return ("adapters" if "adapters" in names else "trained weights"), ""
    if "embed_tokens" in names:
        return "embeddings", ""
    if "lm_head" in names:
        return "head", ""
    if isinstance(module, PackedWeight) and leaf != "bias":
        return ("packed weights" if leaf == "weight" else "scales"), ""
    return "weights", ""


def _steps(
    setting: Setting, model: Decoder, teacher: Decoder | None, ledger: Ledger, watch: Watch
) -> tuple[Mapping[Kind, float], int]:
    """Take the steps; return what is held after them, and the bytes of paged state."""
    train = setting.train
    trained = trained_part(model, train)  # freezes what is to be frozen
    model.gradient_checkpointing = train.gradient_checkpointing
    model.offload_activations = train.activation_offloading
    model.neftune_noise_alpha = train.neftune_noise_alpha
    model.kept_layers = setting.kept_layers
    if train.frozen_dtype is not None:
        check_frozen_dtype(model, train)
        with ledger.as_kind(("weights", "")):
            start_float8(model, train.z_loss)
    watch.begin("optimizer", ("optimizer state", ""))
    optimizer, shares = run_optimizer(trained, train)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: _own_gradient(ledger, p))
    params, rates = list(trained.trained().values()), [shares] * RATES
    if trained.divided is None:
        sums = _sums(setting, params, ledger)
        update = optimizer_step(optimizer, params, rates, train.max_grad_norm)
    else:
        absent = Absent(setting.ranks)
        sums = DividedSum(absent, trained.divided)
        options = train.max_grad_norm, trained.divided, absent
        update = DividedStep(optimizer, params, rates, *options)
    taken = micro_batches(setting)
    examples = [example for batch in taken for example in batch]
    reference = compared_with(train, model, teacher, examples, ledger)

    def updated(losses: Tensor) -> Tensor:
        watch.begin("optimizer", ("optimizer state", ""))
        told = update(losses)
        watch.begin("optimizer", ("workspace", ""))
        return told

    asked = max(setting.rows), setting.ranks, watch
    sampling = sample(model, train, *asked) if train.grpo is not None else None  # pages stay
    captured = _captured(setting, model, taken, ledger, updated)
    if setting.device == "cuda":  # of this thread, and of the one that goes backward
        watch.begin("forward", ("workspace", ""))
        ledger.while_it_runs(("workspace", ""), [cublas(setting.capability)] * 2)
    numbers = iter(range(len(examples)))
    rows = [[next(numbers) for _ in batch] for batch in taken]
    for number in range(1, STEPS + 1):
        watch.begin("forward", ("inputs", ""))
        if sampling is None:
            step = prepare(model, examples, number, rows, train, captured, sums.share)
        else:
            step = graded_step(model, taken, number, train, sums.share)
        if captured is None:
            updated(backward(model, step, train, reference, sums)[0])
        else:
            captured(step.packed, step.parts)
        del step
        optimizer.zero_grad(set_to_none=True)
    return dict(+ledger.now), optimizer.paged_bytes


def _generate(
    setting: Setting, model: Decoder, ledger: Ledger, watch: Watch
) -> Mapping[Kind, float]:
    """Read the prompts and take a step; return what is held after it."""
    assert setting.new_tokens is not None
    model.eval()
    watch.begin("generate", ("keys and values", ""))
    prompts = [[1] * n for n in setting.rows]
    decoding = Decoding(model, len(prompts), max(setting.rows) + setting.new_tokens)
    if setting.device == "cuda":
        ledger.while_it_runs(("workspace", ""), [cublas(setting.capability)])
    watch.begin("generate", ("activations", "residual"))
    lines, logits = decoding.read(prompts)
    decoding(lines, logits.argmax(-1)[:, None])
    del logits
    return dict(+ledger.now)


def _sums(setting: Setting, params: Sequence[Tensor], ledger: Ledger) -> GradientSum:
    """Return what adds the gradients of a step, over ranks that are not there."""
    train = setting.train
    if setting.ranks == 1:
        return Ranks().gradients(params, train.reduce, False, train.batches_of_step > 1)
    kind = OrderedSum if train.reduce == "ordered" else FastSum
    sums = kind(Absent(setting.ranks), params, False, params[0].device)
    for flat in sums.flats:
        ledger.own(("gradients", ""), [flat.sent, flat.received])
    return sums


def _own_gradient(ledger: Ledger, p: Tensor) -> None:
    if p.grad is not None:
        ledger.own(("gradients", ""), [p.grad])


def micro_batches(setting: Setting) -> list[list[AnyExample]]:
    """Return the micro-batches of a step, two a rank if it has more: one adds to the other."""
    if not 0 < setting.label_share <= 1:
        raise LorakitError(
            f"plan_memory: label_share is {setting.label_share}; it must be in (0, 1]"
        )
    train = setting.train
    batch: list[AnyExample] = []
    for n in setting.rows:
        learned = max(1, round(n * setting.label_share))
        row = Example([1] * n, [IGNORE] * (n - learned) + [1] * learned)
        if train.pairs:
            batch.append(PairExample(row, row))
        elif train.objective == "classification":
            batch.append(LabelledExample(row, setting.label))
        else:
            batch.append(JudgedExample(row, True) if train.objective == "kto" else row)
    return [batch] * min(2 * setting.ranks, train.batches_of_step)


@dataclass
class _Order:
    """The packed rows of a step, as `CapturedStep` asks for them."""

    packs: list[list[int]] | None
    lengths: "array[int]"


class _Graphs:
    """The recorder of a GPU that is pretended: what is recorded has memory of its own."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def run(self, function: Function) -> Tensor | None:
        """Run the function on the stream that records."""
        return self._within("stream", function)

    def record(self, function: Function) -> Recording:
        """Record the function: torch gives back what nobody uses before."""
        assert self.ledger.pool is not None
        self.ledger.pool.empty(lambda arena: arena != "graphs")
        return Recording(lambda: None, self._within("graphs", function))

    def _within(self, arena: str, function: Function) -> Tensor | None:
        before, self.ledger.arena = self.ledger.arena, arena
        try:
            return function()
        finally:
            self.ledger.arena = before


def _captured(
    setting: Setting,
    model: Decoder,
    taken: Sequence[Sequence[AnyExample]],
    ledger: Ledger,
    update: Callable[[Tensor], Tensor],
) -> CapturedStep | None:
    """Return what takes steps as CUDA graphs, if a run would."""
    train, layers = setting.train, trained_part(model, setting.train).layers
    if not train.packing or setting.device != "cuda" or train.cuda_graph == "off":
        return None
    if why_eager(model, layers, train) is not None:
        return None
    lengths = [len(example.input_ids) for example in taken[0]]
    order = _Order([list(range(len(lengths)))], array("l", lengths))
    with ledger.as_kind(("inputs", "")):
        found = CapturedStep(
            model, layers, order, train, update, _Graphs(ledger), lambda line: None
        )
    ledger.own(("gradients", ""), found.grads)
    return found
