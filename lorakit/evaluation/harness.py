"""A lorakit model as lm-evaluation-harness asks for one. Importing this file needs lm-eval.

Texts become tokens as in the harness's own class for transformers' models, HFLM, so that the
numbers are the same: the tokenizer adds its special tokens, unless the text has them; spaces at the
end of a prompt go to what follows it; and what has no prompt follows the BOS token, or EOS if there
is none.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorakit.config.errors import LorakitError
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import Example
from lorakit.inference.generate import generate_batch
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer

_NEW_TOKENS = 256  # where a task does not say how many, as in HFLM

Scored = tuple[float, bool]
"""The log-probability of a text, in nats, and whether greedy decoding would write it."""


class HarnessModel(LM):
    """A model and its tokenizer, with the methods that the harness calls."""

    def __init__(self, model: Decoder, tok: Tokenizer, batch_size: int):
        super().__init__()
        self.model, self.tok, self.batch_size = model, tok, batch_size
        self.length = model.config.context_length - model.beginning.length
        prefix = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
        if prefix is None:
            raise LorakitError("tasks need a tokenizer with a BOS or an EOS token")
        self.prefix: int = prefix

    # ---- log-probabilities ----

    def loglikelihood(self, requests: list[Instance]) -> list[Scored]:
        """Score each continuation after its context; both are texts."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability of whole texts, which may be longer than the model reads."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._encode(request.args[0]), self.prefix, self.length, context_len=1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += value
        return totals

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what continues it."""
        if not context:
            ids = self.tok.encode(continuation, add_special_tokens=False)
            return ([self.prefix], ids) if ids[0] != self.prefix else (ids[:1], ids[1:])
        bare = context.rstrip()
        whole, before = self._encode(context + continuation), self._encode(bare or context)
        return before, whole[len(before) :]

    def _encode(self, text: str) -> list[int]:
        """Return tokens, with the special ones of the tokenizer if the text does not begin so."""
        begins = text.startswith(self.tok.decode([self.prefix], skip_special_tokens=False))
        return self.tok.encode(text, add_special_tokens=not begins)

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        """Score continuations in batches of texts of like length.

        The answers of a question that differ in their last token are one text for the model.
        """
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (context, continuation) in enumerate(pairs):
            asked[tuple([*context, *continuation][-self.length - 1 :][:-1])].append(number)
        texts = sorted(asked, key=len, reverse=True)
        scores: list[Scored] = [(0.0, True)] * len(pairs)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                for hidden, text in zip(self._hidden(batch), batch, strict=True):
                    longest = max(len(pairs[number][1]) for number in asked[text])
                    states = hidden[: len(text)][-longest:]
                    logits = self.model.head(states).float()
                    for number in asked[text]:
                        scores[number] = _scored(logits, pairs[number][1])
        finally:
            self.model.train(was_training)
        return scores

    def _hidden(self, batch: list[tuple[int, ...]]) -> torch.Tensor:
        """Return the last hidden states [B, T, H] of texts, padded on the right."""
        rows = [Example(list(text), list(text)) for text in batch]
        mask = real_tokens(rows).to(self.model.device) if self.model.config.by_length else None
        ids = collate(rows)[0].to(self.model.device)
        return self.model.hidden_states(ids, attention_mask=mask)

    # ---- texts ----

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continue each prompt until one of the texts that its settings name."""
        grouped: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            grouped[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for settings, numbers in grouped.items():
            options = _options(json.loads(settings))
            room = self.length - options["max_new_tokens"]
            if room < 1:
                raise LorakitError(
                    f"a task asks for {options['max_new_tokens']} new tokens; the model is meant "
                    f"for {self.length} positions, with the prompt"
                )
            prompts = [self._encode(requests[number].args[0])[-room:] for number in numbers]
            found = generate_batch(
                self.model, self.tok, prompts, batch_size=self.batch_size, progress=True, **options
            )
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        return texts

    # ---- chats ----

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the chat template writes them."""
        return self.tok.apply_chat_template(chat_history, False, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template, which the harness notes beside the results."""
        return str(self.tok.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps prompts that it has rendered."""
        return str(self.tok.source)


def _scored(logits: torch.Tensor, continuation: list[int]) -> Scored:
    """Score a continuation by the logits [T, V], of which the last predicts its last token."""
    if not continuation:
        return 0.0, True
    ids = torch.tensor(continuation, device=logits.device)
    logits = logits[-len(ids) :]
    logp = logits.log_softmax(-1).gather(1, ids[:, None])
    return float(logp.sum()), bool((logits.argmax(-1) == ids).all())


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `generate_batch` for a task's settings.

    Raises LorakitError for a setting that lorakit does not have.
    """
    until = settings.pop("until", None) or []
    options = {
        "max_new_tokens": int(settings.pop("max_gen_toks", _NEW_TOKENS)),
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    drawn = settings.pop("do_sample", float(settings.get("temperature") or 0) > 0)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = settings.pop(name, None)
        if drawn and value is not None:
            options[name] = value
    if settings:
        raise LorakitError(f"a task asks for {next(iter(settings))}, which lorakit does not have")
    return options
