"""Text from a model: the loop that picks one token after another, until the text ends.

Prompts of different length run as one batch, padded on the left, so that every row's next token is
in the last column.

A token is drawn from logits z, in this order (transformers' too):

    z_i / penalty where z_i > 0, else z_i * penalty, for the row's own tokens i (arXiv:1909.05858)
    p = softmax(z / temperature)
    the top_k likeliest tokens;  the fewest that hold top_p of their mass (arXiv:1904.09751);
    those with p_i >= min_p max(p) (arXiv:2407.01082)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm

from lorakit.config.errors import check
from lorakit.inference.decode import Decoding
from lorakit.models.chat_template import Messages
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


class Sampling(NamedTuple):
    """How a token is picked from logits; see the module."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise LorakitError for a value outside its range."""
        check(0 <= self.temperature < math.inf, "generate: temperature must be at least 0")
        check(self.top_k is None or self.top_k > 0, "generate: top_k must be at least 1, or None")
        check(0 < self.top_p <= 1, "generate: top_p must be in (0, 1]")
        check(0 <= self.min_p <= 1, "generate: min_p must be in [0, 1]")
        check(
            1e-6 <= self.repetition_penalty <= 1e6,
            "generate: repetition_penalty must be in [1e-6, 1e6]",
        )


def generate(
    model: Decoder,
    tok: Tokenizer,
    prompt_or_messages: str | Messages,
    *,
    stream: Callable[[str], Any] | None = None,
    **options: Any,
) -> str:
    """The model's continuation of a text, or its answer to a list of messages.

    stream: called with each piece of text as soon as it is certain; the pieces make up the result.
    The other options are those of `generate_batch`.
    """
    if stream is not None:
        options["stream"] = lambda _, piece: stream(piece)
    return generate_batch(model, tok, [prompt_or_messages], **options)[0]


@torch.no_grad()
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
    """Continuations of several prompts, each a text, a list of messages, or its token ids; without
    the prompts.

    temperature 0 takes the likeliest token; above, tokens are drawn with `seed`, or with torch's
    global generator where it is None. A row ends at an end token: of the tokenizer, of the model's
    config, or the one that closes a turn in the chat template; or where its text holds one of the
    strings `stop`, which is cut off. stream(i, piece): new text of prompt i, as soon as it is
    certain. Raises LorakitError for an option outside its range, an empty prompt, or one that
    leaves no room within the positions the model is meant for.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling.check()
    check(
        max_new_tokens > 0 and batch_size > 0,
        "generate: max_new_tokens and batch_size must be at least 1",
    )
    check(seed is None or 0 <= seed < 2**63, f"generate: seed is {seed}; it must be in [0, 2^63)")
    strings = [stop] if isinstance(stop, str) else list(stop)
    check(
        all(isinstance(text, str) and text for text in strings),
        f"generate: stop must be a string or a list of strings, none empty, not {stop!r}",
    )
    encoded = [_encode(tok, prompt) for prompt in prompts]
    limit = model.config.context_length - model.beginning.length
    for ids in encoded:
        check(bool(ids), "generate: a prompt has no tokens")
        tok.check_fits(ids, model.config.vocab_size)
        check(
            len(ids) + max_new_tokens <= limit,
            f"generate: a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the model's {limit} positions",
        )
    ends = {*model.config.eos_token_ids, *tok.end_token_ids}
    added = tok.backend.get_added_tokens_decoder().items()
    ends |= {token for token, its in added if its.special and its.content in strings}  # no text
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(seed)

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # like lengths together
    texts = [""] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for batch in tqdm(
            batches, desc="generating", disable=None if progress else True, leave=False
        ):
            rows = [_Row(tok, encoded[i], strings, stream and partial(stream, i)) for i in batch]
            picked = [encoded[i] for i in batch]
            for tokens in continue_text(model, picked, max_new_tokens, sampling, generator):
                for row, token in zip(rows, tokens, strict=True):
                    row.push(token, ends)
                if not any(row.running for row in rows):
                    break
            for i, row in zip(batch, rows, strict=True):
                texts[i] = row.finish()
    finally:
        model.train(was_training)
    return texts


class _Row:
    """The new tokens of one prompt, and their text as far as it is certain.

    They are decoded behind the prompt's last token: SentencePiece drops the space before the first.
    """

    def __init__(
        self,
        tok: Tokenizer,
        prompt: list[int],
        stop: list[str],
        stream: Callable[[str], Any] | None,
    ):
        self.tok, self.stop, self.stream = tok, stop, stream
        self.before = prompt[-1:]
        if "\N{REPLACEMENT CHARACTER}" in tok.decode(self.before):  # half a character
            self.before = []
        self.ids: list[int] = []
        self.running = True
        self.text, self.streamed = "", 0
        self.decoder = DecodeStream(skip_special_tokens=True)
        for token in self.before:
            self.decoder.step(tok.backend, token)

    def push(self, token: int, ends: set[int]) -> None:
        if not self.running or token in ends:
            self.running = False
            return
        self.ids.append(token)
        if not self.stop and self.stream is None:
            return
        self.text += self.decoder.step(self.tok.backend, token) or ""
        cut = self._cut(self.text)
        self.running = cut == self.text
        if self.stream is not None and self.running:
            # the text's end may be the beginning of a stop string
            held = [n for stop in self.stop for n in range(1, len(stop)) if cut.endswith(stop[:n])]
            self._hand_on(cut[: len(cut) - max(held, default=0)])

    def finish(self) -> str:
        text = self.tok.decode(self.before + self.ids)
        text = self._cut(text[len(self.tok.decode(self.before)) :])
        self._hand_on(text)
        return text

    def _cut(self, text: str) -> str:
        found = [text.find(stop) for stop in self.stop]
        return text[: min((at for at in found if at >= 0), default=len(text))]

    def _hand_on(self, text: str) -> None:
        if self.stream is not None and len(text) > self.streamed:
            piece, self.streamed = text[self.streamed :], len(text)
            self.stream(piece)


def _encode(tok: Tokenizer, prompt: str | Messages | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return tok.encode(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return prompt
    return tok.apply_chat_template(prompt, add_generation_prompt=True)


def continue_text(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[list[int]]:
    """The next token of every prompt, up to max_new_tokens times."""
    longest, device = max(map(len, prompts)), model.device
    padding = [longest - len(ids) for ids in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(padding, prompts, strict=True)], device=device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(ids), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
    decoding = Decoding(model, padding, longest + max_new_tokens)
    for _ in range(max_new_tokens):
        ids = sample(decoding(ids), sampling, generator, seen)[:, None]
        if seen is not None:
            seen.scatter_(1, ids, True)
        yield ids[:, 0].tolist()


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None
) -> Tensor:
    """One token id per row of logits [B, V]; seen: bool [B, V], tokens that the row holds."""
    temperature, top_k, top_p, min_p, penalty = sampling
    if seen is not None:
        lower = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, lower, logits)
    top, token = logits.max(-1, keepdim=True)
    check(bool(top.isfinite().all()), "generate: the model's logits are not finite")
    if temperature < 1e-30:  # in fp32 it may be 0
        return token[:, 0]
    logits = logits - top  # a tiny temperature must not give inf - inf
    if top_k is not None and top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k)
    else:
        logits, tokens = logits.sort(descending=True, stable=True)
    probs = (logits / temperature).softmax(-1)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # what lies beyond the first top_p of the mass
    probs[probs < min_p * probs[:, :1]] = 0
    return tokens.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]
