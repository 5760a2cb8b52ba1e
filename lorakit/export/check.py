"""A written GGUF file, read back and run beside the model that it was made of.

    model, in fp32     text -> log p    greedy text of some prompts
    file, dequantized  text -> log q    the same text under its eyes: where does it go another way?
    base of an adapter text -> log b

    KL     mean over positions of sum_v p_v (log p_v - log q_v), in nats
    top-1  share of the positions at which p and q have the same likeliest token
    kept   (loss of b - loss of q) / (loss of b - loss of p): what is left of the training

Weights are read one block at a time (blockwise.py), so a model of any size is checked in the memory
of a block, the head and the logits of the rows. Greedy text would read all weights again for each
token: it is made only while twice the model's fp32 weights are free.

The reader is lorakit's own, which computes in fp32. llama.cpp rounds activations too, to 8 bits for
most formats. If the package xllamacpp is installed, it continues the prompts as well (runtime.py).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.manage import disable_adapters, selected_adapter
from lorakit.config.errors import LorakitError, check
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import IGNORE, Example
from lorakit.data.examples import encode_rows
from lorakit.data.rows import RowSource, read_rows
from lorakit.export.blockwise import fp32_bytes, free_bytes, run_blockwise, whole_model
from lorakit.export.runtime import continue_in_llama_cpp
from lorakit.export.sample import CHAT, TEXTS
from lorakit.export.weights import DenseModel, dense_model
from lorakit.files.hub import fetch_adapter
from lorakit.files.local import as_path
from lorakit.inference.generate import continue_text
from lorakit.inference.sampling import Sampling
from lorakit.inference.text import end_tokens
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import adapted_tokenizer, load_tokenizer

log = logging.getLogger("lorakit")

_LONGEST = 256  # tokens of a row
_ROWS = 32
_PROMPTS, _PROMPT, _NEW = 4, 64, 24  # greedy texts: how many, tokens before, tokens after
_KEPT = 0.8  # below it a warning
_LEARNED = 0.02  # nats; a smaller gain is not told from noise
_PART = 64  # positions whose probabilities are compared at a time, in fp64


@dataclass(frozen=True)
class ExportCheck:
    """How near a written file comes to its model; it prints as a table."""

    file: Path
    """The file."""
    size: int
    """Its size in bytes."""
    tokens: int
    """The number of positions that were compared."""
    divergence: float
    """The mean Kullback-Leibler divergence from the model to the file, in nats."""
    same_first: int
    """The number of positions at which the likeliest token is the same."""
    loss: float
    """The model's mean loss, in nats."""
    file_loss: float
    """The file's mean loss, in nats."""
    base_loss: float | None
    """The mean loss without the adapter; None if there is none, or no rows were given."""
    greedy: list[tuple[int, int]]
    """How many tokens of each greedy text the file begins it with, and how many there are."""
    in_llama_cpp: list[tuple[int, int]]
    """The same of the file in llama.cpp; empty if it was not run."""
    differs: list[str]
    """What of the tokenizer differs: sentences, none if all is the same."""
    skipped: list[str]
    """What was not checked, and why."""

    @property
    def kept(self) -> float | None:
        """The share of what the adapter learned that the file keeps; None if it is not known."""
        if self.base_loss is None or not self.base_loss - self.loss >= _LEARNED:
            return None
        return (self.base_loss - self.file_loss) / (self.base_loss - self.loss)

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the file: sentences, none if nothing is."""
        found = list(self.differs)
        if not math.isfinite(self.divergence):
            found.append("the file computes NaN or infinity")
        if self.kept is not None and self.kept < _KEPT:
            kept = f"{100 * self.kept:.0f} %" if self.kept > 0 else "nothing"
            found.append(
                f"the file keeps {kept} of what the adapter learned: choose a format with more "
                "bits, or give an importance matrix if there is none"
            )
        return found

    def __str__(self) -> str:
        first, file = math.exp(min(self.loss, 700)), math.exp(min(self.file_loss, 700))
        lines = [
            f"{self.file}: {self.size / 1e6:,.1f} MB, read back and run on {self.tokens} tokens",
            f"  KL divergence    {self.divergence:.4g} nats",
            f"  same top token   {100 * self.same_first / self.tokens:.1f} %",
            f"  perplexity       {file:.3f}, the model's {first:.3f}",
        ]
        if self.base_loss is not None:
            kept = "too little was learned on these rows to tell"
            if self.kept is not None:
                kept = f"{100 * self.kept:.1f} % of what was learned"
            base = math.exp(min(self.base_loss, 700))
            lines.append(f"  kept             {kept}; without the adapter {base:.3f}")
        for name, texts in (("greedy text", self.greedy), ("in llama.cpp", self.in_llama_cpp)):
            if texts:
                lines.append(f"  {name:<16} {_greedy(texts)}")
        if not self.differs:
            lines.append("  tokenizer        the same tokens, chat and stop tokens")
        lines += [f"  not checked: {each}" for each in self.skipped]
        return "\n".join(lines)


def _greedy(texts: list[tuple[int, int]]) -> str:
    whole = sum(same == length for same, length in texts)
    said = f"{whole} of {len(texts)} are the model's to the end"
    others = [same for same, length in texts if same < length]
    if others:
        said += f", the others for {sum(others) / len(others):.1f} tokens in the mean"
    return said


def check_export(
    file: str | Path,
    model: Decoder | str | Path,
    adapter: str | Path | None = None,
    *,
    rows: RowSource | None = None,
    tokenizer: Tokenizer | None = None,
    tokens: int = 1024,
) -> ExportCheck:
    """Read a written GGUF file back, run it, and compare it with the model that it was made of.

    Warnings of the logger "lorakit" say what is wrong.

    Args:
        file: The .gguf file.
        model: The model that `export_gguf` wrote: a directory, a .gguf file, a Hub id, or a model
            in memory, with the adapter that is selected in it.
        adapter: The directory, .gguf file or Hub id of an adapter of a model in files.
        rows: A file of rows or an iterable of them, as `read_rows` takes it, best such that the
            training did not see. Their answers are compared, and how much of the training is left.
            None takes a short text of lorakit's own.
        tokenizer: The tokenizer that was written. None takes the adapter's, or else the model's.
        tokens: The most tokens to run, the padding included; one row is run in any case.

    Returns:
        The figures, which print as a table.

    Raises:
        LorakitError: The file, the model, the adapter or the rows cannot be read, the file is of
            another model, or tokens is below 1.
    """
    check(isinstance(tokens, int) and tokens > 0, "check_export: tokens must be at least 1")
    file = as_path(file)
    adapter = None if adapter is None else fetch_adapter(adapter)
    ours, theirs = dense_model(model, adapter), dense_model(file, None)
    _check_same(file, ours, theirs)
    tok = _tokenizer(ours, adapter) if tokenizer is None else tokenizer
    longest = min(_LONGEST, ours.config.context_length, theirs.config.context_length)
    texts = _texts(tok, rows, longest, tokens)
    tok.check_fits([_largest_id(texts)], ours.config.vocab_size)
    skipped, prompts, answers = list[str](), _prompts(texts, longest), list[list[int]]()
    if 2 * fp32_bytes(ours) > free_bytes():
        skipped.append("greedy text, which would need twice the model's memory in fp32")
    elif prompts:
        answers = _answers(ours, tok, prompts)
    compared = _compared(ours, theirs, texts, prompts, answers)
    chat = _chat(tok)
    found = ExportCheck(
        file,
        file.stat().st_size,
        **compared._asdict(),
        base_loss=None if rows is None else _base_loss(model, adapter, texts),
        in_llama_cpp=[],
        differs=_differences(tok, load_tokenizer(file), ours, theirs, chat),
        skipped=skipped,
    )
    found = _with_llama_cpp(found, prompts, answers, chat)
    for each in found.warnings:
        log.warning("lorakit: %s: %s", file, each)
    return found


def _check_same(file: Path, ours: DenseModel, theirs: DenseModel) -> None:
    """Raise LorakitError if a file has other tensors than the model."""
    for name, tensor in ours.tensors.items():
        shape = theirs.tensors[name].shape if name in theirs.tensors else None
        if shape != tensor.shape and not (shape is None and name == "lm_head.weight"):
            raise LorakitError(
                f"{file} was not made of this model: its {name} is {shape}, the model's "
                f"{tuple(tensor.shape)}"
            )


# ---- what is run --------------------------------------------------------------------------------


def _tokenizer(dense: DenseModel, adapter: str | Path | None) -> Tokenizer:
    """Return the tokenizer that `export_gguf` writes."""
    if dense.path is None:
        raise LorakitError("check_export: the model was not loaded from a file; give its tokenizer")
    return adapted_tokenizer(dense.path, adapter)


def _texts(tok: Tokenizer, rows: RowSource | None, longest: int, tokens: int) -> list[Example]:
    """Return the rows to compare on, as many as a batch of so many tokens takes."""
    source: Sequence[Any] = [{"text": text} for text in TEXTS]
    if rows is not None:
        found = read_rows(rows, skip_empty=True)
        step = max(1, len(found) // _ROWS)  # from all over a sorted file
        source = [found[i] for i in islice(range(0, len(found), step), _ROWS)]
    examples = encode_rows(source, tok, max_seq_length=longest, skip_empty=True)
    chosen = [example.answers[0] for example in examples]
    texts: list[Example] = []
    widest = 0
    for each in chosen:
        widest = max(widest, len(each.input_ids))
        if texts and widest * (len(texts) + 1) > tokens:
            break
        texts.append(each)
    check(any(map(_labels, texts)), "check_export: the rows hold no token to predict")
    return texts


def _largest_id(texts: list[Example]) -> int:
    return max(max(each.input_ids) for each in texts)


def _prompts(texts: list[Example], longest: int) -> list[list[int]]:
    """Return what greedy text begins with: of a row what precedes its answer, of a text half."""
    prompts = []
    for ids, labels in texts[:_PROMPTS]:
        first = next(t for t, label in enumerate(labels) if label != IGNORE)
        start = ids[: first if first > 1 else len(ids) // 2][-_PROMPT:]
        if start and len(start) + _NEW <= longest:
            prompts.append(start)
    return prompts


def _answers(dense: DenseModel, tok: Tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    """Return the model's greedy text after each prompt, up to the token that ends it."""
    model = whole_model(dense)
    ends = end_tokens(model, tok, [])
    with torch.no_grad():
        columns = list(continue_text(model, prompts, _NEW, Sampling(), None))
    answers = []
    for answer in map(list, zip(*columns, strict=True)):
        end = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        answers.append(answer[:end])
    return answers


class _Compared(NamedTuple):
    """What two models make of the same rows; see `ExportCheck`."""

    tokens: int
    divergence: float
    same_first: int
    loss: float
    file_loss: float
    greedy: list[tuple[int, int]]


@torch.no_grad()
def _compared(
    ours: DenseModel,
    theirs: DenseModel,
    texts: list[Example],
    prompts: list[list[int]],
    answers: list[list[int]],
) -> _Compared:
    """Run the model on rows, and the file on the same rows and on the model's own greedy text."""
    told = [Example(p + a, [IGNORE] * len(p) + a) for p, a in zip(prompts, answers, strict=False)]
    model, hidden, targets = run_blockwise(ours, texts)
    logits = torch.cat([model.head(part) for part in hidden.split(_PART)])
    model, hidden, all_targets = run_blockwise(theirs, texts + told)
    sums = torch.zeros(4, dtype=torch.float64)  # KL, same first, both losses
    count = len(targets)
    parts = (each.split(_PART) for each in (logits, hidden[:count], targets))
    for mine, h, target in zip(*parts, strict=True):
        p, q = mine.double().log_softmax(-1), model.head(h).double().log_softmax(-1)
        same = p.argmax(-1) == q.argmax(-1)
        losses = [-each.gather(-1, target[:, None]).sum() for each in (p, q)]
        sums += torch.stack([(p.exp() * (p - q)).sum(), same.sum(), *losses])
    greedy = []
    if told:
        first = model.head(hidden[count:]).argmax(-1) == all_targets[count:]
        greedy = [_begun(part) for part in first.split([_labels(each) for each in told])]
    divergence, same_first, loss, file_loss = sums.tolist()
    return _Compared(
        count, divergence / count, int(same_first), loss / count, file_loss / count, greedy
    )


def _begun(same: Tensor) -> tuple[int, int]:
    """Return how many of a text's first tokens are the same, and how many it has."""
    return int(same.long().cumprod(0).sum()), len(same)


def _labels(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels[1:])


@torch.no_grad()
def _base_loss(
    model: Decoder | str | Path, adapter: str | Path | None, texts: list[Example]
) -> float | None:
    """Return the mean loss of rows without the adapter.

    None if there is no adapter, or the rows hold tokens that it has brought along. A model in
    memory computes it itself, in its own dtype.
    """
    if not isinstance(model, Decoder):
        return None if adapter is None else _loss(dense_model(model, None), texts)
    if selected_adapter(model) is None:
        return None
    ids, labels = collate(texts)
    mask = real_tokens(texts).to(model.device) if model.config.by_length else None
    was_training = model.training
    model.eval()
    try:
        with disable_adapters(model):
            total, count = model.loss(ids.to(model.device), labels, attention_mask=mask)
    finally:
        model.train(was_training)
    return float(total / count)


def _loss(dense: DenseModel, texts: list[Example]) -> float | None:
    """Return a model's mean loss of rows, or None if they hold tokens that it does not have."""
    if _largest_id(texts) >= dense.config.vocab_size:
        return None
    model, hidden, targets = run_blockwise(dense, texts)
    total = torch.zeros((), dtype=torch.float64)
    for h, target in zip(hidden.split(_PART), targets.split(_PART), strict=True):
        log_p = model.head(h).double().log_softmax(-1)
        total -= log_p.gather(-1, target[:, None]).sum()
    return float(total) / len(targets)


# ---- tokens -------------------------------------------------------------------------------------


def _chat(tok: Tokenizer) -> list[int] | None:
    """Return the tokens of a short chat, or None if the template does not take it."""
    try:
        return tok.apply_chat_template(CHAT, add_generation_prompt=True)
    except LorakitError:
        return None


def _differences(
    tok: Tokenizer, read: Tokenizer, ours: DenseModel, theirs: DenseModel, chat: list[int] | None
) -> list[str]:
    """Return what of the file's tokenizer differs from the model's, in sentences."""
    found = []
    if any(tok.encode(text) != read.encode(text) for text in TEXTS):
        found.append("the file's tokenizer gives other tokens for a text")
    if chat != _chat(read):
        found.append("the file's chat template gives other tokens for a chat")
    ends = {*ours.config.eos_token_ids, *tok.end_token_ids}
    missing = ends - {*theirs.config.eos_token_ids, *read.end_token_ids}
    if missing:
        said = ", ".join(repr(tok.backend.id_to_token(token)) for token in sorted(missing))
        found.append(f"the file does not stop at {said}, as the model does")
    return found


def _with_llama_cpp(
    found: ExportCheck, prompts: list[list[int]], answers: list[list[int]], chat: list[int] | None
) -> ExportCheck:
    """Add what llama.cpp makes of the file, or why it was not run."""
    threads = torch.get_num_threads()
    run = continue_in_llama_cpp(found.file, prompts, CHAT, _NEW, threads)
    if isinstance(run, str):
        return replace(found, skipped=[*found.skipped, run])
    differs = list(found.differs)
    if chat is not None and run.chat is not None and run.chat[1:] == chat:
        differs.append("llama.cpp begins a chat with a BOS token, which the chat template does not")
    elif chat is not None and run.chat != chat:
        differs.append("llama.cpp renders a chat as other tokens than the model's template")
    begun = []
    for ours, theirs in zip(answers, run.texts, strict=False):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        begun.append((min(len(ours), len(theirs)) if same is None else same, len(ours)))
    return replace(found, in_llama_cpp=begun, differs=differs)
