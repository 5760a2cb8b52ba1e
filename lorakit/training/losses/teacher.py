"""The teacher of a run, and the loss of a batch by what it makes of the rows.

A teacher is another model, which computes each batch before the model does; the model itself as it
was before the first step; or a file with the most likely tokens of a teacher that is not loaded:

    rows        uint8 [R, 16]     a digest of the tokens and labels of each row
    starts      int64 [R + 1]     where the positions of each row begin, and the last ones end
    words       int32 [N, k]      the k most likely tokens at each position that predicts a label
    log_probs   fp32 [N, k + 1]   the logarithms of their probabilities, and of that of all others;
                                  [N, k] if k is the vocabulary
    vocabulary  int64 []          the tokens that share all probability
    temperature fp32 []           which the probabilities are at

A row is found by its digest, so the file serves rows in any order, for training and validation.
The logits of model and teacher exist for a chunk of positions at a time (label_logits.py). Tokens
that only one of the two models has a row for, as of a padded embedding, are left out.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit import kernels
from lorakit.config.distillation import DistillationConfig
from lorakit.config.errors import LorakitError, check
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import IGNORE, Example
from lorakit.data.examples import Examples
from lorakit.files.local import as_path
from lorakit.files.safetensors import open_safetensors, write_safetensors
from lorakit.models.decoder import Decoder
from lorakit.models.label_logits import label_states, summed_over_logits
from lorakit.training.late import Late
from lorakit.training.losses.distillation import (
    distillation_loss,
    known_of,
    log_softmax,
    top_k_distillation_loss,
)
from lorakit.training.losses.reference import Reference
from lorakit.training.mode import evaluation_mode

TENSORS = ("rows", "starts", "words", "log_probs", "vocabulary", "temperature")

OfLogits = Callable[[Tensor, slice], Tensor]
"""f(logits [n, V], which of all positions they are) -> divergences, fp32 [n]."""


class TaughtBatch:
    """What a batch has of its teacher: the digests of its rows, and what the run tells of it."""

    def __init__(self, rows: Sequence[Example]):
        self.digests = [digest(row) for row in rows]
        self.told: Late | None = None  # summed divergence and loss of the labels, and their number


def digest(row: Example) -> bytes:
    """Return 16 bytes that stand for the tokens and labels of a row."""
    numbers = array("i", [*row.input_ids, *row.labels])
    return blake2b(numbers.tobytes(), digest_size=16).digest()


class TopTokens:
    """The most likely tokens of a teacher, in a file that `save_teacher_logits` wrote.

    Args:
        path: The file.

    Raises:
        LorakitError: It is not there, damaged, or no such file.
    """

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        if not self.path.is_file():
            raise LorakitError(
                f"distillation: {path} is not there; `lorakit teach run.yaml` writes it"
            )
        found = open_safetensors(self.path)
        if set(found) != set(TENSORS):
            raise LorakitError(
                f"distillation: {path} does not hold a teacher's tokens; `lorakit teach run.yaml` "
                "writes such a file"
            )
        rows = found["rows"].read().numpy()
        self._starts: list[int] = found["starts"].read().tolist()
        self._numbers = {row.tobytes(): i for i, row in enumerate(rows)}
        self._words, self._log_probs = found["words"].read(), found["log_probs"].read()
        self.vocabulary = int(found["vocabulary"].read())
        self.temperature = float(found["temperature"].read())
        whole = len(rows) + 1 == len(self._starts) and self._starts[-1] == len(self._words)
        check(
            whole and len(self._words) == len(self._log_probs),
            f"distillation: {path} is damaged: write it again",
        )
        words = self._words
        check(
            not words.numel() or 0 <= int(words.min()) <= int(words.max()) < self.vocabulary,
            f"distillation: {path} is damaged: it has tokens that are none of its "
            f"{self.vocabulary}; write it again",
        )

    def check_rows(self, examples: Iterable[Example], what: str) -> None:
        """Raise LorakitError unless all examples, called `what`, are in the file."""
        missing = sum(digest(each) not in self._numbers for each in examples)
        if missing:
            raise LorakitError(
                f"distillation: {missing} of {what} are not in {self.path}, which is of other rows "
                "or of another tokenizer or max_seq_length: write it again with `lorakit teach`"
            )

    def of_rows(self, digests: Iterable[bytes], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return words, int64 [n, k], and log_probs, [n, k + 1], of all positions of some rows."""
        numbers = [self._numbers[each] for each in digests]
        parts = [slice(self._starts[i], self._starts[i + 1]) for i in numbers]
        words = torch.cat([self._words[part] for part in parts]).long()
        log_probs = torch.cat([self._log_probs[part] for part in parts])
        sent = kernels.dispatch.sent
        return sent(words, device), sent(log_probs, device)


class Teacher:
    """What the loss of distillation compares the model with.

    Args:
        settings: The settings of the loss.
        source: Another model, the model as it was before the first step, or a file.
    """

    def __init__(self, settings: DistillationConfig, source: "Decoder | Reference | TopTokens"):
        self.settings, self.source = settings, source

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds of it: those of the model before the first step."""
        return self.source.tensors if isinstance(self.source, Reference) else {}

    def of_batch(
        self,
        model: Decoder,
        ids: Tensor,
        labels: Tensor,
        rows: Mapping[str, Tensor | None],
        digests: Sequence[bytes],
    ) -> OfLogits:
        """Return the function that gives the divergences of the model's logits in a batch."""
        beta, temperature = self.settings.beta, self.settings.temperature
        if isinstance(self.source, TopTokens):
            known, size = self.source.of_rows(digests, ids.device), self.source.vocabulary

            def from_file(logits: Tensor, part: slice) -> Tensor:
                return top_k_distillation_loss(
                    logits[:, :size],
                    *(each[part] for each in known),
                    beta=beta,
                    temperature=temperature,
                )

            return from_file
        with self._at_work(model) as teacher:
            states = label_states(teacher, ids, labels, **rows).hidden

        def from_model(logits: Tensor, part: slice) -> Tensor:
            with self._at_work(model) as teacher, teacher.whole_head() as head:
                theirs = head.logits(states[part])
            size = min(logits.shape[-1], theirs.shape[-1])
            both = logits[:, :size], theirs[:, :size]
            return distillation_loss(*both, beta=beta, temperature=temperature)

        return from_model

    @contextmanager
    def _at_work(self, model: Decoder) -> Iterator[Decoder]:
        """Compute with the teacher that is a model inside the block, without gradients."""
        if isinstance(self.source, Reference):
            with self.source.in_place(), evaluation_mode(model):
                yield model
            return
        assert isinstance(self.source, Decoder)
        with torch.no_grad():
            yield self.source


def taught_loss(
    model: Decoder,
    ids: Tensor,
    labels: Tensor,
    rows: Mapping[str, Tensor | None],
    taught: TaughtBatch,
    teacher: Teacher,
) -> Tensor:
    """Return the summed loss of a batch, fp32 []; `taught` keeps what the run tells of it.

    Args:
        model: The model that learns.
        ids: int64 [B, T], as `Decoder.loss` takes them.
        labels: int64 [B, T], as `Decoder.loss` takes them.
        rows: The attention_mask and the cu_seqlens of `Decoder.loss`.
        taught: What belongs to the batch.
        teacher: What the model is compared with.
    """
    # what has no gradient goes first, before the graph of the model takes memory
    divergences = teacher.of_batch(model, ids, labels, rows, taught.digests)
    alpha = teacher.settings.alpha

    def of_chunk(logits: Tensor, words: Tensor, part: slice) -> Tensor:
        divergence = divergences(logits, part).sum()
        with torch.set_grad_enabled(alpha > 0 and torch.is_grad_enabled()):
            nll = kernels.token_cross_entropy(logits, words).sum()
        return torch.stack([(1 - alpha) * divergence + alpha * nll, divergence, nll])

    states = label_states(model, ids, labels, **rows)
    loss, divergence, nll = summed_over_logits(model, states, of_chunk).unbind()
    count = loss.new_tensor(len(states.labels))
    taught.told = Late(torch.stack([divergence.detach(), nll.detach(), count]))
    return loss


def told_by_teacher(batches: Iterable[TaughtBatch | None]) -> dict[str, float]:
    """Return what a run tells of a step: means over the label tokens of this process."""
    found = [each.told.read() for each in batches if each is not None and each.told is not None]
    if not found:  # of a process that had no batch
        return {}
    divergence, nll, count = map(sum, zip(*found, strict=True))
    return {"divergence": divergence / count, "nll": nll / count}


@torch.no_grad()
def save_teacher_logits(
    teacher: Decoder,
    examples: Examples | Sequence[Examples],
    path: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> None:
    """Write the most likely tokens of a teacher at every label of rows to a safetensors file.

    It takes 8 top_k bytes for each label token, in memory until it is written. Distillation with
    `logits: path` then learns from the file, as from the teacher itself if top_k is its vocabulary.

    Args:
        teacher: The teacher.
        examples: The rows, as `encode_rows` made them for the model that is to learn; or several
            such, as of training and validation.
        path: The file.
        top_k: How many tokens are kept of each position.
        temperature: The number that the logits are divided by, that of the run.
        batch_size: How many rows are computed at a time.

    Raises:
        LorakitError: A row holds a token that the teacher has not, or an argument is out of its
            range.
        OSError: The directory cannot be made, or the disk is full.
    """
    check(top_k > 0 and batch_size > 0, "save_teacher_logits: top_k and batch_size must be above 0")
    check(temperature > 0, f"temperature must be positive, not {temperature}")
    sources = [examples] if isinstance(examples, Examples) else examples
    for each in sources:
        check(isinstance(each[0], Example), "save_teacher_logits: give rows with one answer each")
        each.encoder.tok.check_fits([each.largest_id], teacher.config.vocab_size)
    size = min(teacher.config.vocab_size, *(len(each.encoder.tok) for each in sources))
    as_path(path).parent.mkdir(parents=True, exist_ok=True)  # before the teacher takes its time
    # of like length in a batch
    places = sorted((n, s, i) for s, each in enumerate(sources) for i, n in enumerate(each.lengths))
    found, starts, digests = list[tuple[Tensor, Tensor]](), [0], b""
    with evaluation_mode(teacher):
        batches = range(0, len(places), batch_size)
        for start in tqdm(batches, "teaching", unit="batch", disable=None):
            some = [sources[s][i] for _, s, i in places[start : start + batch_size]]
            rows = [each.answers[0] for each in some]
            found.append(_top_of_rows(teacher, rows, min(top_k, size), size, temperature))
            for row in rows:
                starts.append(starts[-1] + sum(label != IGNORE for label in row.labels[1:]))
            digests += b"".join(map(digest, rows))
    words, log_probs = (torch.cat(each) for each in zip(*found, strict=True))
    tensors = {
        "rows": torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 16),
        "starts": torch.tensor(starts),
        "words": words,
        "log_probs": log_probs,
        "vocabulary": torch.tensor(size),
        "temperature": torch.tensor(temperature),
    }
    write_safetensors(as_path(path), tensors)


def _top_of_rows(
    teacher: Decoder, rows: Sequence[Example], top_k: int, size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return words, int32 [n, k], and log_probs, fp32 [n, k + 1], of rows, in host memory."""
    ids, labels = collate(rows)
    mask = real_tokens(rows).to(teacher.device) if teacher.config.by_length else None
    states = label_states(teacher, ids.to(teacher.device), labels, attention_mask=mask)
    words, log_probs = list[Tensor](), list[Tensor]()

    def of_chunk(logits: Tensor, _: Tensor, part: slice) -> Tensor:
        found = log_softmax(logits[:, :size], temperature)
        best = found.topk(top_k).indices
        words.append(best.int().cpu())
        log_probs.append(known_of(found, best, with_others=top_k < size).cpu())
        return logits.new_zeros(1)

    summed_over_logits(teacher, states, of_chunk)
    return torch.cat(words), torch.cat(log_probs)
