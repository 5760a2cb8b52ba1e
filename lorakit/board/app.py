"""The paths of a board, over a folder of runs.

The paths are those behind the token, as they were sent: an id is one part of a path, with its
slashes as "%2F". Reading files goes on in threads, so that a slow disk holds nobody up.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lorakit.board.answers import FAILED, answer, refused
from lorakit.board.chat_routes import ChatRoutes
from lorakit.board.comparison_routes import ComparisonRoutes
from lorakit.board.folder import Folder, NotThereError
from lorakit.board.gate import Gate
from lorakit.board.run_routes import RunRoutes
from lorakit.board.work import Work
from lorakit.config.errors import LorakitError
from lorakit.serving.refusals import Refusal

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


class Board:
    """The routes, and what they work with."""

    def __init__(self, folder: Folder):
        """Read nothing yet.

        Args:
            folder: The folder that is shown.
        """
        self.folder, self.work = folder, Work()
        self.runs = RunRoutes(folder, self.work)
        self.comparisons = ComparisonRoutes(folder, self.work)
        self.chat = ChatRoutes(folder, self.work)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/", self.page, methods=["GET"]),
            Route("/static/{file:path}", self.static, methods=["GET"]),
            Route("/api/board", self.about, methods=["GET"]),
            *self.runs.routes(),
            *self.comparisons.routes(),
            *self.chat.routes(),
        ]

    def close(self) -> None:
        """End what takes long: the server ends. Runs go on."""
        self.runs.control.close()
        self.chat.close()
        self.work.end()

    # ---- the page ----

    async def page(self, request: Request) -> Response:
        """Answer with the page."""
        return _file("index.html")

    async def static(self, request: Request) -> Response:
        """Answer with a file of the page."""
        return _file(request.path_params["file"])

    async def about(self, request: Request) -> Response:
        """Answer with the name of the folder."""
        return answer({"name": self.folder.root.name})


def _file(name: str) -> Response:
    """Return a file of the page, which must be one of its folder by the name that it has there."""
    there = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
    path = there.get(name)
    if path is None or path.suffix not in KINDS:
        raise Refusal(404, f"The page has no file {name[:100]!r}.")
    return Response(path.read_bytes(), media_type=KINDS[path.suffix])


# ---- the application ----


async def _refused(request: Request, error: Exception) -> Response:
    """Answer a request that is refused, by a route or because there is none."""
    if isinstance(error, Refusal):
        return refused(error)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:100]}"
        said = "there is no such path" if error.status_code == 404 else error.detail
        return refused(Refusal(error.status_code, f"{what}: {said}."))
    return refused(Refusal(404 if isinstance(error, NotThereError) else 409, f"{error}."))


async def _failed(request: Request, error: Exception) -> Response:
    """Answer a request on which lorakit itself failed; the log has the traceback."""
    return refused(Refusal(500, FAILED))


async def _gone(request: Request, error: Exception) -> Response:
    """Answer nobody: the page was closed."""
    return Response(status_code=400)


def application(board: Board, token: str) -> Gate:
    """Return a board as an ASGI application.

    Args:
        board: The routes.
        token: The first part of every path.

    Returns:
        The application.
    """
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: _refused,
        Refusal: _refused,
        LorakitError: _refused,
        OSError: _refused,  # a full disk, or a folder that may not be written to
        ClientDisconnect: _gone,
        Exception: _failed,
    }

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await board.chat.end()

    app = Starlette(routes=board.routes(), exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return Gate(app, token)
