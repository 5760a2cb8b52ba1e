"""One run of a comparison from its beginning to its numbers: load, train, complete, measure.

It does what `lorakit train` does with the run's file, and ends with the same bytes. Then the model
completes each test row, and the loss of each is taken, for perplexity. A run that is trained
already is loaded from its folder, one that was interrupted goes on from its checkpoint, and what is
known is not computed again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from lorakit.adapters.attach import attach
from lorakit.adapters.new_tokens import add_tokens
from lorakit.adapters.peft_files.load import load_adapter
from lorakit.comparison.grid import GridRun
from lorakit.comparison.record import (
    Record,
    fingerprint,
    predictions_file,
    read_predictions,
    write_record,
)
from lorakit.comparison.rows import TaskRows
from lorakit.config.comparison import BERT_SCORE, ComparisonConfig
from lorakit.config.errors import LorakitError
from lorakit.data.batching import collate, real_tokens
from lorakit.data.examples import Examples, encode_rows
from lorakit.data.schemas import Choice, Row, Text
from lorakit.data.sources import open_data
from lorakit.evaluation.bertscore import bert_score
from lorakit.evaluation.completions import complete_rows, write_completions
from lorakit.evaluation.encoder import TextEncoder, is_encoder, load_encoder
from lorakit.evaluation.score import asked, check_rows
from lorakit.files.local import as_path, write_text
from lorakit.models.decoder import Decoder
from lorakit.models.load import load_model
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import load_tokenizer
from lorakit.training.memory import forget_peak, tune_allocator
from lorakit.training.memory_plan.before import check_run
from lorakit.training.train import TrainResult, train

_ADAPTER, _MODEL = "adapter_config.json", "config.json"


class Job(NamedTuple):
    """A run, what is known of it, and the rows of its task."""

    config: ComparisonConfig
    run: GridRun
    record: Record
    rows: TaskRows
    tested_on: str

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return as_path(self.config.output_dir)

    @property
    def metrics(self) -> list[str]:
        """The metrics of the task's completions."""
        return self.config.tasks[self.run.task].measured_by

    def is_trained(self) -> bool:
        """Whether training is over, or there is none to do."""
        return not self.run.is_trained or self.record.trained is not None

    def is_measured(self) -> bool:
        """Whether everything that the file asks for is known."""
        if not self.is_trained() or not self.is_completed():
            return False
        return BERT_SCORE not in self.metrics or self.encoder() in self.record.similarity

    def is_completed(self) -> bool:
        """Whether the losses of the test rows and their completions are known."""
        if self.record.tested_on != self.tested_on:
            return False
        return not self.metrics or predictions_file(self.folder, self.run.id).exists()

    def encoder(self) -> str:
        """Return the fingerprint of the model that BERTScore compares with."""
        return fingerprint(encoder_of(self.config))


def encoder_of(config: ComparisonConfig) -> str:
    """Return the model that BERTScore compares with."""
    return config.encoder or next(iter(config.models.values()))


def attempt(job: Job, say: Callable[[str], None]) -> tuple[str, str | None]:
    """Make a run. Return its state, finished, failed or stopped, and why it failed."""
    try:
        return ("finished" if do(job, say) else "stopped"), None
    except KeyboardInterrupt:
        return "stopped", None
    except (LorakitError, OSError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"{job.run.id} failed: {reason}")
        return "failed", reason


def do(job: Job, say: Callable[[str], None]) -> bool:
    """Bring a run to its end. Return whether it got there; a signal may stop its training.

    Raises LorakitError, OSError or torch.OutOfMemoryError if the run cannot go on.
    """
    run, record = job.run, job.record
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forget_peak(device)
    tok = load_tokenizer(run.config.model, chat_template=run.config.chat_template)
    tok.add_special_tokens(run.config.add_tokens)
    if not job.is_trained():
        model, result = _train(job, tok, say)
        if result.interrupted:
            return False
        record.trained = _numbers(result)
        write_record(run, record)
    else:
        model = _trained_model(run)
    if not job.is_completed():
        say(f"measuring {run.id} on {len(job.rows.parts['test'])} rows")
        _measure(job, model, tok)
    del model
    if BERT_SCORE in job.metrics and job.encoder() not in record.similarity:
        forget_peak(device)
        _compare_states(job)
    return True


# ---- training ----


def _train(job: Job, tok: Tokenizer, say: Callable[[str], None]) -> tuple[Decoder, TrainResult]:
    """Train a run as `lorakit train` does with the file that is written beside it."""
    run, config = job.run, job.run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "run.yaml", run_file(run))
    data = {
        name: encode_rows(
            rows,
            tok,
            max_seq_length=config.train.max_seq_length,
            over_length=config.train.over_length,
            train_on=config.train.train_on,
        )
        for name, rows in open_data(config.data, skip_empty=config.train.skip_empty).items()
    }
    if line := check_run(config, data["train"].lengths, tok):
        say(line)
    model = _loaded(run)
    if job.metrics:  # a row that cannot be completed should not wait for the end
        check_rows(model, tok, job.rows.parts["test"], ["exact_match"])
    torch.manual_seed(config.train.seed)
    lora = add_tokens(model, tok, config.add_tokens, config.lora) if config.add_tokens else None
    if config.train.train != "full":
        attach(model, lora or config.lora)
    tune_allocator()
    job.record.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, train(model, tok, data, config.train, base_model=config.model, run=config)


def run_file(run: GridRun) -> str:
    """Return the run file of a run, as YAML. `lorakit train` makes the same run of it."""
    return str(yaml.safe_dump(run.values, sort_keys=False, allow_unicode=True, width=100))


def _loaded(run: GridRun) -> Decoder:
    """Return the model of a run as it is."""
    config = run.config
    return load_model(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        offload_weights=config.offload_weights,
    )


def _trained_model(run: GridRun) -> Decoder:
    """Return the model of a run that is trained, or that is not to be."""
    if not run.is_trained:
        return _loaded(run)
    if run.config.train.train == "full":
        return load_model(run.folder, dtype=run.config.dtype)
    model = _loaded(run)
    load_adapter(model, run.folder)
    return model


def _numbers(result: TrainResult) -> dict[str, float]:
    """Return what training did, as numbers."""
    names = ("steps", "tokens", "seconds", "loss", "peak_memory_mb", "skipped_steps")
    values = {name: getattr(result, name) for name in names}
    evaluations = [each["loss"] for each in result.evaluations]
    return values | ({"eval_loss": evaluations[-1]} if evaluations else {})


# ---- measuring ----


def _measure(job: Job, model: Decoder, tok: Tokenizer) -> None:
    """Complete the test rows, take the loss of each, and note both."""
    run, record = job.run, job.record
    test, settings = job.rows.parts["test"], run.config.train
    examples = encode_rows(
        test, tok, max_seq_length=model.config.context_length, train_on=settings.train_on
    )
    tok.check_fits([examples.largest_id], model.config.vocab_size)
    if job.metrics:
        path = predictions_file(job.folder, run.id)
        write_completions(path, complete_rows(model, tok, examples))
    record.losses = losses_of_rows(model, tok, examples)
    tensors = [*model.parameters(), *model.buffers()]
    record.weights_bytes = sum(tensor.nbytes for tensor in tensors)
    record.similarity, record.tested_on = {}, job.tested_on


@torch.no_grad()
def losses_of_rows(
    model: Decoder, tok: Tokenizer, examples: Examples, batch_size: int = 8
) -> list[list[float]]:
    """Return the loss of each row in nats, its label tokens, and the bytes of its answer.

    Rows of like length are computed together. A pair of answers counts by the better one.
    """
    found: dict[int, list[float]] = {}
    ordered = sorted(range(len(examples)), key=examples.lengths.__getitem__)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            rows = [examples[i].answers[0] for i in batch]
            ids, labels = collate(rows)
            mask = real_tokens(rows).to(model.device) if model.config.by_length else None
            sums, counts = model.row_losses(ids.to(model.device), labels, attention_mask=mask)
            for i, loss, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
                found[i] = [loss, count, _answer_bytes(tok, examples.rows[examples.numbers[i]])]
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(examples))]


def _answer_bytes(tok: Tokenizer, row: Row) -> int:
    """Return the bytes of the text that is learned of a row, as UTF-8."""
    row = row.chosen if isinstance(row, Choice) else row
    text = row.text if isinstance(row, Text) else asked(tok, row)[1]
    return len(text.encode(errors="replace"))


def _compare_states(job: Job) -> None:
    """Note BERTScore F1 of each test row, over the hidden states of the comparison's encoder."""
    encoder = encoder_of(job.config)
    texts = read_predictions(predictions_file(job.folder, job.run.id))
    model: Decoder | TextEncoder
    tok: Tokenizer | None = None
    if is_encoder(encoder):
        model = load_encoder(encoder)
    else:
        model = load_model(encoder, dtype=job.run.config.dtype)
        tok = load_tokenizer(encoder)
    references = [text.reference for text in texts]
    scores = bert_score(model, tok, [text.prediction for text in texts], references)
    job.record.similarity[job.encoder()] = scores.f1.tolist()
