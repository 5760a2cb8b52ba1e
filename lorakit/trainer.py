"""The training loop and evaluation.

One optimizer step sums the loss over the label tokens of all its micro-batches and divides once by
their number: a step of 8 rows has the same gradient whether it runs as 1 x 8 or 8 x 1.

Written to `output_dir`: the adapter, and metrics.jsonl with one line per step (loss, learning rate,
gradient norm, tokens per second, peak memory) and per evaluation. Ctrl-C ends the run after the
current step, and saves the adapter as it is then.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .adapter import save_adapter
from .attached import Attached, attached
from .config import LorakitError, TrainConfig
from .data import IGNORE, Example, batches, collate, encode_rows, read_rows
from .memory import peak_memory_mb
from .model import Decoder, MoE
from .optim import AdamW, learning_rate
from .tokenizer import Tokenizer

Rows = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """What a run did. Losses are nats per label token; tokens and tokens_per_second count real
    tokens, prompts included and padding not; `seconds` excludes evaluation."""

    output_dir: Path
    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: float
    evaluations: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False


def train(
    model: Decoder,
    tok: Tokenizer,
    data: Rows | Mapping[str, Rows],
    config: TrainConfig | None = None,
    *,
    base_model: str | None = None,
    after_step: Callable[[], None] | None = None,
) -> TrainResult:
    """Train the adapter attached to `model` (see `attach`) on rows of prompt and completion.

    data: a JSONL file or an iterable of rows, or {"train": ..., "validation": ...} of these.
    base_model: recorded in the adapter's config. after_step: called after every optimizer step,
    while its gradients are still there.

    Raises LorakitError before the first step if no adapter is attached, the model is float16 or the
    data cannot be used; after it if some lora_B got no gradient; and at a loss or gradient that is
    not finite.
    """
    config = config or TrainConfig()
    layers = _trainable_layers(model)
    if not isinstance(data, Mapping):
        data = {"train": data}
    if "train" not in data or not set(data) <= {"train", "validation"}:
        raise LorakitError(
            f"train: data must hold 'train' and maybe 'validation', not {list(data)}"
        )
    limits = (config.max_seq_length, config.over_length)
    examples = _encode(model, tok, data["train"], *limits)
    validation = None
    if data.get("validation") is not None:
        validation = _encode(model, tok, data["validation"], *limits)

    params = [p for p in model.parameters() if p.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = AdamW(
        params,
        betas=betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        state_bits=8 if config.optim == "adamw_8bit" else 32,
    )
    total = _total_steps(len(examples), config)
    output_dir = Path(config.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # dropout

    loss, tokens, seconds, evaluations = math.nan, 0, 0.0, []
    with _training_mode(model, config), _Log(output_dir, total) as log, _interrupt() as stop:
        for step, micro_batches in zip(
            range(1, total + 1), _step_batches(examples, config), strict=False
        ):
            started = time.perf_counter()
            kind, peak_rate = config.lr_scheduler_type, config.learning_rate
            lr = learning_rate(kind, step - 1, total, peak_rate, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = _backward(model, micro_batches)
            if step == 1:
                _check_gradients(model, layers)
            norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise LorakitError(
                    f"train: step {step} has loss {loss} and gradient norm {norm}; "
                    "the learning rate may be too high"
                )
            optimizer.step()
            if after_step is not None:
                after_step()
            optimizer.zero_grad(set_to_none=True)

            took = time.perf_counter() - started
            count = sum(len(e.input_ids) for batch in micro_batches for e in batch)
            tokens, seconds = tokens + count, seconds + took
            log.step(
                step=step,
                loss=loss,
                learning_rate=lr,
                grad_norm=norm,
                tokens=tokens,
                tokens_per_second=count / took,
                peak_memory_mb=peak_memory_mb(model.device),
            )
            last = step == total
            if stop.is_set() or last:  # before an evaluation that may be cut short
                save_adapter(model, output_dir, base_model=base_model)
            if stop.is_set():
                break
            if validation and (last or (config.eval_steps and step % config.eval_steps == 0)):
                result = _evaluate(model, validation, config.per_device_train_batch_size)
                evaluations.append({"step": step, **result})
                log.evaluation(step, result)
        interrupted = stop.is_set()
    return TrainResult(
        output_dir=output_dir,
        steps=step,
        loss=loss,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_mb=peak_memory_mb(model.device),
        evaluations=evaluations,
        interrupted=interrupted,
    )


def evaluate(
    model: Decoder,
    tok: Tokenizer,
    data: Rows,
    *,
    batch_size: int = 8,
    max_seq_length: int = 1024,
    over_length: str = "truncate",
) -> dict[str, float]:
    """Loss (nats per label token), perplexity, and the numbers of label tokens and rows."""
    examples = _encode(model, tok, data, max_seq_length, over_length)
    return _evaluate(model, examples, batch_size)


@torch.no_grad()
def _evaluate(model: Decoder, examples: list[Example], batch_size: int) -> dict[str, float]:
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    starts = range(0, len(ordered), batch_size)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(starts, desc="evaluating", unit="batch", disable=None, leave=False):
            ids, labels = collate(ordered[start : start + batch_size])
            loss, n = model.loss(ids.to(model.device), labels.to(model.device))
            total, count = total + loss.item(), count + n.item()
    finally:
        model.train(was_training)
    mean = total / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),  # beyond lies infinity
        "label_tokens": count,
        "rows": len(examples),
    }


def _trainable_layers(model: Decoder) -> dict[str, Attached]:
    layers = {name: each for name, each in attached(model).items() if each.selected is not None}
    if not layers:
        raise LorakitError("train: no adapter is attached; call lorakit.attach(model, ...) first")
    if any(layer.merged is not None for layer in layers.values()):
        raise LorakitError("train: the adapter is merged; call lorakit.unmerge(model) first")
    if model.dtype == torch.float16:
        raise LorakitError(
            "train: gradients of a float16 model underflow; load it in bfloat16 or float32"
        )
    return layers


def _encode(
    model: Decoder, tok: Tokenizer, rows: Rows, max_seq_length: int, over_length: str
) -> list[Example]:
    examples = encode_rows(
        read_rows(rows), tok, max_seq_length=max_seq_length, over_length=over_length
    )
    tok.check_fits((i for e in examples for i in e.input_ids), model.config.vocab_size)
    return examples


def _total_steps(rows: int, config: TrainConfig) -> int:
    if config.max_steps is not None:
        return config.max_steps
    micro_batches = math.ceil(rows / config.per_device_train_batch_size)
    steps_per_epoch = math.ceil(micro_batches / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def _step_batches(examples: list[Example], config: TrainConfig) -> Iterator[list[list[Example]]]:
    """The micro-batches of one optimizer step after another, epoch after epoch, without end."""
    lengths = [len(e.input_ids) for e in examples]
    accumulate = config.gradient_accumulation_steps
    epoch = 0
    while True:
        order = batches(lengths, config.per_device_train_batch_size, config.seed, epoch)
        for i in range(0, len(order), accumulate):
            yield [[examples[row] for row in rows] for rows in order[i : i + accumulate]]
        epoch += 1


def _backward(model: Decoder, micro_batches: list[list[Example]]) -> float:
    """Gradients of the mean loss over all label tokens of the step; that mean."""
    count = sum(label != IGNORE for batch in micro_batches for e in batch for label in e.labels[1:])
    total = 0.0
    for batch in micro_batches:
        ids, labels = collate(batch)
        loss, _ = model.loss(ids.to(model.device), labels.to(model.device))
        (loss / count).backward()
        total += loss.item()
    return total / count


def _check_gradients(model: Decoder, layers: Mapping[str, Attached]) -> None:
    """An expert may have been chosen by no token yet; every other module has work to do."""
    experts = tuple(f"{n}.experts." for n, m in model.named_modules() if isinstance(m, MoE))
    for name, layer in layers.items():
        for ending, parameter in layer.tensors(layer.selected).items():
            if parameter.grad is None and not name.startswith(experts):
                raise LorakitError(f"train: {name}.{ending} got no gradient; it is not used")


class _Log:
    """metrics.jsonl, and beside it a progress bar, or plain lines where there is no terminal."""

    def __init__(self, output_dir: Path, total: int):
        self.file = open(output_dir / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(total=total, desc="training", unit="step", disable=None)
        self.total = total

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.file.close()

    def step(self, **values: Any) -> None:
        self._write(values)
        line = (
            f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{values['tokens_per_second']:.0f} tok/s, {values['peak_memory_mb']:.0f} MB"
        )
        if self.bar.disable:
            print(f"step {values['step']}/{self.total}: {line}", flush=True)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        self._write({"step": step, **{f"eval_{name}": value for name, value in result.items()}})
        line = f"step {step}/{self.total}: validation loss {result['loss']:.4f}"
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def _write(self, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


@contextmanager
def _training_mode(model: Decoder, config: TrainConfig) -> Iterator[None]:
    """Dropout and gradient checkpointing as the run wants them; as they were before, afterwards."""
    before = model.training, model.gradient_checkpointing
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing
    try:
        yield
    finally:
        model.train(before[0])
        model.gradient_checkpointing = before[1]


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
