"""Text from a model: a key-value cache and the loop that samples one token after another.

Prompts of different length run as one batch, padded on the left, so that every row's next token is
in the last column. The cache is allocated once, for the prompt and all new tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import LorakitError, ModelConfig
from .model import Decoder
from .tokenizer import Messages, Tokenizer


class KVCache:
    """Keys and values per layer: [B, capacity, Hk, D], of which the first `length` positions are
    filled.

    `length` moves when the last layer has appended.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype, device):
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[1]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        if layer == len(self.keys) - 1:
            self.length = end
        return keys[:, :end], values[:, :end]


def generate(
    model: Decoder, tok: Tokenizer, prompt_or_messages: str | Messages, **options: Any
) -> str:
    """The model's continuation of a text, or its answer to a list of messages.

    Options are those of `generate_batch`.
    """
    return generate_batch(model, tok, [prompt_or_messages], **options)[0]


@torch.no_grad()
def generate_batch(
    model: Decoder,
    tok: Tokenizer,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[str]:
    """Continuations of several prompts, each a text or a list of messages, without the prompts.

    temperature 0 takes the likeliest token; above, tokens are drawn from the smallest set that
    holds `top_p` of the probability, with `seed`, or torch's global generator where it is None. A
    row ends at an end token of the tokenizer or of the model's config. Raises LorakitError for an
    empty prompt, or one that leaves no room within the model's max_position_embeddings.
    """
    if (
        max_new_tokens < 1
        or batch_size < 1
        or not 0 <= temperature < math.inf
        or not 0 < top_p <= 1
    ):
        raise LorakitError(
            "generate: max_new_tokens and batch_size must be at least 1, temperature at least 0, "
            "top_p in (0, 1]"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise LorakitError(f"generate: seed is {seed}; it must be in [0, 2^63)")
    encoded = [_encode(tok, prompt) for prompt in prompts]
    limit = model.config.max_position_embeddings
    for ids in encoded:
        if not ids:
            raise LorakitError("generate: a prompt has no tokens")
        tok.check_fits(ids, model.config.vocab_size)
        if len(ids) + max_new_tokens > limit:
            raise LorakitError(
                f"generate: a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's {limit} positions"
            )
    stops = {*model.config.eos_token_ids, *([] if tok.eos_token_id is None else [tok.eos_token_id])}
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(seed)

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # like lengths together
    texts = [""] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for rows in tqdm(
            batches, desc="generating", disable=None if progress else True, leave=False
        ):
            new = _continue(
                model,
                [encoded[i] for i in rows],
                max_new_tokens,
                temperature,
                top_p,
                generator,
                stops,
            )
            for i, ids in zip(rows, new, strict=True):
                texts[i] = tok.decode(ids)
    finally:
        model.train(was_training)
    return texts


def _encode(tok: Tokenizer, prompt: str | Messages) -> list[int]:
    if isinstance(prompt, str):
        return tok.encode(prompt)
    return tok.apply_chat_template(prompt, add_generation_prompt=True)


def _continue(
    model, prompts, max_new_tokens, temperature, top_p, generator, stops
) -> list[list[int]]:
    """New token ids for each prompt, without the end token."""
    B, longest = len(prompts), max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(padding, prompts, strict=True)])
    ids = ids.to(model.device)
    mask = None
    if any(padding):
        mask = torch.ones(B, longest + max_new_tokens, dtype=torch.bool, device=model.device)
        for row, n in enumerate(padding):
            mask[row, :n] = False
    cache = KVCache(model.config, B, longest + max_new_tokens, model.dtype, model.device)
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * B
    for _ in range(max_new_tokens):
        seen = None if mask is None else mask[:, : cache.length + ids.shape[1]]
        hidden = model.hidden_states(ids, attention_mask=seen, cache=cache)
        ids = _sample(model.head(hidden[:, -1]).float(), temperature, top_p, generator)[:, None]
        for row, token in enumerate(ids[:, 0].tolist()):
            running[row] = running[row] and token not in stops
            if running[row]:
                new[row].append(token)
        if not any(running):
            break
    return new


def _sample(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """One token id per row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    shifted = logits - logits.amax(-1, keepdim=True)  # a tiny temperature must not give inf - inf
    probs, tokens = (shifted / temperature).softmax(-1).sort(descending=True, stable=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # what lies beyond the first top_p of the mass
    return tokens.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]
