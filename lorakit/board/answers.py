"""The answers of a board: JSON, an error of one sentence, and the body of a request."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lorakit.board.as_json import to_json
from lorakit.serving.fields import read_object
from lorakit.serving.refusals import Refusal

MOST_BYTES = 1 << 20
"""Longest body of a request: a run file, or a chat."""


def answer(value: object, status: int = 200) -> Response:
    """Return a response of JSON."""
    return Response(to_json(value), status, media_type="application/json")


def refused(refusal: Refusal) -> Response:
    """Return the response to a request that is refused."""
    response = answer({"error": refusal.message}, refusal.status)
    response.headers.update(refusal.headers)
    return response


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
