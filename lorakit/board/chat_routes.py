"""The paths of the chat: what it can talk to, and a stream of what both sides answer.

POST api/chat {"base", "sides": [name, name], "messages": [[...], [...]], "max_new_tokens",
"temperature", "seed"}

data: {"loading": "the base"}              while a base is loaded that was not
data: {"side": 0, "text": "Hello"}           as the texts become
data: {"side": 1, "done": true}            a side has ended
data: {"side": 1, "error": "a sentence"}   a side has failed, and the other goes on
data: {"error": "a sentence"}              neither can be answered
data: {"done": true}                       the last event, whatever came before
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lorakit.board.answers import FAILED, answer, body_of
from lorakit.board.as_json import to_json
from lorakit.board.choices import Choice, choices
from lorakit.board.folder import Folder
from lorakit.board.work import Work
from lorakit.config.errors import LorakitError
from lorakit.serving.fields import Fields
from lorakit.serving.refusals import Refusal

if TYPE_CHECKING:
    from lorakit.board.chat import Asked, Chat, Loaded
    from lorakit.serving.worker import Job

log = logging.getLogger("lorakit")

_ROLES = ("system", "user", "assistant")
_MOST_SIDES = 2


@dataclass(frozen=True)
class Question:
    """What a request asks."""

    base: Choice
    sides: list[Choice]
    messages: list[list[dict[str, Any]]]
    max_new_tokens: int
    temperature: float
    seed: int | None


class ChatRoutes:
    """The routes of the chat."""

    def __init__(self, folder: Folder, work: Work):
        """Load nothing yet.

        Args:
            folder: The folder that is shown.
            work: What takes long.
        """
        self.folder, self.work = folder, work
        self.chat: Chat | None = None

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/models", self.list_models, methods=["GET"]),
            Route("/api/chat", self.answer, methods=["POST"]),
        ]

    def close(self) -> None:
        """End every answer."""
        if self.chat is not None:
            self.chat.close()

    async def end(self) -> None:
        """End the thread that makes answers."""
        if self.chat is not None:
            await self.chat.end()

    async def list_models(self, request: Request) -> Response:
        """Answer with what the chat can talk to."""
        found = await asyncio.to_thread(choices, self.folder)
        return answer([each.told() for each in found.values()])

    async def answer(self, request: Request) -> Response:
        """Answer a chat with a stream of events."""
        there = await asyncio.to_thread(choices, self.folder)
        question = _question(Fields(await body_of(request)), there)
        return _Stream(self, question)

    async def loaded_chat(self) -> "Chat":
        """Return what makes answers. To import it takes seconds at the first time."""

        def make() -> type["Chat"]:
            from lorakit.board.chat import Chat

            return Chat

        if self.chat is None:
            kind = await self.work.aside(make)
            self.chat = self.chat or kind()
        return self.chat


class _Stream(StreamingResponse):
    """The events of a chat. Its texts end with it, however it ends: the page may be closed."""

    def __init__(self, routes: ChatRoutes, question: Question):
        super().__init__(self._events(), media_type="text/event-stream")
        self.routes, self.question = routes, question
        self.jobs: list[Job] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for task in self.tasks:
                task.cancel()
            for job in self.jobs:
                job.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for value in self._values():
                yield _event(value)
        except Exception as error:
            yield _event({"error": _sentence(error)})
        yield _event({"done": True})

    async def _values(self) -> AsyncIterator[dict[str, Any]]:
        question = self.question
        chat = await self.routes.loaded_chat()
        if not chat.is_loaded(question.base):
            yield {"loading": question.base.name}
        loaded = await self.routes.work.wait(chat.use(question.base))
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for i in range(len(question.sides)):
            side = self._side(chat, loaded, i, told)
            self.tasks.append(asyncio.ensure_future(side))
        left = len(self.tasks)
        while left:
            value = await told.get()
            left -= "text" not in value
            yield value

    async def _side(
        self, chat: "Chat", loaded: "Loaded", i: int, told: "asyncio.Queue[dict[str, Any]]"
    ) -> None:
        """Tell what a side answers, and in the end that it is done or why not."""
        question = self.question
        try:
            side, messages = question.sides[i], question.messages[i]
            job = await chat.job(loaded, side, messages, _asked(question))
            self.jobs.append(job)
            while True:
                piece = await job.pieces.get()
                if piece.error is not None:
                    raise piece.error
                if piece.text:
                    await told.put({"side": i, "text": piece.text})
                if piece.finish_reason is not None:
                    break
            await told.put({"side": i, "done": True})
        except Exception as error:
            await told.put({"side": i, "error": _sentence(error)})


def _asked(question: Question) -> "Asked":
    from lorakit.board.chat import Asked

    return Asked(question.max_new_tokens, question.temperature, question.seed)


def _event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _sentence(error: Exception) -> str:
    """Return what the page says of an error. The log has one that nobody foresaw."""
    if isinstance(error, Refusal):
        return error.message
    if isinstance(error, (LorakitError, OSError)):
        return f"{error}."
    log.error("lorakit: a chat failed", exc_info=error)
    return FAILED


def _question(fields: Fields, there: dict[str, Choice]) -> Question:
    """Return what a request asks. Raises Refusal if it is wrong."""
    base = _chosen(fields.needed("base", str), there)
    names = fields.needed("sides", list)
    if not 1 <= len(names) <= _MOST_SIDES or not all(isinstance(n, str) for n in names):
        raise Refusal(400, f"sides must be a list of 1 to {_MOST_SIDES} names.")
    sides = [_chosen(name, there) for name in names]
    for side in sides:
        if side.base != base.name:
            raise Refusal(400, f"{side.name[:100]} belongs to {side.base}, not to {base.name}.")
    messages = fields.needed("messages", list)
    if len(messages) != len(sides):
        raise Refusal(400, "messages must be a list of chats, one for each side.")
    question = Question(
        base=base,
        sides=sides,
        messages=[_messages(each) for each in messages],
        max_new_tokens=fields.whole("max_new_tokens", 1, 1 << 20) or 256,
        temperature=fields.number("temperature", 0.0, 10.0, 0.0),
        seed=fields.whole("seed", 0, 2**63 - 1),
    )
    fields.finish()
    return question


def _chosen(name: str, there: dict[str, Choice]) -> Choice:
    if name not in there:
        raise Refusal(404, f"There is no model {name[:100]!r} to talk to in this folder.")
    return there[name]


def _messages(chat: object) -> list[dict[str, Any]]:
    if not isinstance(chat, list) or not chat:
        raise Refusal(400, "A chat must be a list of at least one message.")
    for message in chat:
        named = isinstance(message, dict) and set(message) == {"role", "content"}
        if not named or message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise Refusal(
                400, f"A message must have a role, one of {', '.join(_ROLES)}, and a text, content."
            )
    return chat
