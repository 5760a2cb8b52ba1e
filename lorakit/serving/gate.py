"""The gate before the routes: it looks at the host and the key, and counts the answers."""

import hmac
from urllib.parse import urlsplit

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.serving.answers import to_json
from lorakit.serving.refusals import Refusal


class Gate:
    """An ASGI application that lets requests through to another."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, hosts: list[str] | None, responses: Counter
    ):
        """Stand before an application.

        Args:
            app: The application.
            api_key: What requests under /v1 must bring; None: nothing.
            hosts: The names under which the server may be asked; None: any.
            responses: The count of answers by path and status.
        """
        self.app, self.api_key, self.hosts, self.responses = app, api_key, hosts, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a refusal."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.responses.labels(_path(scope), message["status"]).inc()
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._wrong_host(headers) or self._wrong_key(scope["path"], headers)
        if refusal is None:
            await self.app(scope, receive, counted)
            return
        response = Response(
            to_json(refusal.body), refusal.status, refusal.headers, "application/json"
        )
        await response(scope, receive, counted)

    def _wrong_host(self, headers: Headers) -> Refusal | None:
        if self.hosts is None:
            return None
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if host in self.hosts:
            return None
        names = ", ".join(self.hosts)
        return Refusal(403, f"The header 'Host' must name this machine: {names}.")

    def _wrong_key(self, path: str, headers: Headers) -> Refusal | None:
        if self.api_key is None or not path.startswith("/v1/"):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() == "bearer" and right:
            return None
        return Refusal(
            401,
            "Incorrect API key: send the header 'Authorization: Bearer KEY' with the key of "
            "--api-key.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _path(scope: Scope) -> str:
    """Return the path of the route that took a request, "other" if none did."""
    route = scope.get("route")
    return "other" if route is None else route.path
