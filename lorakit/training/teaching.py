"""The teacher of a run: it is loaded, and what it cannot teach is refused before the first step."""

import time
from collections.abc import Mapping

import torch

from lorakit.config.distillation import DistillationConfig
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.encode import Example
from lorakit.data.examples import Examples
from lorakit.models.decoder import Decoder
from lorakit.models.load import load_model
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import load_tokenizer
from lorakit.training.log import say
from lorakit.training.losses.teacher import TopTokens


def source_of_teacher(
    model: Decoder,
    tok: Tokenizer,
    config: TrainConfig,
    given: Decoder | None,
    examples: Mapping[str, Examples | None],
) -> Decoder | TopTokens | None:
    """Return the teacher of a run, or its file; None stands for the model before the first step.

    Args:
        model: The model that learns.
        tok: Its tokenizer.
        config: The settings of the run.
        given: A teacher that is loaded; None takes the one that the config names.
        examples: All examples of the run by what messages call them.

    Returns:
        The teacher, frozen and in evaluation mode. None too for other objectives.

    Raises:
        LorakitError: There is no such teacher or file, or it does not know the tokens or rows.
    """
    settings = config.distillation
    if settings is None:
        if given is not None:
            raise LorakitError(f"train: objective {config.objective} has no teacher; leave it out")
        return None
    if given is model:
        raise LorakitError(
            "train: the teacher is the model that learns: leave it out to compare with the model "
            "as it was before the first step, or load another one"
        )
    rows = {name: each for name, each in examples.items() if each is not None}
    if given is None and settings.logits is not None:
        size = min(len(tok), model.config.vocab_size)
        return _opened(settings.logits, settings, rows, size)
    teacher = given
    if teacher is None and settings.teacher is not None:
        teacher = load_teacher(settings.teacher, settings, tok, model.dtype, model.device)
    if teacher is None:
        return None
    for name, each in rows.items():
        if each.largest_id >= teacher.config.vocab_size:
            raise LorakitError(
                f"distillation: {name} have the token {each.largest_id}, and the teacher has "
                f"{teacher.config.vocab_size} tokens: take one of the same vocabulary"
            )
    return teacher.requires_grad_(False).eval()


def load_teacher(
    name: str,
    settings: DistillationConfig,
    tok: Tokenizer,
    dtype: str | torch.dtype,
    device: torch.device | None = None,
) -> Decoder:
    """Load the teacher with this name.

    Args:
        name: A directory, a .gguf file or a Hub id.
        settings: The settings of distillation.
        tok: The tokenizer of the model that learns.
        dtype: What the teacher computes in.
        device: Where it lies; None takes a GPU if there is one.

    Returns:
        The teacher.

    Raises:
        LorakitError: It cannot be loaded, or its tokens are others.
    """
    _check_vocabulary(load_tokenizer(name), tok, name)
    started = time.perf_counter()
    model = load_model(name, dtype=dtype, quantize=settings.quantize, device=device)
    took = time.perf_counter() - started
    say(f"loaded the teacher {name} in {took:.1f} s on {model.device}")
    return model


def _check_vocabulary(theirs: Tokenizer, ours: Tokenizer, name: str) -> None:
    """Raise LorakitError unless two tokenizers have the same words; special tokens may differ."""
    vocabularies = (each.backend.get_vocab(with_added_tokens=False) for each in (theirs, ours))
    of_teacher, of_model = vocabularies
    if of_teacher == of_model:
        return
    differing = {word for word, _ in of_teacher.items() ^ of_model.items()}
    first = min(differing, key=lambda word: of_model.get(word, of_teacher.get(word, 0)))
    raise LorakitError(
        f"distillation: the teacher {name} has another vocabulary than the model: {first!r} is "
        f"{_number(first, of_teacher)} there and {_number(first, of_model)} here; "
        "take a teacher with the same tokenizer"
    )


def _number(word: str, vocabulary: Mapping[str, int]) -> str:
    return f"token {vocabulary[word]}" if word in vocabulary else "no token"


def _opened(
    path: str, settings: DistillationConfig, rows: Mapping[str, Examples], size: int
) -> TopTokens:
    """Open a teacher's file for a model of `size` tokens; raise LorakitError if it is another's."""
    found = TopTokens(path)
    if found.vocabulary > size:
        raise LorakitError(
            f"distillation: {path} is of a vocabulary of {found.vocabulary} tokens, and the model "
            f"has {size}: write it again with the tokenizer of the model"
        )
    if found.temperature != torch.tensor(settings.temperature).item():
        raise LorakitError(
            f"distillation: {path} was written at temperature {found.temperature:g}, and the run "
            f"has {settings.temperature:g}: set it so, or write the file again"
        )
    for name, each in rows.items():
        found.check_rows((example for example in each if isinstance(example, Example)), name)
    return found
