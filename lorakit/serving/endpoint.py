"""The routes of the endpoint, over one worker.

A request goes this way: the application checks key and host, a route reads the JSON object,
protocol.py makes a dataclass of it, the prompt becomes token ids beside the event loop, and the
worker takes the job. Then the pieces go out, as a stream or as one object. A client that leaves
frees its rows: both ways watch for it.

A page of another site, open in a browser on the same machine, can send requests to loopback. It
cannot send JSON without asking first (CORS), and the answer to that is no; so other content types
are refused. Nor can it reach loopback under a name of its own, since `Host` must be one of
loopback's there.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lorakit.config.errors import LorakitError
from lorakit.inference.grammar import Constraint, json_object, json_schema
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.serving.adapters import Models, Served
from lorakit.serving.answers import Answer, ChatAnswer, TextAnswer, to_json
from lorakit.serving.fields import Fields, read_object
from lorakit.serving.gate import Gate
from lorakit.serving.metrics import CONTENT_TYPE, Metrics
from lorakit.serving.protocol import (
    Chat,
    Completion,
    Generation,
    parse_chat,
    parse_completion,
)
from lorakit.serving.refusals import Refusal
from lorakit.serving.tokens import TokenTexts
from lorakit.serving.worker import Job, Row, Worker

_MOST_BYTES = 4 << 20
"""Longest body of a request: several times the text of the longest context that models have."""


class Endpoint:
    """The routes, and what they work with."""

    def __init__(
        self,
        model: Decoder,
        tok: Tokenizer,
        models: Models,
        *,
        slots: int,
        capacity: int | None,
        most_waiting: int,
        may_load: bool,
    ):
        """Make the worker; it begins with the application.

        Args:
            model: The model, with the adapters that `models` names.
            tok: Its tokenizer.
            models: The names that clients use.
            slots: How many texts are made at a time.
            capacity: Positions that a text may reach with its prompt.
            most_waiting: How many texts may wait.
            may_load: Whether clients may load and unload adapters.

        Raises:
            LorakitError: An option is outside its range, or an adapter cannot have rows of its own.
        """
        self.may_load = may_load
        self.tok, self.models, self.metrics = tok, models, Metrics()
        self.vocabulary, self.texts = model.config.vocab_size, TokenTexts(tok)
        self.worker = Worker(
            model,
            tok,
            slots=slots,
            capacity=capacity,
            most_waiting=most_waiting,
            told=self.metrics.told,
        )
        for served in models.served.values():
            self.worker.engine.check_adapter(served.adapter)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.page_of_metrics, methods=["GET"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
        ]

    # ---- what is here ----

    async def health(self, request: Request) -> Response:
        """Answer whether requests are taken."""
        if self.worker.closing:
            return Response(status_code=503)
        return Response()

    async def page_of_metrics(self, request: Request) -> Response:
        """Answer with the figures for Prometheus."""
        return Response(self.metrics.page(self.worker), headers={"Content-Type": CONTENT_TYPE})

    async def list_models(self, request: Request) -> Response:
        """Answer with the models that are served."""
        cards = [self._card(each) for each in self.models.served.values()]
        return answer({"object": "list", "data": cards})

    async def one_model(self, request: Request) -> Response:
        """Answer with one of the models."""
        return answer(self._card(self.models.find(request.path_params["name"])))

    def _card(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "lorakit",
            "parent": None if served.adapter is None else self.models.base,
            "max_model_len": self.worker.capacity,
        }

    # ---- adapters, as vLLM has them ----

    async def load_adapter(self, request: Request) -> Response:
        """Load an adapter that clients may choose from now on."""
        self._check_may_load()
        fields = Fields(await body_of(request))
        name, path = fields.needed("lora_name", str), fields.needed("lora_path", str)
        try:
            await self.models.load(name, path, self.worker)
        except (LorakitError, OSError, UnicodeEncodeError) as error:
            raise Refusal(400, f"The adapter was not loaded: {error}.", param="lora_path") from None
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """Forget an adapter, once the texts that it makes have ended."""
        self._check_may_load()
        name = Fields(await body_of(request)).needed("lora_name", str)
        await self.models.unload(name, self.worker)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_may_load(self) -> None:
        if not self.may_load:
            message = "Adapters are loaded only where --api-key says who may, or on loopback."
            raise Refusal(403, message)

    # ---- texts ----

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        asked = parse_chat(await body_of(request))
        served = self.models.find(asked.generation.model)
        ids, constraints = await asyncio.to_thread(self._prepare, asked, served)
        job = self._job(asked.generation, served, [ids], constraints)
        made = ChatAnswer(job, self.texts, len(ids), asked.generation.n, asked.tools)
        return await self._answer(request, asked.generation, job, made, made.beginning())

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        asked = parse_completion(await body_of(request))
        served = self.models.find(asked.generation.model)
        prompts = await asyncio.to_thread(self._prompt_ids, asked)
        n = asked.generation.n
        echoed = [self.tok.decode(ids) if asked.echo else "" for ids in prompts for _ in range(n)]
        job = self._job(asked.generation, served, prompts, [None] * (len(prompts) * n))
        made = TextAnswer(job, self.texts, sum(map(len, prompts)), n, echoed)
        return await self._answer(request, asked.generation, job, made, made.beginning())

    def _prepare(self, asked: Chat, served: Served) -> tuple[list[int], list[Constraint | None]]:
        """Return the token ids of a chat, and what each of its answers may consist of."""
        constraints: list[Constraint | None] = [None] * asked.generation.n
        try:
            ids = served.tok.apply_chat_template(
                asked.messages, add_generation_prompt=True, tools=asked.tools, **asked.variables
            )
        except LorakitError as error:
            raise Refusal(400, f"{error}.", param="messages") from None
        try:
            if asked.form == "json_object":
                constraints = [json_object(self.tok) for _ in constraints]
            elif asked.form is not None:
                constraints = [json_schema(asked.form, self.tok) for _ in constraints]
        except LorakitError as error:
            raise Refusal(400, f"{error}.", param="response_format") from None
        return ids, constraints

    def _prompt_ids(self, asked: Completion) -> list[list[int]]:
        try:
            return [self.tok.encode(p) if isinstance(p, str) else p for p in asked.prompts]
        except LorakitError as error:
            raise Refusal(400, f"{error}.", param="prompt") from None

    def _job(
        self,
        asked: Generation,
        served: Served,
        prompts: list[list[int]],
        constraints: list[Constraint | None],
    ) -> Job:
        """Return the job of a request, whose prompts must fit; a constraint is that of a row."""
        for ids in prompts:
            self._check_fits(ids, asked.max_tokens)
        rows: list[Row] = []
        for ids in prompts:
            for i in range(asked.n):
                seed = None if asked.seed is None else (asked.seed + i) % 2**63
                rows.append(Row(ids, asked.max_tokens, seed, constraints[len(rows)]))
        return Job(
            rows=rows,
            model=served.name,
            adapter=served.adapter,
            sampling=asked.sampling,
            stop=[*asked.stop, *served.ends],
            logit_bias=asked.logit_bias,
            logprobs=asked.logprobs,
        )

    def _check_fits(self, ids: list[int], max_tokens: int | None) -> None:
        """Refuse a prompt that is empty, too long, or no tokens of the model."""
        if not ids:
            raise Refusal(400, "The prompt has no tokens.", param="prompt", code="invalid_value")
        if max(ids) >= self.vocabulary:
            raise Refusal(
                400,
                f"Token {max(ids)} lies outside the model's vocabulary of {self.vocabulary}.",
                param="prompt",
                code="invalid_value",
            )
        room = self.worker.capacity
        if len(ids) + (max_tokens or 1) > room:
            raise Refusal(
                400,
                f"This model's maximum context length is {room} tokens. However, you requested "
                f"{len(ids) + (max_tokens or 1)} tokens ({len(ids)} in the prompt, "
                f"{max_tokens or 'at least 1'} in the answer). Please reduce one of them.",
                param="messages",
                code="context_length_exceeded",
            )

    async def _answer(
        self,
        request: Request,
        asked: Generation,
        job: Job,
        made: Answer,
        beginning: list[dict[str, Any]],
    ) -> Response:
        """Return the response of a job, which begins now."""
        try:
            await self.worker.begin(job)
        except LorakitError as error:
            raise Refusal(400, f"{error}.") from None
        if asked.stream:
            return _Stream(job, _chunks(job, made, beginning, asked.include_usage))
        try:
            await _until_gone(request, _finish(job, made))
        finally:
            job.cancel()
        return answer(made.whole())


async def _finish(job: Job, made: Answer) -> None:
    """Take the pieces of a job until all its rows have ended."""
    left = len(job.rows)
    while left:
        piece = await job.pieces.get()
        if piece.error is not None:
            raise piece.error
        made.take(piece)
        left -= piece.finish_reason is not None


async def _until_gone(request: Request, work: Awaitable[None]) -> None:
    """Wait for some work; end it, and raise ClientDisconnect, if the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _chunks(
    job: Job, made: Answer, beginning: list[dict[str, Any]], include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    more: dict[str, Any] = {"usage": None} if include_usage else {}

    def event(choices: list[dict[str, Any]]) -> bytes:
        return _event(made.chunk(choices) | more)

    for choice in beginning:
        yield event([choice])
    left = len(job.rows)
    while left:
        piece = await job.pieces.get()
        if piece.error is not None:
            yield _event(piece.error.body)
            break
        left -= piece.finish_reason is not None
        told = made.take(piece)
        if told is not None:
            yield event([told])
    else:
        if include_usage:
            yield _event(made.chunk([]) | {"usage": made.usage()})
    yield b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


class _Stream(StreamingResponse):
    """A stream of events that frees the rows of its job however it ends."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


def answer(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(
        to_json(value), status_code=status, media_type="application/json", headers=headers
    )


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        Refusal: It is not said to be JSON, too long, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "The header 'Content-Type' must be 'application/json'.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise Refusal(413, f"The body of the request is longer than {_MOST_BYTES} bytes.")
    return read_object(bytes(body))


# ---- the application ----


async def _refused(request: Request, error: Exception) -> Response:
    """Answer a request that is refused, by a route or because there is none."""
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:100]}"
        said = "there is no such path" if error.status_code == 404 else error.detail
        error = Refusal(error.status_code, f"{what}: {said}.", headers=dict(error.headers or {}))
    assert isinstance(error, Refusal)
    return answer(error.body, error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer a request on which lorakit itself failed; the log has the traceback."""
    return answer(Refusal(500, "The server failed on this request; its log says how.").body, 500)


async def _gone(request: Request, error: Exception) -> Response:
    """Answer nobody: the client has left."""
    return Response(status_code=400)


def application(endpoint: Endpoint, *, api_key: str | None, hosts: list[str] | None) -> Starlette:
    """Return the endpoint as an ASGI application.

    Args:
        endpoint: The routes.
        api_key: What clients must send as bearer token under /v1; None: nothing.
        hosts: The names under which the server may be asked; None: any.

    Returns:
        The application. Its lifespan starts and stops the worker.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        endpoint.worker.start()
        yield
        await endpoint.worker.stop()

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: _refused,
        Refusal: _refused,
        ClientDisconnect: _gone,
        Exception: _failed,
    }
    app = Starlette(routes=endpoint.routes(), exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.add_middleware(Gate, api_key=api_key, hosts=hosts, responses=endpoint.metrics.responses)
    return app
