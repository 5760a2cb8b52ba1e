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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .adapter import save_adapter
from .config import LorakitError, TrainConfig
from .data import IGNORE, Example, batches, collate, encode_rows, read_rows
from .lora import lora_layers
from .memory import peak_memory_mb
from .model import Decoder
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
) -> TrainResult:
    """Train the adapter attached to `model` (see `attach`) on rows of prompt and completion.

    data: a JSONL file or an iterable of rows, or {"train": ..., "validation": ...} of these.
    base_model: recorded in the adapter's config.

    Raises LorakitError before the first step if no adapter is attached, the model is float16 or the
    data cannot be used; after it if some lora_B got no gradient; and at a loss or gradient that is
    not finite.
    """
    config = config or TrainConfig()
    layers = lora_layers(model)
    if not layers:
        raise LorakitError("train: no adapter is attached; call lorakit.attach(model, ...) first")
    if any(layer.merged is not None for layer in layers.values()):
        raise LorakitError("train: the adapter is merged; call lorakit.unmerge(model) first")
    if model.dtype == torch.float16:
        raise LorakitError(
            "train: gradients of a float16 model underflow; load it in bfloat16 or float32"
        )
    if not isinstance(data, Mapping):
        data = {"train": data}
    if "train" not in data or not set(data) <= {"train", "validation"}:
        raise LorakitError(
            f"train: data must hold 'train' and maybe 'validation', not {list(data)}"
        )
    limits = {"max_seq_length": config.max_seq_length, "over_length": config.over_length}
    examples = encode_rows(read_rows(data["train"]), tok, **limits)
    tok.check_fits((i for e in examples for i in e.input_ids), model.config.vocab_size)
    validation = None
    if data.get("validation") is not None:
        validation = encode_rows(read_rows(data["validation"]), tok, **limits)
        tok.check_fits((i for e in validation for i in e.input_ids), model.config.vocab_size)

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(
        params,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    per_epoch = math.ceil(
        math.ceil(len(examples) / config.per_device_train_batch_size)
        / config.gradient_accumulation_steps
    )
    total = config.max_steps or math.ceil(config.num_train_epochs * per_epoch)
    output_dir = Path(config.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # dropout
    was_training, was_checkpointing = model.training, model.gradient_checkpointing
    model.gradient_checkpointing = config.gradient_checkpointing
    model.train()

    loss, tokens, seconds, step, evaluations = math.nan, 0, 0.0, 0, []
    bar = tqdm(total=total, desc="training", unit="step", disable=None)
    try:
        with open(output_dir / "metrics.jsonl", "w", encoding="utf-8") as log, _interrupt() as stop:

            def record(values: dict[str, Any]) -> None:
                log.write(json.dumps(values) + "\n")
                log.flush()
                if bar.disable:  # not a terminal: plain lines
                    print(_plain(values, total), flush=True)
                elif "eval_loss" in values:
                    bar.write(_plain(values, total))

            for step, micro_batches in zip(
                range(1, total + 1), _step_batches(examples, config), strict=False
            ):
                started = time.perf_counter()
                lr = learning_rate(
                    config.lr_scheduler_type,
                    step - 1,
                    total,
                    config.learning_rate,
                    config.warmup_ratio,
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = _backward(model, micro_batches)
                if step == 1:
                    _check_gradients(layers)
                norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm)
                if not (math.isfinite(loss) and torch.isfinite(norm)):
                    raise LorakitError(
                        f"train: step {step} has loss {loss} and gradient norm {norm.item()}; the "
                        "learning rate may be too high"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                took = time.perf_counter() - started
                count = sum(len(e.input_ids) for batch in micro_batches for e in batch)
                tokens, seconds = tokens + count, seconds + took
                peak = peak_memory_mb(model.device)
                record(
                    {
                        "step": step,
                        "loss": loss,
                        "learning_rate": lr,
                        "grad_norm": norm.item(),
                        "tokens": tokens,
                        "tokens_per_second": count / took,
                        "peak_memory_mb": peak,
                    }
                )
                bar.update()
                bar.set_postfix_str(
                    f"loss {loss:.3f}, lr {lr:.1e}, {tokens / seconds:.0f} tok/s, {peak:.0f} MB"
                )
                last = step == total
                if stop.is_set() or last:  # before an evaluation that may be cut short
                    save_adapter(model, output_dir, base_model=base_model)
                if stop.is_set():
                    break
                if validation and (last or (config.eval_steps and step % config.eval_steps == 0)):
                    result = _evaluate(model, validation, config.per_device_train_batch_size)
                    evaluations.append({"step": step, **result})
                    record({"step": step, **{f"eval_{k}": v for k, v in result.items()}})
            interrupted = stop.is_set()
    finally:
        bar.close()
        model.train(was_training)
        model.gradient_checkpointing = was_checkpointing
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
    examples = encode_rows(
        read_rows(data), tok, max_seq_length=max_seq_length, over_length=over_length
    )
    tok.check_fits((i for e in examples for i in e.input_ids), model.config.vocab_size)
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


def _check_gradients(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if layer.lora_B.grad is None:
            raise LorakitError(f"train: {name}.lora_B got no gradient; its output is not used")


def _plain(values: Mapping[str, Any], total: int) -> str:
    step = f"step {values['step']}/{total}"
    if "eval_loss" in values:
        return f"{step}: validation loss {values['eval_loss']:.4f}"
    return (
        f"{step}: loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
        f"{values['tokens_per_second']:.0f} tok/s, {values['peak_memory_mb']:.0f} MB"
    )


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
