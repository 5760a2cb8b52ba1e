"""Continuous batching: requests that come and go while their rows are continued together.

    engine = Engine(model, tok, slots=8)
    request = engine.submit(tok.encode("Once"), Sampling(temperature=0.7), max_new_tokens=64)
    while not engine.idle:
        for event in engine.step():
            print(event.request is request, event.text)

A step takes a part of the prompts that are still to be read, PART tokens at most, and then one new
token of every row. A request that ends makes room for the next at once; nobody waits for the
slowest of a batch.

Of rows with the same prompt and adapter that have a slot, one reads it, and all go on from its end.
What a prompt shares with another of the same adapter, page by page, is computed once too: with one
that runs, and with one that has ended, as long as its pages last (kv_cache.py). A chat that comes
again with one more turn is read from that turn on.

Where the cache is full, the row that came last goes back to the front of those that wait. Later it
is read again, and goes on where it was.

A request gets the same bits whoever runs beside it, shared or not, put back or not, wherever the
compiled step takes its row. For that a prompt is read in parts with fixed bounds, and new tokens
that were computed one by one are neither shared nor read again as a part, unless the bits are the
same. Of rows that take the decoder's modules, logits may differ by roundings, as torch's products
of several rows do.

One thread calls `step`, which computes. `submit` and `Request.cancel` may be called by others at
the same time; what changes the model or its adapters may not. Rows use their adapter until they
end: take it off afterwards.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from os import urandom

import torch
from torch import Tensor

from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import adapter_names, attached, check_adapter, selected_adapter
from lorakit.config.errors import LorakitError
from lorakit.inference.decode import COMPILED_ROWS, decoding_of
from lorakit.inference.grammar import Constraint
from lorakit.inference.kv_cache import PAGE, PART
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
        self,
        model: Decoder,
        tok: Tokenizer,
        *,
        slots: int = 8,
        capacity: int | None = None,
        cache_tokens: int | None = None,
    ):
        """Make room for the rows.

        Args:
            model: The model, with or without adapters. It is put into eval mode.
            tok: Its tokenizer.
            slots: How many requests run at a time; others wait.
            capacity: Positions that a row may reach, prompt and new tokens together. None: 4096, or
                as many as the model is meant for if that is less.
            cache_tokens: Positions that there is room for in all, of rows that run and of what is
                kept of earlier ones. None: what `slots` rows need that share nothing.

        Raises:
            LorakitError: slots or cache_tokens is not at least 1, or capacity exceeds the model's
                positions.
        """
        limit = model.config.context_length
        capacity = min(_CAPACITY, limit) if capacity is None else capacity
        if slots < 1 or not 1 <= capacity <= limit:
            raise LorakitError(
                f"Engine: slots is {slots} and capacity {capacity}; slots must be at least 1, "
                f"capacity between 1 and the model's {limit} positions"
            )
        if cache_tokens is not None and cache_tokens < 1:
            raise LorakitError(f"Engine: cache_tokens is {cache_tokens}; it must be at least 1")
        self.model, self.tok, self.slots, self.capacity = model.eval(), tok, slots, capacity
        self.decoding = decoding_of(model, slots, capacity, cache_tokens)
        self.cache = self.decoding.cache
        self._new: deque[Row] = deque()  # what other threads hand over
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # the oldest first
        self._model_was: tuple[object, ...] = ()
        self._roots: dict[str | None, bytes] = {}  # what the pages of an adapter begin with
        self._parts: dict[str | None, list[object]] = {}
        self._compiled: set[str | None] = set()  # adapters that the compiled step takes
        self._usable: set[str | None] = set()  # adapters that were found fine in this state
        self._look()

    def _look(self) -> None:
        """See which adapters the model has, and forget the pages of those that are others now."""
        found = attached(self.model).values()
        merged = [each.merged for each in found]
        now = adapter_names(self.model), selected_adapter(self.model), merged
        parts: dict[str | None, list[object]] = {None: list(merged)}
        for each in found:
            for name in each.adapters:
                parts.setdefault(name, []).append(each.part_of(name))
        others = [key for key in parts if not _same(parts[key], self._parts.get(key))]
        if others or now != self._model_was:
            self.decoding.compile()
            self._compiled = {key for key in parts if self.decoding.compiles(key)}
            self._usable = {None}
        for key in others:
            self._roots[key] = urandom(16)
        self._model_was, self._parts = now, parts

    def forget(self) -> None:
        """Let no later row take over keys and values of earlier ones, as after a training step."""
        self._roots = {name: urandom(16) for name in self._roots}

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._new and not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot, or for room in the cache."""
        return len(self._new) + len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

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
        logprobs_temperature: float = 1.0,
    ) -> Request:
        """Take a request; the next steps compute it. Other threads may call this.

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
            logprobs_temperature: Divides the logits that they are taken of, above 0.

        Returns:
            The request, which `step` fills in.

        Raises:
            LorakitError: For an empty prompt, one with unknown ids or without room, a seed, stop,
                bias or number of logprobs that is none, or an adapter that is not attached or
                cannot have a row of its own. One that went since the last step ends the request.
        """
        ids, strings = list(prompt), stop_strings(stop)
        max_new_tokens = self._check_room(ids, max_new_tokens)
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise LorakitError(f"Engine: logprobs is {logprobs}, not in [0, {MOST_LOGPROBS}]")
        self._check_known(adapter)
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
        wanted = logprobs, logprobs_temperature
        request = Request(ids, sampling, max_new_tokens, adapter, *wanted)
        self._new.append(Row(request, self.tok, strings, ends, picker))
        return request

    def _check_room(self, ids: list[int], max_new_tokens: int | None) -> int:
        """Return how many tokens a prompt may get; raise LorakitError if it gets none."""
        if not ids:
            raise LorakitError("generate: a prompt has no tokens")
        self.tok.check_fits(ids, self.model.config.vocab_size)
        capacity = self.capacity
        if not self.cache.fits(capacity):
            capacity = self.cache.tokens
        room = capacity - len(ids)
        if max_new_tokens is None:
            max_new_tokens = max(1, room)
        if max_new_tokens < 1 or max_new_tokens > room:
            raise LorakitError(
                f"generate: a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} do "
                f"not fit the {capacity} positions of a row; max_new_tokens must be at least 1"
            )
        return max_new_tokens

    def _check_known(self, name: str | None) -> None:
        if name not in self._usable or name not in self._parts:
            self.check_adapter(name)
            self._usable.add(name)

    def check_adapter(self, name: str | None) -> None:
        """Raise LorakitError unless a request may have this adapter, None for none."""
        if name is None:
            return
        check_adapter(self.model, name, "Engine")
        if any(each.merged is not None for each in attached(self.model).values()):
            raise LorakitError("Engine: an adapter is merged; unmerge it, or ask for no adapter")
        beginning = self.model.beginning
        if isinstance(beginning, Attached) and name in beginning.adapters:
            raise LorakitError(
                f"Engine: adapter {name!r} is a learned prompt, which all rows share; use generate"
            )
        if any(self.model.config.moe_layers or ()) and name != selected_adapter(self.model):
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
        self._take_new(events)
        self._drop_cancelled(events)
        self._admit()
        ready = [row for row in self._running if not self._reads(row)]
        left = PART
        for row in [row for row in self._running if self._reads(row)]:
            while left > 0 and row.line is not None and self._reads(row):
                left -= self._read(row, events)
        for row in ready:  # a row may have to go back for one before it
            self._has_room(row, 1)
        for group in self._groups([row for row in ready if row.line is not None]):
            self._continue(group, events)
        return events

    def _take_new(self, events: list[Event]) -> None:
        """Take what was submitted since the last step."""
        if self._new:
            self._look()
        while self._new:
            row = self._new.popleft()
            try:
                self._check_known(row.request.adapter)  # it may have gone meanwhile
            except LorakitError as error:
                self._fail(row, error, events)
            else:
                self._waiting.append(row)

    def _drop_cancelled(self, events: list[Event]) -> None:
        for row in [row for row in [*self._waiting, *self._running] if row.request.cancelled]:
            self._end(row, "cancelled", None, events)

    def _admit(self) -> None:
        """Give waiting requests a slot, where there is room for their prompts and one token."""
        while self._waiting and len(self._running) < self.slots:
            row = self._waiting[0]
            row.line = self.cache.line(self._roots[row.request.adapter])
            if not row.request.tokens:
                row.request.cached_tokens = 0  # of an earlier time, after which it was put off
            self._adopt(row)
            rows = [row, *self._running]  # who has a slot already may not have read its prompt yet
            if not self.cache.has_room((r.held, len(r.ids) + 1 - r.held.length) for r in rows):
                self._put_off(row)
                return
            self._waiting.popleft()
            self._running.append(row)

    def _put_off(self, row: Row) -> None:
        """Empty the line of a row, which is read again later."""
        if row.line is not None:
            self.cache.release(row.line)
        row.line = None

    def _has_room(self, row: Row, n: int) -> bool:
        """Make room for n more positions of a row.

        The row that came last goes back, as often as it takes. False: it is this one.
        """
        while row.line is not None and not self.cache.grow(row.line, n):
            last = self._running.pop()
            self._put_off(last)
            self._waiting.appendleft(last)
        return row.line is not None

    # ---- prompts ----

    def _exact(self, row: Row) -> bool:
        """Return whether a row's bits are the same if its tokens come in parts or one by one."""
        return self.decoding.compiled_prompts and row.request.adapter in self._compiled

    def _known(self, row: Row) -> list[int]:
        """Return the tokens of a row that may be read in parts, and shared."""
        return row.ids if self._exact(row) else row.request.prompt

    def _reads(self, row: Row) -> bool:
        """Return whether a row has tokens to be read, before it is continued one by one."""
        line = row.held
        whole = len(row.ids) - (1 if row.request.tokens else 0)
        return line.length < min(whole, len(self._known(row)))

    def _unit(self, row: Row) -> int:
        """Return how many tokens of a prompt are read at a time: its bits depend on that."""
        return PAGE if self._exact(row) else PART

    def _adopt(self, row: Row) -> None:
        """Let a row take over what others have computed of it; the last token's logits it wants."""
        if self.model.config.by_length:  # keys depend on the whole row
            return
        known = self._known(row)[: len(row.ids) - 1]
        gained = self.cache.adopt(row.held, known, self._unit(row))
        if not row.request.tokens:
            row.request.cached_tokens += gained

    def _read(self, row: Row, events: list[Event]) -> int:
        """Read the next part of a row's known tokens; return how many there were."""
        self._adopt(row)
        if not self._reads(row):  # of a row that was put back, all was there
            return 0
        known, unit, start = self._known(row), self._unit(row), row.held.length
        end = len(known) if self.model.config.by_length else (start // unit + 1) * unit
        part = known[start:end]
        if not self._has_room(row, len(part)):
            return 0
        self._take([row], [part], events)
        return len(part)

    # ---- all rows ----

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """Return the rows that go through the model together.

        They are those that the compiled step takes, as many as it takes, and the rest. Where
        experts mix rows, only those of one adapter go together.
        """
        if any(self.model.config.moe_layers or ()):
            names = {row.request.adapter for row in rows}
            return [[row for row in rows if row.request.adapter == name] for name in names]
        compiled = [row for row in rows if row.request.adapter in self._compiled]
        rest = [row for row in rows if row.request.adapter not in self._compiled]
        n = COMPILED_ROWS
        return [compiled[i : i + n] for i in range(0, len(compiled), n)] + [rest] * bool(rest)

    def _continue(self, rows: list[Row], events: list[Event]) -> None:
        """Take the next token of each row, and pick the one after it."""
        self._take(rows, [[row.ids[row.held.length]] for row in rows], events)

    def _take(self, rows: list[Row], ids: list[list[int]], events: list[Event]) -> None:
        """Take these tokens of each row; pick the next of those that have no other left."""
        lines, tokens = [row.held for row in rows], torch.tensor(ids, device=self.model.device)
        try:
            logits = self.decoding(lines, tokens, adapters=[row.request.adapter for row in rows])
        except LorakitError as error:  # an adapter was taken off
            for row in rows:
                self._fail(row, error, events)
            return
        for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
            if not self.model.config.by_length:
                self.cache.name(line, self._known(row), self._unit(row))
            if line.length == len(row.ids):
                self._share(row, logits[i : i + 1], events)
                self._push(row, logits[i : i + 1], events)

    def _share(self, row: Row, logits: Tensor, events: list[Event]) -> None:
        """Let the others with the prompt that a row has just read go on from there too."""
        if row.request.tokens:  # the others have it from before
            return
        for other in [each for each in self._running if each.will_read_as(row)]:
            if self.cache.copy(other.held, row.held):
                other.request.cached_tokens = len(row.ids)
                self._push(other, logits, events)

    def _push(self, row: Row, logits: Tensor, events: list[Event]) -> None:
        """Pick the next token of a row from its logits [1, V]; end the row where it ends."""
        request, text = row.request, row.text
        try:
            token = row.picker.pick(logits)
        except LorakitError as error:
            self._fail(row, error, events)
            return
        text.push(token, row.ends)
        if len(text.ids) == len(request.tokens):  # an end token
            request.end(logits[0], token)
            self._end(row, "stop", None, events)
            return
        request.tokens.append(token)
        row.ids.append(token)
        request.keep_logprobs(logits[0], token)
        if not text.running or row.picker.ended:
            self._end(row, "stop", token, events)
        elif len(request.tokens) == request.max_new_tokens:
            self._end(row, "length", token, events)
        else:
            events.append(Event(request, token, row.new_text()))

    def _fail(self, row: Row, error: LorakitError, events: list[Event]) -> None:
        """End a row by an error; nobody takes over what it holds, which may be NaN."""
        row.request.error = error
        if row.line is not None:
            self.cache.release(row.line, forget=True)
        self._end(row, "error", None, events)

    def _end(self, row: Row, reason: str, token: int | None, events: list[Event]) -> None:
        request = row.request
        if row in self._running:
            self._running.remove(row)
        elif row in self._waiting:
            self._waiting.remove(row)
        self._put_off(row)
        request.finish_reason = reason
        row.text.finish()
        events.append(Event(request, token, row.new_text()))


def _same(some: list[object], others: list[object] | None) -> bool:
    """Return whether two lists hold the same objects."""
    return others is not None and list(map(id, some)) == list(map(id, others))
