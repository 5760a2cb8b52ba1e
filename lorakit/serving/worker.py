"""The thread that computes, and the way between it and the event loop that serves.

    event loop                                    the worker's thread
    begin(job)      -- inbox, a queue of calls -> engine.submit(...) for each row of the job
    job.pieces      <- call_soon_threadsafe ---   engine.step(), again and again

One thread owns the model. What others want of it, they put into its inbox as a call, which it makes
between two steps. It sleeps while there is nothing to do. A step wakes the event loop once, however
many rows it continued.

Whatever a request asks, it costs the others nothing: an error that a step raises ends the rows that
ran with it, and a new engine takes the next.
"""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from lorakit.inference.engine import Engine
from lorakit.inference.grammar import Constraint
from lorakit.inference.request import Event, Request
from lorakit.inference.sampling import Sampling
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.serving.refusals import Refusal, shutting_down

T = TypeVar("T")

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Piece:
    """What a step did for one row of a job."""

    row: int
    """The number of the row."""
    text: str
    """The text that became certain."""
    token: int | None
    """The new token, None if there is none."""
    logprob: float
    """The token's log-probability, if the job wants it."""
    likeliest: list[tuple[int, float]]
    """The likeliest tokens in its place with their log-probabilities, as many as the job wants."""
    finish_reason: str | None
    """Why the row has ended, None if it goes on: "stop", "length", "cancelled" or "error"."""
    error: Refusal | None
    """What the client gets instead of the rest, if something went wrong."""
    new_tokens: int
    """How many tokens the row has got so far."""
    cached_tokens: int
    """How many tokens of its prompt were taken over from another row."""


@dataclass(frozen=True)
class Row:
    """One text to make."""

    prompt: list[int]
    """The token ids to continue."""
    max_new_tokens: int | None
    """Most tokens that it gets; None: as many as there is room for."""
    seed: int | None
    """The seed of its draws; None: a new one."""
    constraint: Constraint | None
    """What the text may consist of, of this row alone; None: anything."""


@dataclass(eq=False)
class Job:
    """The texts that one client waits for."""

    rows: list[Row]
    """The texts to make."""
    model: str
    """The name that the client gave the model, for metrics."""
    adapter: str | None
    """The adapter that the rows go through, by its name in the model."""
    sampling: Sampling
    """How tokens are picked."""
    stop: list[str]
    """Strings before which a text ends."""
    logit_bias: dict[int, float]
    """What is added to the logits of some tokens."""
    logprobs: int | None
    """How many likeliest tokens are told at each position; None: no log-probabilities."""
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    """What became of the rows, for the client's coroutine; each row's last piece has a reason."""
    requests: list[Request] = field(default_factory=list)
    """The rows as the engine has them."""
    began: float = field(default_factory=time.monotonic)
    """When the job came, in seconds of a clock."""
    started: set[int] = field(default_factory=set)
    """The rows that have got something."""
    ended: int = 0
    """How many rows have ended."""

    def cancel(self) -> None:
        """Free the rows that still run; nobody waits for them any more."""
        for request in self.requests:
            request.cancel()


class Worker:
    """The thread, its engine, and the jobs that it has."""

    def __init__(
        self,
        model: Decoder,
        tok: Tokenizer,
        *,
        slots: int,
        capacity: int | None,
        most_waiting: int,
        told: Callable[[Job, Piece], None],
    ):
        """Make the engine; `start` begins.

        Args:
            model: The model, which the thread owns from `start` on.
            tok: Its tokenizer.
            slots: How many rows run at a time.
            capacity: Positions that a row may reach, as in `Engine`.
            most_waiting: How many rows may wait beside those that run.
            told: Called in the event loop with each piece, before the client's coroutine has it.

        Raises:
            LorakitError: As `Engine` does.
        """
        self._make = lambda: Engine(model, tok, slots=slots, capacity=capacity)
        self.engine = self._make()
        self.capacity = self.engine.capacity
        self.most_rows, self.rows = slots + most_waiting, 0
        self.told, self.closing = told, False
        self.jobs: list[Job] = []
        self._of: dict[Request, tuple[Job, int]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lorakit", daemon=True)

    # ---- called in the event loop ----

    def start(self) -> None:
        """Begin to compute; the running event loop gets what becomes of the jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def call(self, function: Callable[[], T]) -> T:
        """Return what a function gives that the worker's thread calls between two steps."""
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(done)

    async def begin(self, job: Job) -> None:
        """Take a job; its pieces come from now on.

        Raises:
            Refusal: The server is shutting down, or too many rows wait.
            LorakitError: The engine refuses a row. None of the job's rows runs then.
        """
        if self.closing:
            raise shutting_down()
        if len(job.rows) > self.most_rows:
            raise Refusal(
                400,
                f"{len(job.rows)} texts at once are more than this server takes, "
                f"{self.most_rows}: send several requests.",
                param="n",
            )
        if self.rows + len(job.rows) > self.most_rows:
            raise Refusal(
                429,
                f"{self.rows} texts are being made or wait here already: ask again in a moment.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.rows += len(job.rows)
        self.jobs.append(job)
        try:
            await self.call(lambda: self._submit(job))
        except BaseException:
            self.rows -= len(job.rows)
            self.jobs.remove(job)
            raise

    def using(self, adapter: str) -> bool:
        """Return whether a row goes through an adapter."""
        return any(job.adapter == adapter for job in self.jobs)

    def close(self) -> None:
        """End every row, and refuse new jobs; the clients get an error object."""
        self.closing = True
        for job in self.jobs:
            job.cancel()

    async def stop(self) -> None:
        """End the thread, once every row has ended."""
        self.close()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _deliver(self, found: list[tuple[Job, Piece]]) -> None:
        for job, piece in found:
            if piece.finish_reason is not None:
                self.rows -= 1
                job.ended += 1
                if job.ended == len(job.rows):
                    self.jobs.remove(job)
            self.told(job, piece)
            job.started.add(piece.row)
            job.pieces.put_nowait(piece)

    # ---- the worker's thread ----

    def _work(self) -> None:
        running = True
        while running or not self.engine.idle:
            try:
                wait = self.engine.idle
                while (call := self._inbox.get(block=wait)) is not None:
                    call()
                    wait = False
                running = False
            except queue.Empty:
                pass
            self._hand_on(self._step())

    def _step(self) -> list[tuple[Job, Piece]]:
        try:
            return [self._piece(event) for event in self.engine.step() if event.request in self._of]
        except Exception:
            log.exception("lorakit: a step failed; the texts that ran are lost")
            lost, self._of = self._of, {}
            self.engine = self._make()
            error = Refusal(500, "The model failed on this text, or on one beside it.")
            return [
                (job, Piece(row, "", None, 0.0, [], "error", error, len(request.tokens), 0))
                for request, (job, row) in lost.items()
            ]

    def _submit(self, job: Job) -> None:
        try:
            for row in job.rows:
                job.requests.append(self._request(job, row))
            if self.closing:
                raise shutting_down()
        except BaseException:
            job.cancel()
            raise
        self._of |= {request: (job, i) for i, request in enumerate(job.requests)}

    def _request(self, job: Job, row: Row) -> Request:
        return self.engine.submit(
            row.prompt,
            job.sampling,
            max_new_tokens=row.max_new_tokens,
            adapter=job.adapter,
            stop=job.stop,
            seed=secrets.randbelow(2**63) if row.seed is None else row.seed,
            logit_bias=job.logit_bias,
            constraint=row.constraint,
            logprobs=job.logprobs,
        )

    def _hand_on(self, found: list[tuple[Job, Piece]]) -> None:
        if found:
            self._loop.call_soon_threadsafe(self._deliver, found)

    def _piece(self, event: Event) -> tuple[Job, Piece]:
        request = event.request
        job, row = self._of[request]
        if request.done:
            del self._of[request]
        error = None
        if request.finish_reason == "error":
            error = Refusal(500, f"The text could not be made: {request.error}.")
        if request.finish_reason == "cancelled" and self.closing:
            error = shutting_down()
        wanted = job.logprobs is not None and event.token is not None
        piece = Piece(
            row,
            event.text,
            event.token,
            request.logprobs[-1] if wanted else 0.0,
            request.top_logprobs[-1] if wanted else [],
            request.finish_reason,
            error,
            len(request.tokens),
            request.cached_tokens,
        )
        return job, piece
