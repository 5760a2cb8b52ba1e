"""`train`: fine-tune the adapter of a model on rows, or the model itself.

A run writes into `output_dir`: the adapter and its card, and the chat template that it was trained
with, or the whole tokenizer if that has new tokens or is not the model's; with `train: full` the
model in the place of the adapter; metrics.jsonl, with one line per step (epoch, loss, learning
rate, gradient norm, tokens per second, share of padding, peak memory) and per evaluation; run.json
(record.py); and checkpoints (state.py). What a run does is in run.py, and the parts of a step are
in step.py.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lorakit.adapters.merge import rounding_drift
from lorakit.config.errors import LorakitError
from lorakit.config.run import RunConfig
from lorakit.config.training import TrainConfig
from lorakit.data.examples import Examples
from lorakit.data.rows import RowSource
from lorakit.evaluation.evaluate import encode_for
from lorakit.evaluation.score import check_good, check_rows
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.auto_batch import with_split
from lorakit.training.float8 import check_frozen_dtype
from lorakit.training.interrupt import interrupt
from lorakit.training.kernel_line import kernel_line
from lorakit.training.log import heard, say
from lorakit.training.losses.classification import check_head
from lorakit.training.losses.held_out import HeldOut
from lorakit.training.memory import peak_memory_mb
from lorakit.training.mode import training_mode
from lorakit.training.ranks import Ranks, joined
from lorakit.training.record import recorded, settings_in_effect
from lorakit.training.rollouts.rewards import RewardFunction, check_names
from lorakit.training.run import Run
from lorakit.training.state import only_run_in
from lorakit.training.teaching import source_of_teacher
from lorakit.training.trackers import reporter
from lorakit.training.trainable import trained_part


@dataclass(frozen=True)
class TrainResult:
    """What a run did, from its first step on, also if it was resumed."""

    output_dir: Path
    """The directory that the run wrote to."""
    steps: int
    """Number of optimizer steps."""
    loss: float
    """Loss of the last step, in nats per label token; of pairs, the mean of the objective."""
    tokens: int
    """Number of tokens in all steps, prompts included and padding not."""
    seconds: float
    """Time of all steps, without evaluations and checkpoints."""
    tokens_per_second: float
    """tokens / seconds."""
    peak_memory_mb: float
    """The most memory so far, in MB (see `lorakit.memory.peak_memory_mb`)."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """The results of the evaluations, each with its "step"."""
    interrupted: bool = False
    """Whether Ctrl-C or SIGTERM ended the run."""
    skipped_steps: int = 0
    """Number of steps that were skipped because their loss or gradient was not finite."""
    stopped_early: bool = False
    """Whether early_stopping_patience ended the run before its last step."""
    address: str | None = None
    """The address of the upload; None if none was asked for, or it failed."""
    error: str | None = None
    """Why the run ended by itself among several that went on (`train_many`); None if it did not."""


def train(
    model: Decoder,
    tok: Tokenizer,
    data: RowSource | Examples | Mapping[str, RowSource | Examples],
    config: TrainConfig | None = None,
    *,
    base_model: str | None = None,
    run: RunConfig | None = None,
    after_step: Callable[[], None] | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    teacher: Decoder | None = None,
) -> TrainResult:
    """Train the selected adapter of a model, and save it into `config.output_dir`.

    With `config.train` "full" the weights of the model itself are trained that require gradients,
    which all of a loaded model do, and the whole model is saved.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. Runs with the same
    rows, config and seed end with the same bytes, also if one of them was interrupted and resumed.
    Processes that torchrun has started share the steps of one run, and only the first one writes.

    Args:
        model: A model with an adapter (see `attach`), or a dense one for "full"; in bfloat16 or
            float32.
        tok: The model's tokenizer.
        data: A file of rows or an iterable of them, as `read_rows` takes it, or what `encode_rows`
            made of them with the settings of `config`, or {"train": ..., "validation": ...} of
            such. Each row is read and encoded once, before the first step.
        config: The settings of the run; None takes the defaults.
        base_model: The name of the base model that the adapter's config records.
        run: The settings of the run file, which run.json keeps; None: those of `config` alone.
        after_step: Called after every step, its clipped gradients still there; costs a GPU a wait.
        rewards: For objective "grpo", functions under the names that `config.grpo` gives them:
            f(prompts, completions, **columns) -> a number for each completion.
        teacher: For objective "distillation", a model that is loaded, in the place of the one that
            `config.distillation` names.

    Returns:
        What the run did, as numbers.

    Raises:
        LorakitError: Before the first step, no adapter is attached, or with "full" the model has
            one, is packed, or has no weight left to train; the model is float16, the data cannot be
            used, there is no float8, or output_dir holds checkpoints and resume is null.
            After it, some parameter got no gradient. Later, ten steps in a row were not finite, or
            another process of the run is gone.
    """
    config = config or TrainConfig()
    config = replace(config, learning_rate=config.peak_learning_rate)  # as log and card tell it
    with joined(model.device) as ranks, heard(ranks.is_writer):
        options = config, base_model, run, after_step, rewards or {}, teacher
        return _train(model, tok, data, *options, ranks)


def _train(
    model: Decoder,
    tok: Tokenizer,
    data: RowSource | Examples | Mapping[str, RowSource | Examples],
    config: TrainConfig,
    base_model: str | None,
    run_file: RunConfig | None,
    after_step: Callable[[], None] | None,
    rewards: Mapping[str, RewardFunction],
    teacher: Decoder | None,
    ranks: Ranks,
) -> TrainResult:
    """Train as `train` does, as one of the ranks."""
    check_head(model, config)
    trained = trained_part(model, config)
    check_frozen_dtype(model, config)
    examples, held_out = rows_of(model, tok, data, config)
    check_outputs(config, rewards)
    validation = None if held_out is None else held_out.examples
    rows_of_run = {"the training rows": examples, "the validation rows": validation}
    source = source_of_teacher(model, tok, config, teacher, rows_of_run)
    output_dir = made_directory(config.output_dir)
    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(only_run_in(output_dir)))
        # Asked before the config of rank 0 is that of all; its output_dir and resume hold anyway.
        ranks.agree(lambda: asdict(replace(config, output_dir="", resume=None)))
        named = config.distillation is not None and config.distillation.teacher is not None
        loaded = source if named and isinstance(source, Decoder) else None
        config, split = ranks.first(lambda: with_split(model, examples, config, ranks, loaded))
        if split:
            say(split)
        run = Run(trained, tok, examples, held_out, config, base_model, ranks, rewards, source)
        if ranks.is_writer:
            held.enter_context(recorded_run(run, run_file))
        say(kernel_line(model, max(examples.lengths), config.packing))
        _say_drift(model, "before the next step")
        mode = training_mode(model, config, run.order.largest)
        with mode, run.open_log() as log, interrupt(ranks.grace) as stop:
            run.loop(log, stop, after_step)
            run.end(log)
        _say_drift(model, "after the last step")
        upload = run.publisher.upload
        address = ranks.first(lambda: upload(run.progress, say)) if run.ended else None
    return result_of(run, address)


def _say_drift(model: Decoder, when: str) -> None:
    """Say how far the quantization of a merge-aware adapter moves the logits."""
    drift = rounding_drift(model)
    if drift is not None:
        say(f"quantize_aware, {when}: {drift}")


def recorded_run(run: Run, run_file: RunConfig | None) -> AbstractContextManager[None]:
    """Return what keeps run.json of a run while it goes on."""
    source = run.model.source
    values = {
        "ranks": run.ranks.size,
        "model": run.base_model or (None if source is None else str(source.path)),
        "objective": run.config.objective,
        "total_steps": run.order.total,
        "settings": settings_in_effect(run.config, run_file, run.same),
        "run_file": None if run_file is None else run_file.to_dict(),
    }
    return recorded(run.output_dir, values, lambda: run.ended, say)


def result_of(run: Run, address: str | None) -> TrainResult:
    """Return what a run did, and where its adapter was uploaded to."""
    progress = run.progress
    return TrainResult(
        output_dir=run.output_dir,
        steps=progress.step,
        loss=progress.loss,
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(run.model.device),
        evaluations=progress.evaluations,
        interrupted=not run.ended,
        skipped_steps=progress.skipped,
        stopped_early=run.stopped_early(),
        address=address,
    )


def rows_of(
    model: Decoder,
    tok: Tokenizer,
    data: RowSource | Examples | Mapping[str, RowSource | Examples],
    config: TrainConfig,
) -> tuple[Examples, HeldOut | None]:
    """Return the examples of a run, and its rows for validation if there are any.

    Raises LorakitError if they cannot be used, or the config wants rows that are not there.
    """
    train_rows, validation_rows = _two_sources(data)
    if config.grpo is not None and validation_rows is not None:
        raise LorakitError("train: grpo evaluates on no validation rows yet; leave them out")
    examples = encode_for(model, tok, train_rows, config, "the training rows")
    held_out = None if validation_rows is None else _held_out(model, tok, validation_rows, config)
    _check_validation(held_out, config)
    return examples, held_out


def _two_sources(
    data: RowSource | Examples | Mapping[str, RowSource | Examples],
) -> tuple[RowSource | Examples, RowSource | Examples | None]:
    """Return the rows for training, and those for validation if there are any."""
    if not isinstance(data, Mapping):
        return data, None
    if "train" not in data or not set(data) <= {"train", "validation"}:
        raise LorakitError(
            f"train: data must hold 'train' and maybe 'validation', not {list(data)}"
        )
    return data["train"], data.get("validation")


def _held_out(
    model: Decoder, tok: Tokenizer, source: RowSource | Examples, config: TrainConfig
) -> HeldOut:
    examples = encode_for(model, tok, source, config, "the validation rows")
    check_rows(model, tok, examples.rows, config.eval_metrics)
    check_good(examples.rows, config.eval_metrics)
    if config.eval_samples and not config.eval_metrics:
        check_rows(model, tok, examples.rows[: config.eval_samples], ["exact_match"])
    return HeldOut(examples.rows, examples)


def _check_validation(held_out: HeldOut | None, config: TrainConfig) -> None:
    """Raise LorakitError for a setting that needs validation rows, or more of their evaluations."""
    of_several = {
        "early_stopping_patience": config.early_stopping_patience is not None,
        "load_best_model_at_end": config.load_best_model_at_end,
    }
    of_any = {
        "eval_metrics": bool(config.eval_metrics),
        "eval_samples": config.eval_samples > 0,
        **of_several,
    }
    for name, wanted in of_any.items():
        if wanted and held_out is None:
            raise LorakitError(f"train: {name} needs validation rows; give data some")
    for name, wanted in of_several.items():
        if wanted and config.eval_steps is None:
            raise LorakitError(
                f"train: {name} needs more than the evaluation at the end; set eval_steps"
            )
    if held_out is None and config.eval_steps is not None:
        say("eval_steps: there are no validation rows, so nothing is evaluated")


def check_outputs(config: TrainConfig, rewards: Mapping[str, RewardFunction] | None = None) -> None:
    """Check what a run will write to, as `train` does, before a model is loaded.

    Its rewards are checked too, as far as their names tell: no file of a reward is run.

    Args:
        config: The settings of the run.
        rewards: The functions that `train` will be given.

    Raises:
        LorakitError: The package of a tracker is missing, output_dir is a file, or there is no such
            reward.
    """
    if config.grpo is not None:
        check_names(config.grpo.rewards, rewards or {})
    reporter.check_trackers(config.trackers)
    output_dir = as_path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise LorakitError(f"train: output_dir {output_dir} is a file; choose another name")


def made_directory(name: str) -> Path:
    """Make the output_dir of a run. Raises LorakitError if that cannot be."""
    output_dir = as_path(name)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(
            f"train: output_dir {output_dir} cannot be made ({error.strerror}); choose another name"
        ) from None
    return output_dir
