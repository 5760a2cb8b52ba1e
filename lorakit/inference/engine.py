"""Continuous batching: requests that come and go while their rows are continued together.

    engine = Engine(model, tok, slots=8)
    request = engine.submit(tok.encode("Once"), Sampling(temperature=0.7), max_new_tokens=64)
    while not engine.idle:
        for event in engine.step():
            print(event.request is request, event.text)

A step takes a part of the prompts that are still to be read, PART tokens at most, and then one new
token of every row. A request that ends makes room for the next at once; nobody waits for the
slowest of a batch. There are no threads in here: who calls `step` computes.

A row is alone in all that it computes, so a request gets the tokens that it gets alone, whoever
runs beside it. Rows may have different adapters. A prompt that begins like one that a line of the
cache still holds, with the same adapter, takes over the keys and values of what they share: a chat
that comes again with one more turn is read from that turn on.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import (
    adapter_names,
    attached,
    check_adapter,
    selected_adapter,
)
from lorakit.config.errors import LorakitError
from lorakit.inference.decode import Decoding
from lorakit.inference.grammar import Constraint
from lorakit.inference.kv_cache import PART
from lorakit.inference.request import MOST_LOGPROBS, Event, Request, Row
from lorakit.inference.sampling import Picker, Sampling
from lorakit.inference.text import end_tokens, stop_strings
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer

_CAPACITY = 4096
"""Positions of a row where the caller names no number, and the model is meant for so many."""


class Engine:
    """A model, and the requests that it answers together."""

    def __init__(
        self, model: Decoder, tok: Tokenizer, *, slots: int = 8, capacity: int | None = None
    ):
        """Make room for the rows.

        Args:
            model: The model, with or without adapters. It is put into eval mode.
            tok: Its tokenizer.
            slots: How many requests run at a time; others wait.
            capacity: Positions that a row may reach, prompt and new tokens together. None: 4096, or
                as many as the model is meant for if that is less.

        Raises:
            LorakitError: slots or capacity is not at least 1, or capacity exceeds the model's
                positions.
        """
        limit = model.config.context_length
        capacity = min(_CAPACITY, limit) if capacity is None else capacity
        if slots < 1 or not 1 <= capacity <= limit:
            raise LorakitError(
                f"Engine: slots is {slots} and capacity {capacity}; slots must be at least 1, "
                f"capacity between 1 and the model's {limit} positions"
            )
        self.model, self.tok, self.capacity = model.eval(), tok, capacity
        self.decoding = Decoding(model, slots, capacity)
        self._waiting: deque[Row] = deque()
        self._running: dict[int, Row] = {}
        self._free = list(range(slots))  # those that were in use last stand last
        # the tokens whose keys and values each line holds, and the adapter that they went through
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._through: list[str | None] = [None] * slots
        self._names: list[str] = []
        self._selected: str | None = None
        self._merged = False
        self._look()

    def _look(self) -> None:
        """See which adapters the model has."""
        before = self._names, self._selected, self._merged
        self._names = adapter_names(self.model)
        self._selected = selected_adapter(self.model)
        self._merged = any(each.merged is not None for each in attached(self.model).values())
        if (self._names, self._selected, self._merged) != before:
            self.decoding.compile()
            for line in self._free:  # an adapter's keys may not be what they were
                self._held[line] = []

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """Take a request; the next steps compute it.

        Args:
            prompt: The token ids to continue, such as `tok.apply_chat_template` returns.
            sampling: How tokens are picked. None: always the likeliest.
            max_new_tokens: Most tokens that the text gets. None: as many as there is room for.
            adapter: The name of the adapter that the row goes through. None: the base alone, or
                with the adapter that is merged into its weights.
            stop: A string, or several. The text ends before the first of them that it holds.
            seed: Seed of this request's draws; None takes torch's global generator.
            logit_bias: What is added to the logits of some tokens, by their ids; in [-100, 100].
            constraint: Says which tokens may come next, and where the text may or must end; see
                grammar.py. It serves one request.
            logprobs: Keep the model's log-probability of each new token, and of so many of the
                likeliest at its place, 20 at most. None: keep none.

        Returns:
            The request, which `step` fills in.

        Raises:
            LorakitError: For an empty prompt, one with unknown ids or without room, a seed, stop,
                bias or number of logprobs that is none, or an adapter that is not attached or
                cannot have a row of its own.
        """
        ids, strings = list(prompt), stop_strings(stop)
        if not ids:
            raise LorakitError("generate: a prompt has no tokens")
        self.tok.check_fits(ids, self.model.config.vocab_size)
        room = self.capacity - len(ids)
        if max_new_tokens is None:
            max_new_tokens = max(1, room)
        if max_new_tokens < 1 or max_new_tokens > room:
            raise LorakitError(
                f"generate: a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} do "
                f"not fit the {self.capacity} positions of a row; max_new_tokens must be at least 1"
            )
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise LorakitError(f"Engine: logprobs is {logprobs}, not in [0, {MOST_LOGPROBS}]")
        self._look()
        self.check_adapter(adapter)
        sampling, ends = sampling or Sampling(), end_tokens(self.model, self.tok, strings)
        picker = Picker(
            sampling,
            ids,
            self.model.config.vocab_size,
            self.model.device,
            seed=seed,
            logit_bias=logit_bias,
            constraint=constraint,
            ends=[end for end in ends if end < self.model.config.vocab_size],
        )
        request = Request(ids, sampling, max_new_tokens, adapter, logprobs)
        self._waiting.append(Row(request, self.tok, strings, ends, picker))
        return request

    def check_adapter(self, name: str | None) -> None:
        """Raise LorakitError unless a request may have this adapter, None for none."""
        if name is None:
            return
        check_adapter(self.model, name, "Engine")
        if self._merged:
            raise LorakitError("Engine: an adapter is merged; unmerge it, or ask for no adapter")
        beginning = self.model.beginning
        if isinstance(beginning, Attached) and name in beginning.adapters:
            raise LorakitError(
                f"Engine: adapter {name!r} is a learned prompt, which all rows share; use generate"
            )
        if any(self.model.config.moe_layers or ()) and name != self._selected:
            raise LorakitError(
                f"Engine: experts mix rows, so that only the selected adapter can be used beside "
                f"the base; {name!r} is not selected"
            )

    # ---- a step ----

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read a part of the waiting prompts, and continue every row by one token.

        Returns:
            What became of the requests, in no special order. Each gets an event for every new
            token, and one in which it is done.
        """
        events: list[Event] = []
        self._drop_cancelled(events)
        self._admit()
        ready = [row for row in self._running.values() if row.request.tokens]
        left = PART
        for row in [row for row in self._running.values() if not row.request.tokens]:
            if left > 0:
                left -= self._read(row, left, events)
        for group in self._groups(ready):
            self._continue(group, events)
        return events

    def _drop_cancelled(self, events: list[Event]) -> None:
        gone = [row for row in self._waiting if row.request.cancelled]
        self._waiting = deque(row for row in self._waiting if not row.request.cancelled)
        gone += [row for row in self._running.values() if row.request.cancelled]
        for row in gone:
            self._end(row, "cancelled", None, events)

    def _admit(self) -> None:
        """Give waiting requests a free line, with what it or another holds of their prompts."""
        while self._waiting and self._free:
            row = self._waiting.popleft()
            request, source, shared = row.request, self._free[0], 0
            if not self.model.config.by_length:  # where keys depend on the whole row
                source, shared = self._best_prefix(request, source)
            whole = 2 * shared >= len(self._held[source])  # little is lost of what it holds
            line = source if source in self._free and whole else self._free[0]
            self._free.remove(line)
            if shared:
                self.decoding.cache.copy(source, line, shared)
            else:
                self.decoding.begin(line)
            self._held[line] = request.prompt[:shared]
            self._through[line] = request.adapter
            row.line, request.cached_tokens = line, shared
            self._running[line] = row

    def _best_prefix(self, request: Request, line: int) -> tuple[int, int]:
        """Return the line that holds most of a prompt's beginning, and how many tokens of it."""
        best = 0
        for other, held in enumerate(self._held):
            if self._through[other] != request.adapter:
                continue
            shared = _common(held, request.prompt[:-1])  # the last token's logits are wanted
            if shared > best and self.decoding.cache.holds(other, shared):
                line, best = other, shared
        return line, best

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """Return the rows that go through the model together: all, but where experts mix them."""
        if not any(self.model.config.moe_layers or ()):
            return [rows] if rows else []
        names = {row.request.adapter for row in rows}
        return [[row for row in rows if row.request.adapter == name] for name in names]

    def _take(self, rows: list[Row], ids: list[list[int]]) -> Tensor:
        """Return the logits [n, V] after these tokens of each row."""
        lines, tokens = [row.line for row in rows], torch.tensor(ids, device=self.model.device)
        logits = self.decoding(lines, tokens, adapters=[row.request.adapter for row in rows])
        for row, new in zip(rows, ids, strict=True):
            self._held[row.line] += new
        return logits

    def _read(self, row: Row, most: int, events: list[Event]) -> int:
        """Take the next part of a prompt; return how many tokens it has."""
        prompt, read = row.request.prompt, len(self._held[row.line])
        if self.model.config.by_length:
            most = len(prompt)
        part = prompt[read : read + most]
        logits = self._take([row], [part])
        if read + len(part) == len(prompt):
            self._push(row, logits, events)
        return len(part)

    def _continue(self, rows: list[Row], events: list[Event]) -> None:
        """Take the last token of each row, and pick the next."""
        logits = self._take(rows, [row.request.tokens[-1:] for row in rows])
        for i, row in enumerate(rows):
            self._push(row, logits[i : i + 1], events)

    def _push(self, row: Row, logits: Tensor, events: list[Event]) -> None:
        """Pick the next token of a row from its logits [1, V]; end the row where it ends."""
        request, text = row.request, row.text
        try:
            token = row.picker.pick(logits)
        except LorakitError as error:
            request.error = error
            self.decoding.cache.clear(row.line)  # what is NaN in it would stay there
            self._held[row.line] = []
            self._end(row, "error", None, events)
            return
        text.push(token, row.ends)
        if len(text.ids) == len(request.tokens):  # an end token
            self._end(row, "stop", None, events)
            return
        request.tokens.append(token)
        _keep_logprobs(request, logits[0], token)
        if not text.running or row.picker.ended:
            self._end(row, "stop", token, events)
        elif len(request.tokens) == request.max_new_tokens:
            self._end(row, "length", token, events)
        else:
            events.append(Event(request, token, row.new_text()))

    def _end(self, row: Row, reason: str, token: int | None, events: list[Event]) -> None:
        request = row.request
        if self._running.get(row.line) is row:
            del self._running[row.line]
            self._free.append(row.line)
        request.finish_reason = reason
        row.text.finish()
        events.append(Event(request, token, row.new_text()))


def _keep_logprobs(request: Request, logits: Tensor, token: int) -> None:
    """Keep the log-probabilities that a request wants of its new token, from its logits [V]."""
    if request.logprobs_of is None:
        return
    logprobs = logits.log_softmax(-1)
    request.logprobs.append(logprobs[token].item())
    values, tokens = logprobs.topk(min(request.logprobs_of, len(logprobs)))
    request.top_logprobs.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))


def _common(a: list[int], b: list[int]) -> int:
    """Return how many tokens two rows begin with that are the same."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
