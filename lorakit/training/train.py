"""The training loop and evaluation.

One optimizer step sums the loss over the label tokens of all its micro-batches and divides once by
their number: a step of 8 rows has the same gradient whether it runs as 1 x 8 or 8 x 1, padded or
packed.

Written to `output_dir`: the adapter, metrics.jsonl with one line per step (loss, learning rate,
gradient norm, tokens per second, share of padding, peak memory) and per evaluation, and checkpoints
(see run_state.py). What a step does follows from its number, the seed and the checkpoint: a run
that was killed and resumed ends with the bytes of one that was not. Ctrl-C and SIGTERM end a run
after the current step, with a checkpoint.

A step whose gradient is not finite is skipped and counted; after BAD_STEPS in a row the run stops.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import attached
from lorakit.adapters.peft_files.save import save_adapter
from lorakit.adapters.start import start_adapter
from lorakit.config.errors import LorakitError
from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.data.batching import Order, batches, collate
from lorakit.data.encode import IGNORE, Example, Examples, PairExample
from lorakit.data.rows import read_rows
from lorakit.evaluation.score import check_rows, score_rows
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder, MoE
from lorakit.models.tokenizer import Tokenizer
from lorakit.training import state as run_state
from lorakit.training.evaluate import Rows, encode, loss_of
from lorakit.training.log import Log
from lorakit.training.losses.batch import summed_loss
from lorakit.training.memory import peak_memory_mb
from lorakit.training.optim import AdamW, decay_groups, loraplus_groups
from lorakit.training.resume import Progress, end_with_the_best, must_match, restored, resumed_state
from lorakit.training.schedules import learning_rate

BAD_STEPS = 10


@dataclass(frozen=True)
class TrainResult:
    """What a run did, all of it if it was resumed. Losses are nats per label token; tokens and
    tokens_per_second count real tokens, prompts included and padding not; `seconds` excludes
    evaluation. skipped_steps had a gradient that was not finite."""

    output_dir: Path
    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: float
    evaluations: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False
    skipped_steps: int = 0
    stopped_early: bool = False


def train(
    model: Decoder,
    tok: Tokenizer,
    data: Rows | Mapping[str, Rows],
    config: TrainConfig | None = None,
    *,
    base_model: str | None = None,
    after_step: Callable[[], None] | None = None,
) -> TrainResult:
    """Train the selected adapter of `model` (see `attach`).

    data: a file or an iterable of rows (see docs/data.md), or {"train": ..., "validation": ...} of
        these.
    base_model: recorded in the adapter's config. after_step: called after every optimizer step,
        while its gradients are still there.

    Raises LorakitError before the first step if no adapter is attached, the model is float16, the
    data cannot be used, or output_dir holds checkpoints and the run is not to resume; after it if
    some parameter got no gradient; and after ten steps in a row whose gradient is not finite.
    """
    config = config or TrainConfig()
    _trainable_layers(model)
    if not isinstance(data, Mapping):
        data = {"train": data}
    if "train" not in data or not set(data) <= {"train", "validation"}:
        raise LorakitError(
            f"train: data must hold 'train' and maybe 'validation', not {list(data)}"
        )
    examples = encode(model, tok, data["train"], config, "the training rows")
    held_out = validation = None
    if data.get("validation") is not None:
        held_out = read_rows(data["validation"])
        validation = encode(model, tok, held_out, config, "the validation rows")
        check_rows(model, tok, held_out, config.eval_metrics)
    _check_validation(validation, config)
    output_dir = as_path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise LorakitError(f"train: output_dir {output_dir} is a file; choose another name")
    output_dir.mkdir(parents=True, exist_ok=True)

    def save(path: Path) -> None:
        save_adapter(model, path, base_model=base_model)

    with run_state.only_run_in(output_dir):
        resumed = resumed_state(output_dir, config)
        torch.manual_seed(config.seed)  # dropout
        started = start_adapter(model, lambda: _few_batches(model, examples, config))
        if started is not None:
            print(started)
        layers = _trainable_layers(model)  # EVA may have left some out
        optimizer, shares = _optimizer(model, config)
        order = Order(examples, config)
        same = must_match(model, examples, validation, config)
        progress = Progress()
        if resumed is not None:
            progress = restored(resumed, model, optimizer, same, order)
        saved = progress.step  # the checkpoint that there is, if any

        def evaluate_now() -> bool:
            """Of the step that is done; whether it is the best evaluation so far."""
            if progress.step == order.total:
                save(output_dir)  # before an evaluation that may be cut short
            size = config.per_device_train_batch_size
            result = loss_of(model, validation, size, config)
            result |= score_rows(model, tok, held_out, config.eval_metrics, size)
            log.evaluation(progress.step, result)
            return _note_evaluation(progress, result)

        def checkpoint() -> None:
            values = {"progress": asdict(progress), "same": same}
            try:
                tensors = run_state.trained_tensors(model) | run_state.random_tensors(model.device)
                tensors |= run_state.optimizer_tensors(optimizer)  # paged state takes room for it
                values["groups"] = run_state.group_values(optimizer)
                run_state.write_checkpoint(output_dir, progress.step, tensors, values, save)
                run_state.prune(output_dir, config.save_total_limit, progress.best_step)
            except (OSError, LorakitError) as error:
                reason = isinstance(error, OSError) and error.strerror
                log.say(
                    f"lorakit: the checkpoint of step {progress.step} could not be written "
                    f"({reason or error}); earlier ones are whole"
                )

        with (
            _training_mode(model, config),
            Log(output_dir, order.total, progress.step, config) as log,
            _interrupt() as stop,
        ):
            while True:
                due = validation is not None and _evaluation_is_due(progress, order.total, config)
                waits = due and stop.is_set()  # for the run that goes on from here
                evaluated = due and not waits
                better = evaluated and evaluate_now()
                ended = progress.step == order.total or _has_stopped(progress, config)
                ended = ended and not waits
                keep = config.save_steps and (ended or progress.step % config.save_steps == 0)
                best = better and (config.load_best_model_at_end or config.save_steps)
                keep = keep or best or stop.is_set()
                if keep and (progress.step != saved or evaluated):
                    checkpoint()
                    saved = progress.step
                if ended or stop.is_set():
                    break
                _step(model, optimizer, shares, order, examples, progress, layers, config, log)
                if after_step is not None:
                    after_step()
                optimizer.zero_grad(set_to_none=True)
            if progress.skipped == progress.step > 0:
                raise LorakitError(f"train: none of the {progress.step} steps was finite")
            if ended and config.load_best_model_at_end:
                end_with_the_best(model, output_dir, progress, log)
            save(output_dir)
    return TrainResult(
        output_dir=output_dir,
        steps=progress.step,
        loss=progress.loss,
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(model.device),
        evaluations=progress.evaluations,
        interrupted=not ended,
        skipped_steps=progress.skipped,
        stopped_early=progress.step < order.total and _has_stopped(progress, config),
    )


def _evaluation_is_due(progress: Progress, total: int, config: TrainConfig) -> bool:
    """Of the step that is done, also where the run was interrupted before it."""
    step, done = progress.step, progress.evaluations
    regular = config.eval_steps and step % config.eval_steps == 0
    return step > 0 and (step == total or regular) and not (done and done[-1]["step"] == step)


def _has_stopped(progress: Progress, config: TrainConfig) -> bool:
    patience = config.early_stopping_patience
    return patience is not None and progress.worse_in_a_row >= patience


def _note_evaluation(progress: Progress, result: Mapping[str, float]) -> bool:
    """Whether it is the best one so far."""
    step = progress.step
    progress.evaluations.append({"step": step, **result})
    better = result["loss"] < progress.best_loss
    if better:
        progress.best_step, progress.best_loss, progress.worse_in_a_row = step, result["loss"], 0
    else:
        progress.worse_in_a_row += 1
    return better


# ---- before the first step ----


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


def _few_batches(
    model: Decoder, examples: Examples, config: TrainConfig
) -> Iterator[dict[str, Tensor]]:
    """The rows of the first epoch in batches, padded."""
    lengths = examples.lengths
    for rows in batches(lengths, config.per_device_train_batch_size, config.seed, 0):
        chosen = [examples[row] for row in rows]
        chosen = [e.chosen if isinstance(e, PairExample) else e for e in chosen]
        ids, _ = collate(chosen)
        real = torch.tensor([len(e.input_ids) for e in chosen])[:, None]
        mask = torch.arange(ids.shape[1]) < real
        yield {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _optimizer(model: Decoder, config: TrainConfig) -> tuple[AdamW, list[float]]:
    """The optimizer, and of each of its groups the share of the scheduled rate."""
    ratio, decay = config.loraplus_lr_ratio, config.weight_decay
    if ratio is None:
        groups = decay_groups(model, 1.0, decay)
    else:
        groups = loraplus_groups(model, 1.0, ratio, weight_decay=decay)
    state_bits, paged = OPTIMIZERS[config.optim]
    optimizer = AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        state_bits=state_bits,
        paged=paged,
        page_dir=as_path(config.output_dir),
    )
    return optimizer, [group["lr"] for group in groups]


def _check_validation(validation: Examples | None, config: TrainConfig) -> None:
    """Raise LorakitError for what needs validation rows, where there are none."""
    names = ("eval_metrics", "early_stopping_patience", "load_best_model_at_end")
    for name in names if validation is None else ():
        if getattr(config, name):
            raise LorakitError(f"train: {name} needs validation rows; give data some")
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and config.eval_steps is None:
            raise LorakitError(
                f"train: {name} needs more than the evaluation at the end; set eval_steps"
            )
    if validation is None and config.eval_steps is not None:
        print("eval_steps: there are no validation rows, so nothing is evaluated")


# ---- a step ----


def _step(
    model: Decoder,
    optimizer: AdamW,
    shares: Sequence[float],
    order: Order,
    examples: Examples,
    progress: Progress,
    layers: Mapping[str, Attached],
    config: TrainConfig,
    log: Log,
) -> None:
    """The next one; its gradients stay."""
    started, step = time.perf_counter(), progress.step + 1
    lr = learning_rate(
        config.lr_scheduler_type,
        step - 1,
        order.total,
        config.learning_rate,
        config.warmup_ratio,
        warmup_steps=config.warmup_steps,
        min_lr_ratio=config.min_lr_ratio,
        num_cycles=config.num_cycles,
    )
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        group["lr"] = lr * share
    numbers = order.step(step)
    micro_batches = [[examples[i] for i in rows] for rows in numbers]
    loss = _backward(model, micro_batches, config)
    if step == 1:
        _check_gradients(model, layers)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
    progress.step, progress.loss = step, loss
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
        progress.bad_in_a_row = 0
    else:
        places = [examples.place(i) for rows in numbers for i in rows]
        _skip(model, progress, norm, places, log)

    took = time.perf_counter() - started
    lengths = [[n for example in batch for n in _row_lengths(example)] for batch in micro_batches]
    count = sum(map(sum, lengths))
    computed = count if config.packing else sum(len(n) * max(n) for n in lengths)
    progress.tokens, progress.seconds = progress.tokens + count, progress.seconds + took
    log.step(
        step=step,
        loss=loss,
        learning_rate=lr,
        grad_norm=norm,
        tokens=progress.tokens,
        tokens_per_second=count / took,
        padding=1 - count / computed,
        peak_memory_mb=peak_memory_mb(model.device),
    )


def _row_lengths(example: Example | PairExample) -> list[int]:
    """Of the rows that it takes in a batch."""
    rows = example if isinstance(example, PairExample) else [example]
    return [len(row.input_ids) for row in rows]


def _backward(model: Decoder, micro_batches: list[list[Example]], config: TrainConfig) -> float:
    """Gradients of the mean loss over the step's label tokens, or over its pairs; that mean."""
    if config.objective == "sft":
        labels = (e.labels[1:] for batch in micro_batches for e in batch)
        count = sum(label != IGNORE for each in labels for label in each)
    else:
        count = sum(map(len, micro_batches))
    total = 0.0
    for batch in micro_batches:
        loss, _ = summed_loss(model, batch, config)
        (loss / count).backward()
        total += loss.item()
    return total / count


def _check_gradients(model: Decoder, layers: Mapping[str, Attached]) -> None:
    """An expert may have been chosen by no token yet; every other module has work to do."""
    experts = tuple(f"{n}.experts." for n, m in model.named_modules() if isinstance(m, MoE))
    for name, layer in layers.items():
        for ending, parameter in layer.trained_tensors(layer.selected).items():
            if parameter.grad is None and not name.startswith(experts):
                raise LorakitError(f"train: {name}.{ending} got no gradient; it is not used")


def _skip(
    model: Decoder,
    progress: Progress,
    norm: float,
    places: Sequence[str],
    log: Log,
) -> None:
    """Count a step whose loss or gradient is not finite. Raises LorakitError after too many."""
    progress.skipped += 1
    progress.bad_in_a_row += 1
    grads = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    where = next((n for n, grad in grads if not torch.isfinite(grad).all()), "the loss")
    what = (
        f"step {progress.step} has loss {progress.loss} and gradient norm {norm}, first in "
        f"{where}, on {', '.join(places)}"
    )
    if progress.bad_in_a_row >= BAD_STEPS:
        raise LorakitError(
            f"train: {BAD_STEPS} steps in a row were not finite: {what}; the learning rate may be "
            "too high, or the rows damaged"
        )
    log.say(f"lorakit: skipped: {what}")


# ---- around it ----


@contextmanager
def _training_mode(model: Decoder, config: TrainConfig) -> Iterator[None]:
    """Dropout, gradient checkpointing and noise as the run wants them; as before, afterwards."""
    names = ("gradient_checkpointing", "offload_activations", "neftune_noise_alpha")
    before = model.training, [getattr(model, name) for name in names]
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing
    model.offload_activations = config.activation_offloading
    model.neftune_noise_alpha = config.neftune_noise_alpha
    try:
        yield
    finally:
        model.train(before[0])
        for name, value in zip(names, before[1], strict=True):
            setattr(model, name, value)


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return
    before = {}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
