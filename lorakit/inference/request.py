"""A request to the engine, what the engine tells of it, and the row that computes it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.inference.kv_cache import Line
from lorakit.inference.sampling import Picker, Sampling
from lorakit.inference.text import RowText
from lorakit.models.tokenizer import Tokenizer

MOST_LOGPROBS = 20
"""Most tokens whose log-probabilities are kept beside each new one; OpenAI's limit."""


@dataclass(eq=False)
class Request:
    """One text that the engine continues; `Engine.submit` makes it."""

    prompt: list[int]
    """The token ids that are continued."""
    sampling: Sampling
    """How its tokens are picked."""
    max_new_tokens: int
    """Most tokens that it gets."""
    adapter: str | None
    """The adapter that its row goes through; None: the base alone."""
    logprobs_of: int | None
    """How many of the likeliest tokens `top_logprobs` has each time; None: no log-probabilities."""
    logprobs_temperature: float = 1.0
    """What divides the logits that log-probabilities are taken of."""
    tokens: list[int] = field(default_factory=list)
    """The new tokens, without the one that ended the text."""
    logprobs: list[float] = field(default_factory=list)
    """The model's log-probability of each new token, before all of sampling; see
    `logprobs_temperature`."""
    end_token: int | None = None
    """The token that ended the text, if one did."""
    end_logprob: float | None = None
    """Its log-probability, as `logprobs` has those of the others."""
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    """The likeliest tokens at the place of each new one with their log-probabilities, falling."""
    text: str = ""
    """The new text as far as it is certain."""
    cached_tokens: int = 0
    """How many tokens of the prompt were taken over from other rows, when it was read first."""
    finish_reason: str | None = None
    """Why it ended: "stop" (an end token, a stop string, or the end of what a constraint allows),
    "length", "cancelled" or "error"."""
    error: LorakitError | None = None
    """What went wrong, if the reason is "error"."""
    cancelled: bool = False
    """Whether `cancel` was called."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def keep_logprobs(self, logits: Tensor, token: int) -> None:
        """Keep the log-probabilities that are wanted of a new token, from its logits [V]."""
        if self.logprobs_of is not None:
            logprobs = self._logprobs(logits)
            self.logprobs.append(logprobs[token].item())
            values, tokens = logprobs.topk(min(self.logprobs_of, len(logprobs)))
            self.top_logprobs.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))

    def end(self, logits: Tensor, token: int) -> None:
        """Note the token that ended the text, from its logits [V]."""
        self.end_token = token
        if self.logprobs_of is not None:
            self.end_logprob = self._logprobs(logits)[token].item()

    def _logprobs(self, logits: Tensor) -> Tensor:
        return (logits / self.logprobs_temperature).log_softmax(-1)

    def cancel(self) -> None:
        """End the request at the next step; other threads may call this."""
        self.cancelled = True


class Event(NamedTuple):
    """What a step did for a request: a new token, or its end, or both."""

    request: Request
    """The request; `request.done` says whether this is its last event."""
    token: int | None
    """The new token; None for an end that has none."""
    text: str
    """The piece of text that became certain."""


class Row:
    """A request while the engine computes it."""

    def __init__(
        self, request: Request, tok: Tokenizer, stop: list[str], ends: set[int], picker: Picker
    ):
        self.request, self.ends, self.picker = request, ends, picker
        self.ids = list(request.prompt)  # and the new tokens
        self.pieces: list[str] = []  # of text, that no event has told yet
        self.text = RowText(tok, request.prompt, stop, self.pieces.append)
        self.line: Line | None = None  # None: it waits

    @property
    def held(self) -> Line:
        """The line of a row that has a slot."""
        assert self.line is not None
        return self.line

    def will_read_as(self, row: "Row") -> bool:
        """Return whether this row is to read the prompt that another has just read."""
        mine, its = self.request, row.request
        if self.line is None or mine.tokens or self.line.length >= row.held.length:
            return False
        return mine.adapter == its.adapter and mine.prompt == its.prompt

    def new_text(self) -> str:
        """Return the text that became certain, and give it to the request."""
        piece = "".join(self.pieces)
        self.pieces.clear()
        self.request.text += piece
        return piece
