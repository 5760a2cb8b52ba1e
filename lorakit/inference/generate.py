"""Text from a model: the loop that picks one token after another, until the text ends.

Prompts of different length run as one batch, in which every row is at a position of its own.
sampling.py picks a token from logits; decode.py gets from a token to the logits of the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from tqdm import tqdm

from lorakit.config.errors import LorakitError
from lorakit.inference.decode import Decoding
from lorakit.inference.sampling import Sampling, generator_of, sample
from lorakit.inference.text import RowText, end_tokens, stop_strings
from lorakit.models.chat_template import Messages
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def generate(
    model: Decoder,
    tok: Tokenizer,
    prompt_or_messages: str | Messages,
    *,
    stream: Callable[[str], Any] | None = None,
    **options: Any,
) -> str:
    """Continue a text, or answer a list of messages.

    Args:
        model: The model.
        tok: Its tokenizer.
        prompt_or_messages: A text, or messages ({"role": ..., "content": ...}), which become text
            by the chat template.
        stream: Called with each piece of text as soon as it is certain; the pieces make up the
            result.
        **options: Those of `generate_batch`.

    Returns:
        The new text, without the prompt.

    Raises:
        LorakitError: As `generate_batch` does.
    """
    if stream is not None:
        options["stream"] = lambda _, piece: stream(piece)
    return generate_batch(model, tok, [prompt_or_messages], **options)[0]


def generate_batch(
    model: Decoder,
    tok: Tokenizer,
    prompts: Sequence[str | Messages | list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stream: Callable[[int, str], Any] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[str]:
    """Continue several prompts.

    A text ends at a string of `stop` or at an end token: one of the tokenizer, one of the model's
    config, or the one that closes a turn in the chat template.

    Args:
        model: The model.
        tok: Its tokenizer.
        prompts: Each a text, a list of messages, or token ids.
        max_new_tokens: Most tokens that a text gets.
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Number of the likeliest tokens that may be drawn; None means all.
        top_p: Share of the probability that the tokens which may be drawn hold together.
        min_p: Least probability of a token, as a share of the likeliest one's.
        repetition_penalty: Factor by which tokens that the prompt or the text holds already become
            less likely; 1 is none.
        seed: Seed of the draws; None takes torch's global generator.
        stop: A string, or several. A text ends before the first of them that it holds.
        stream: Called with the number of a prompt and a new piece of its text, as soon as the piece
            is certain.
        batch_size: Number of prompts that run at a time.
        progress: Whether to show a progress bar.

    Returns:
        The new texts, in the order of the prompts and without them.

    Raises:
        LorakitError: For an option outside its range, an empty prompt, or one that leaves no room
            within the positions that the model is meant for.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens <= 0 or batch_size <= 0:
        raise LorakitError("generate: max_new_tokens and batch_size must be at least 1")
    generation = _Generation(model, tok, sampling, max_new_tokens, stop, seed)
    return generation.run(prompts, batch_size, stream, progress)


class _Generation:
    """One call of `generate_batch`: its settings, and the loop over its batches."""

    def __init__(
        self,
        model: Decoder,
        tok: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        stop: str | Sequence[str],
        seed: int | None,
    ):
        self.stop = stop_strings(stop)
        self.model, self.tok = model, tok
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.ends = end_tokens(model, tok, self.stop)
        divided = model.mesh is not None and model.mesh.size(model.mesh.ndim - 1) > 1
        if divided and sampling.temperature > 0 and seed is None:
            raise LorakitError("generate: every rank of a sharded model draws: give them one seed")
        self.generator = generator_of(seed, model.device)

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[str | Messages | list[int]],
        batch_size: int,
        stream: Callable[[int, str], Any] | None,
        progress: bool,
    ) -> list[str]:
        """Return the new text of each prompt."""
        encoded = [self._encode(prompt) for prompt in prompts]
        # Prompts of similar length run together, so that there is little padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        texts = [""] * len(encoded)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in tqdm(
                batches, desc="generating", disable=None if progress else True, leave=False
            ):
                rows = [
                    RowText(self.tok, encoded[i], self.stop, partial(stream, i) if stream else None)
                    for i in batch
                ]
                self._fill(rows)
                for i, row in zip(batch, rows, strict=True):
                    texts[i] = row.finish()
        finally:
            self.model.train(was_training)
        return texts

    def _encode(self, prompt: str | Messages | list[int]) -> list[int]:
        """Return the token ids of a prompt; refuse one that the model cannot take."""
        ids = token_ids(self.tok, prompt)
        if not ids:
            raise LorakitError("generate: a prompt has no tokens")
        self.tok.check_fits(ids, self.model.config.vocab_size)
        limit = self.model.config.context_length - self.model.beginning.length
        if len(ids) + self.max_new_tokens > limit:
            raise LorakitError(
                f"generate: a prompt of {len(ids)} tokens and "
                f"max_new_tokens={self.max_new_tokens} exceed the model's {limit} positions"
            )
        return ids

    def _fill(self, rows: list[RowText]) -> None:
        """Continue a batch until every row has ended."""
        prompts = [row.prompt for row in rows]
        steps = continue_text(
            self.model, prompts, self.max_new_tokens, self.sampling, self.generator
        )
        for tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                row.push(token, self.ends)
            if not any(row.running for row in rows):
                break


def token_ids(tok: Tokenizer, prompt: str | Messages | list[int]) -> list[int]:
    """Return the token ids of a text, of messages by the chat template, or of ids as they are."""
    if isinstance(prompt, str):
        return tok.encode(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return prompt
    return tok.apply_chat_template(cast(Messages, prompt), add_generation_prompt=True)


def continue_text(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, up to max_new_tokens times.

    The caller decides where a text ends, and stops asking when all have.

    Args:
        model: The model.
        prompts: The token ids of each prompt, none empty.
        max_new_tokens: Most tokens for each prompt.
        sampling: How a token is picked.
        generator: Source of random numbers; None takes torch's global one.

    Yields:
        One token id for each prompt.
    """
    seen = None
    if sampling.repetition_penalty != 1:
        shape = len(prompts), model.config.vocab_size
        seen = torch.zeros(shape, dtype=torch.bool, device=model.device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
    decoding = Decoding(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    lines, logits = decoding.read(prompts)
    for number in range(max_new_tokens):
        ids = sample(logits, sampling, generator, seen)[:, None]
        if seen is not None:
            seen.scatter_(1, ids, True)
        yield ids[:, 0].tolist()
        if number + 1 < max_new_tokens:
            logits = decoding(lines, ids)
