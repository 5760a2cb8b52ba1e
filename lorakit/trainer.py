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

import json
import math
import random
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import run_state
from .adapter import save_adapter
from .attached import Attached, attached
from .config import METRICS, OPTIMIZERS, LorakitError, TrainConfig
from .data import (
    IGNORE,
    Example,
    PairExample,
    batches,
    collate,
    encode_rows,
    lengths_of,
)
from .eva_initialization import eva
from .files import write_text
from .loftq_initialization import loftq
from .lora import LoraPart
from .memory import peak_memory_mb
from .model import Decoder, MoE
from .optim import AdamW, decay_groups, learning_rate, loraplus_groups
from .packing import collate_packed, pack
from .preference import pair_losses
from .rows import read_rows
from .scoring import check_rows, score_rows
from .tokenizer import Tokenizer

Rows = str | Path | Iterable[Mapping[str, Any]]
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


@dataclass
class _Progress:
    """What a run has come to; saved with its checkpoints."""

    step: int = 0
    loss: float = math.nan
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    worse_in_a_row: int = 0  # evaluations since the best one


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
    examples = _encode(model, tok, data["train"], config)
    validation = None
    if data.get("validation") is not None:
        held_out = read_rows(data["validation"])
        validation = _encode(model, tok, held_out, config)
        check_rows(model, tok, held_out, config.eval_metrics)
    elif config.eval_metrics:
        raise LorakitError("train: eval_metrics scores validation rows; give data some")
    output_dir = Path(config.output_dir).expanduser()
    if output_dir.exists() and not output_dir.is_dir():
        raise LorakitError(f"train: output_dir {output_dir} is a file; choose another name")
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed = _resumed(output_dir, config)
    torch.manual_seed(config.seed)  # dropout
    _start_adapter(model, examples, config)
    layers = _trainable_layers(model)  # EVA may have left some out
    optimizer, shares = _optimizer(model, config)
    order, same = _Order(examples, config), _must_match(examples, config)
    progress = _Progress()
    if resumed is not None:
        values = run_state.restore(resumed, model, optimizer, model.device)
        run_state.check_same(resumed.path, values["same"], same)
        progress = _Progress(**values["progress"])
        print(f"resumed from {resumed.path}")

    def save(path: Path) -> None:
        save_adapter(model, path, base_model=base_model)

    def checkpoint() -> None:
        tensors = run_state.trained_tensors(model) | run_state.optimizer_tensors(optimizer)
        tensors |= run_state.random_tensors(model.device)
        values = {"progress": asdict(progress), "same": same}
        values["groups"] = run_state.group_values(optimizer)
        try:
            run_state.write_checkpoint(output_dir, progress.step, tensors, values, save)
        except OSError as error:
            log.say(
                f"lorakit: the checkpoint of step {progress.step} could not be written "
                f"({error.strerror or error}); earlier ones are whole"
            )
            return
        run_state.prune(output_dir, config.save_total_limit, progress.best_step)

    stopped = False
    with (
        _training_mode(model, config),
        _Log(output_dir, order.total, progress.step, config) as log,
        _interrupt() as stop,
    ):
        while progress.step < order.total and not (stop.is_set() or stopped):
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
            micro_batches = order.step(step)
            loss = _backward(model, [[examples[i] for i in rows] for rows in micro_batches], config)
            if step == 1:
                _check_gradients(model, layers)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
            progress.step, progress.loss = step, loss
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                progress.bad_in_a_row = 0
            else:
                _skip(model, progress, norm, micro_batches, log)
            if after_step is not None:
                after_step()
            optimizer.zero_grad(set_to_none=True)

            took = time.perf_counter() - started
            lengths = [[len(examples[i].input_ids) for i in rows] for rows in micro_batches]
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
            last = step == order.total
            if (stop.is_set() or last) and progress.skipped < step:
                save(output_dir)  # before an evaluation that may be cut short
            due = last or (config.eval_steps and step % config.eval_steps == 0)
            better = False
            if validation and due and not stop.is_set():
                size = config.per_device_train_batch_size
                result = _evaluate(model, validation, size, config)
                result |= score_rows(model, tok, held_out, config.eval_metrics, size)
                log.evaluation(step, result)
                better = _note_evaluation(progress, step, result)
                patience = config.early_stopping_patience
                stopped = patience is not None and progress.worse_in_a_row >= patience
            regular = config.save_steps and (step % config.save_steps == 0 or last)
            wanted = better and (config.load_best_model_at_end or config.save_steps)
            if stop.is_set() or regular or wanted or (stopped and config.save_steps):
                checkpoint()
        interrupted = stop.is_set()
        if progress.skipped == progress.step > 0:
            raise LorakitError(f"train: none of the {progress.step} steps was finite")
        if not interrupted:
            best = progress.best_step
            if config.load_best_model_at_end and best not in (None, progress.step):
                _restore_adapter(model, output_dir / f"checkpoint-{best}")
                log.say(f"the adapter is that of step {best}, the best evaluation")
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
        interrupted=interrupted,
        skipped_steps=progress.skipped,
        stopped_early=stopped,
    )


def evaluate(
    model: Decoder,
    tok: Tokenizer,
    data: Rows,
    *,
    batch_size: int = 8,
    max_seq_length: int = 1024,
    over_length: str = "truncate",
    train_on: str = "completion",
    metrics: str | Iterable[str] = (),
) -> dict[str, float]:
    """Loss (nats per label token), perplexity, and the numbers of label tokens and rows.

    metrics: what to score the model's own completions by, of the names in metrics.py. Every row
    is completed greedily, after its whole prompt, whatever over_length says. Raises LorakitError
    for an unknown name, and a prompt that leaves no room for a completion.
    """
    config = TrainConfig(max_seq_length=max_seq_length, over_length=over_length, train_on=train_on)
    rows, metrics = read_rows(data), [metrics] if isinstance(metrics, str) else list(metrics)
    examples = _encode(model, tok, rows, config)
    check_rows(model, tok, rows, metrics)
    result = _evaluate(model, examples, batch_size)
    return result | score_rows(model, tok, rows, metrics, batch_size)


@torch.no_grad()
def _evaluate(
    model: Decoder, examples: Sequence[Example], batch_size: int, config: TrainConfig | None = None
) -> dict[str, float]:
    """Of rows the mean loss over their label tokens; of pairs over the pairs, with `config`'s
    objective.
    """
    plain = TrainConfig() if config is None else config
    plain = replace(plain, packing=False, label_smoothing_factor=0.0, z_loss=0.0)
    total, count = 0.0, 0
    lengths = lengths_of(examples)
    ordered = sorted(range(len(examples)), key=lengths.__getitem__)
    starts = range(0, len(ordered), batch_size)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(starts, desc="evaluating", unit="batch", disable=None, leave=False):
            batch = [examples[i] for i in ordered[start : start + batch_size]]
            loss, n = _summed_loss(model, batch, plain)
            total, count = total + loss.item(), count + n.item()
    finally:
        model.train(was_training)
    if plain.objective != "sft":
        pairs = len(examples)
        return {"loss": total / pairs, "preference_accuracy": count / pairs, "rows": pairs}
    mean = total / count
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),  # beyond lies infinity
        "label_tokens": count,
        "rows": len(examples),
    }


def _note_evaluation(progress: _Progress, step: int, result: Mapping[str, float]) -> bool:
    """Whether it is the best one so far."""
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


def _start_adapter(model: Decoder, examples: Sequence[Example], config: TrainConfig) -> None:
    """Where init_lora_weights is "loftq" or "eva" and nobody has done it yet."""
    parts = [each.adapters[each.selected] for each in _trainable_layers(model).values()]
    awaited = {part.awaits for part in parts if isinstance(part, LoraPart)}
    if "loftq" in awaited:
        print(loftq(model))
    if "eva" in awaited:
        was_training = model.training
        model.eval()
        print(eva(model, _few_batches(model, examples, config)))
        model.train(was_training)


def _few_batches(
    model: Decoder, examples: Sequence[Example], config: TrainConfig
) -> Iterator[dict[str, Tensor]]:
    """The rows of the first epoch in batches, padded."""
    lengths = lengths_of(examples)
    for rows in batches(lengths, config.per_device_train_batch_size, config.seed, 0):
        chosen = [examples[row] for row in rows]
        chosen = [e.chosen if isinstance(e, PairExample) else e for e in chosen]
        ids, _ = collate(chosen)
        real = torch.tensor([len(e.input_ids) for e in chosen])[:, None]
        mask = torch.arange(ids.shape[1]) < real
        yield {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _encode(model: Decoder, tok: Tokenizer, rows: Rows, config: TrainConfig) -> Sequence[Example]:
    examples = encode_rows(
        read_rows(rows),
        tok,
        max_seq_length=config.max_seq_length,
        over_length=config.over_length,
        train_on=config.train_on,
    )
    tok.check_fits((i for e in examples for i in e.input_ids), model.config.vocab_size)
    if isinstance(examples[0], PairExample) != (config.objective != "sft"):
        raise LorakitError(
            f"objective {config.objective!r} does not fit the rows: dpo and orpo need `chosen` and "
            "`rejected`, sft rows without them"
        )
    return examples


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
        page_dir=Path(config.output_dir).expanduser(),
    )
    return optimizer, [group["lr"] for group in groups]


class _Order:
    """Which rows each step takes: a function of the seed, the lengths and the step."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig):
        self.lengths, self.config = lengths_of(examples), config
        self.packs = None
        if config.packing:
            size = config.per_device_train_batch_size * config.max_seq_length
            size *= 1 if config.objective == "sft" else 2  # a pair is two rows
            self.packs = pack(self.lengths, size)
        self.epoch, self.micro_batches = -1, []
        self._load(0)
        self.per_epoch = math.ceil(len(self.micro_batches) / config.gradient_accumulation_steps)
        self.total = config.max_steps or math.ceil(config.num_train_epochs * self.per_epoch)

    def _load(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch, config = epoch, self.config
        if self.packs is None:
            size = config.per_device_train_batch_size
            self.micro_batches = batches(self.lengths, size, config.seed, epoch)
        else:
            self.micro_batches = list(self.packs)
            random.Random(f"{config.seed}/{epoch}").shuffle(self.micro_batches)

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of step 1, 2, ...: row numbers."""
        epoch, i = divmod(step - 1, self.per_epoch)
        self._load(epoch)
        accumulate = self.config.gradient_accumulation_steps
        return self.micro_batches[i * accumulate : (i + 1) * accumulate]


def _must_match(examples: Sequence[Example], config: TrainConfig) -> dict[str, Any]:
    """What a run that goes on from a checkpoint shares with the one that made it: of the rows all
    lengths and, lest a large file be read once more, a thousand of them.
    """
    data = blake2b(array("l", lengths_of(examples)).tobytes(), digest_size=16)
    for i in range(0, len(examples), max(1, len(examples) // 1000)):
        data.update(json.dumps(examples[i]).encode())
    names = (
        "seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "packing",
        "optim",
    )
    return {name: getattr(config, name) for name in names} | {"data": data.hexdigest()}


def _resumed(output_dir: Path, config: TrainConfig) -> run_state.Checkpoint | None:
    """The checkpoint to go on from, or None to start."""
    run_state.remove_unfinished(output_dir)
    found = run_state.checkpoints(output_dir)
    if config.resume is None:
        if found:
            raise LorakitError(
                f"train: {output_dir} holds checkpoints of an earlier run; set resume to auto to "
                "go on from the last one, or choose another output_dir"
            )
        return None
    if config.resume == "auto":
        return found[-1] if found else None
    path = Path(config.resume).expanduser()
    asked = [each for each in run_state.checkpoints(path.parent) if each.path == path]
    if not asked:
        raise LorakitError(f"train: resume: {path} is no checkpoint of a run")
    return asked[0]


def _restore_adapter(model: Decoder, path: Path) -> None:
    tensors = run_state.read_adapter(path)
    with torch.no_grad():
        for name, tensor in run_state.trained_tensors(model).items():
            tensor.copy_(tensors[name].read())


# ---- a step ----


def _backward(model: Decoder, micro_batches: list[list[Example]], config: TrainConfig) -> float:
    """Gradients of the mean loss over the step's label tokens, or over its pairs; that mean."""
    if config.objective == "sft":
        labels = (e.labels[1:] for batch in micro_batches for e in batch)
        count = sum(label != IGNORE for each in labels for label in each)
    else:
        count = sum(map(len, micro_batches))
    total = 0.0
    for batch in micro_batches:
        loss, _ = _summed_loss(model, batch, config)
        (loss / count).backward()
        total += loss.item()
    return total / count


def _summed_loss(
    model: Decoder, batch: Sequence[Example | PairExample], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """The summed loss of a batch, and how many label tokens it has, or of pairs how many the model
    has the right way round.
    """
    pairs = config.objective != "sft"
    if pairs:
        batch = [e.chosen for e in batch] + [e.rejected for e in batch]
    ids, labels, *bounds = collate_packed(batch) if config.packing else collate(batch)
    where = {"cu_seqlens": bounds[0] if bounds else None}
    inputs = ids.to(model.device), labels.to(model.device)
    smoothing = config.label_smoothing_factor
    if not pairs:
        form = {"label_smoothing": smoothing, "z_loss": config.z_loss}
        return model.loss(*inputs, **where, **form)
    form = {"objective": config.objective, "beta": config.beta, "label_smoothing": smoothing}
    losses, prefers = pair_losses(model, *inputs, **where, **form)
    return losses.sum(), prefers.sum()


def _check_gradients(model: Decoder, layers: Mapping[str, Attached]) -> None:
    """An expert may have been chosen by no token yet; every other module has work to do."""
    experts = tuple(f"{n}.experts." for n, m in model.named_modules() if isinstance(m, MoE))
    for name, layer in layers.items():
        for ending, parameter in layer.tensors(layer.selected).items():
            if parameter.grad is None and not name.startswith(experts):
                raise LorakitError(f"train: {name}.{ending} got no gradient; it is not used")


def _skip(
    model: Decoder,
    progress: _Progress,
    norm: float,
    micro_batches: list[list[int]],
    log: "_Log",
) -> None:
    """Count a step whose loss or gradient is not finite. Raises LorakitError after too many."""
    progress.skipped += 1
    progress.bad_in_a_row += 1
    grads = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    where = next((n for n, grad in grads if not torch.isfinite(grad).all()), "the loss")
    rows = ", ".join(str(row) for batch in micro_batches for row in batch)
    what = (
        f"step {progress.step} has loss {progress.loss} and gradient norm {norm}, first in "
        f"{where}, on the rows {rows} (from 0 on)"
    )
    if progress.bad_in_a_row >= BAD_STEPS:
        raise LorakitError(
            f"train: {BAD_STEPS} steps in a row were not finite: {what}; the learning rate may be "
            "too high, or the rows damaged"
        )
    log.say(f"lorakit: skipped: {what}")


# ---- around it ----


class _Log:
    """metrics.jsonl, and beside it a progress bar, or plain lines where there is no terminal."""

    def __init__(self, output_dir: Path, total: int, done: int, config: TrainConfig):
        path = output_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= done]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=None)
        self.total, self.board = total, None
        if config.report_to == "tensorboard":
            self.board = _board(output_dir, done)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()

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
        scores = "".join(f", {n} {v:.4f}" for n, v in result.items() if n in METRICS)
        self.say(f"step {step}/{self.total}: validation loss {result['loss']:.4f}{scores}")

    def say(self, line: str) -> None:
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def _write(self, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(name, value, values["step"])


def _lines(path: Path) -> list[str]:
    """The whole lines of a file of JSON lines; a run that was killed may have cut the last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def _board(output_dir: Path, done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LorakitError(
            "report_to: tensorboard is not installed; pip install 'lorakit[tensorboard]'"
        ) from None
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=done + 1)


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
