"""The gate before the pages: who may ask, and what every answer carries.

A board can start programs, so it answers only the browser of whoever has its address. The address
holds a random token. Another page that is open in the same browser does not know it, and a name of
another host that leads here (DNS rebinding) is refused by the header Host. A request that changes
something must be JSON from the board's own page, which a form of another page cannot send.
"""

import hmac
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.board.answers import refused
from lorakit.serving.refusals import Refusal

HOSTS = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Gate:
    """An ASGI application that lets requests through to another."""

    def __init__(self, app: ASGIApp, token: str):
        """Stand before an application.

        Args:
            app: The application, which gets the paths behind the token as they were sent, with
                their percent signs: so "%2F" is no slash.
            token: The first part of each path.
        """
        self.app, self.token = app, token
        self.tickets: set[str] = set()

    def ticket(self) -> str:
        """Return a path that leads to the page once.

        The command line of a browser that is opened with it, which other users of the machine may
        see, does not tell them the token.
        """
        self.tickets.add(ticket := secrets.token_urlsafe(32))
        return ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a refusal."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        sent = scope.get("raw_path", b"").partition(b"?")[0].decode("latin-1")
        token, slash, rest = sent.removeprefix("/").partition("/")
        refusal = _wrong_host(headers)
        if refusal is None and scope["method"] == "GET" and token in self.tickets:
            self.tickets.remove(token)
            token, slash = self.token, ""
        refusal = refusal or self._wrong_token(token)
        if refusal is None and scope["method"] not in ("GET", "HEAD"):
            refusal = _foreign(headers)
        if refusal is not None:
            await refused(refusal)(scope, receive, with_headers)
            return
        if not slash:  # without the slash the page would look for its files elsewhere
            to = Response(status_code=307, headers={"Location": f"/{token}/"})
            await to(scope, receive, with_headers)
            return
        path = f"/{rest}"
        inner = {**scope, "path": path, "raw_path": path.encode("latin-1")}
        await self.app(inner, receive, with_headers)

    def _wrong_token(self, token: str) -> Refusal | None:
        if hmac.compare_digest(token.encode("latin-1"), self.token.encode()):
            return None
        return Refusal(403, "This address lacks the token of the board: open the one it printed.")


def _wrong_host(headers: Headers) -> Refusal | None:
    if len(headers.getlist("host")) == 1 and _host(f"//{headers['host']}") in HOSTS:
        return None
    return Refusal(403, f"The header Host must name this machine: {', '.join(HOSTS)}.")


def _foreign(headers: Headers) -> Refusal | None:
    """Return the refusal of a request that changes something, if another page may have sent it."""
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{headers['host'].lower()}":
        return Refusal(403, "The request comes from another page.")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return Refusal(403, "The request comes from another page.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return Refusal(415, "The header Content-Type must be application/json.")
    return None


def _host(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018  # raises for what is no port
        return None if "@" in address else parts.hostname
    except ValueError:
        return None
