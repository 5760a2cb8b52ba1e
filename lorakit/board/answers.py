"""What the routes of a board share: answers in JSON, and what requests ask for."""

from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from lorakit.board.as_json import to_json
from lorakit.board.folder import NotThereError
from lorakit.serving.fields import Fields, read_object
from lorakit.serving.refusals import Refusal

MOST_BYTES = 1 << 20
"""Longest body of a request: a run file, or a chat."""
FAILED = "The board failed on this request; its terminal says how."
"""What the page says when lorakit itself failed."""


def answer(value: object, status: int = 200) -> Response:
    """Return a response of JSON."""
    return Response(to_json(value), status, media_type="application/json")


def refused(refusal: Refusal) -> Response:
    """Return the response to a request that is refused."""
    response = answer({"error": refusal.message}, refusal.status)
    response.headers.update(refusal.headers)
    return response


# ---- requests ----


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, {} if that is empty.

    Raises Refusal if it is too long, or no object.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"The body of the request is longer than {MOST_BYTES} bytes.")
    return read_object(bytes(body)) if body else {}


async def texts_of(request: Request, *names: str) -> list[str]:
    """Return the texts in a request's body, which must be there."""
    fields = Fields(await body_of(request))
    texts = [fields.needed(name, str) for name in names]
    fields.finish()
    return texts


def id_of(request: Request) -> str:
    """Return the id in a path. Raises NotThereError if it is no text in UTF-8."""
    try:
        return unquote(request.path_params["id"], errors="strict")
    except UnicodeDecodeError:
        raise NotThereError("an id must be text in UTF-8") from None


def number_of(request: Request, name: str, default: int) -> int:
    """Return a whole number of the query. Raises Refusal if it is none."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise Refusal(400, f"{name} must be a whole number from 0 on, not {text[:40]!r}.")
    return int(text)
