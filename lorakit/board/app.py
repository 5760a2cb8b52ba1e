"""The paths of a board, over a folder of runs.

The paths are those behind the token, as they were sent: an id is one part of a path, with its
slashes as "%2F". Reading files goes on in threads, so that a slow disk holds nobody up.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lorakit.board import runs
from lorakit.board.answers import answer, body_of, refused
from lorakit.board.control import Control
from lorakit.board.folder import Folder, NotThereError
from lorakit.board.gate import Gate
from lorakit.board.metrics import Cache
from lorakit.config.errors import LorakitError
from lorakit.serving.fields import Fields
from lorakit.serving.refusals import Refusal

T = TypeVar("T")

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
MOST_POINTS = 20_000


class Board:
    """The routes, and what they work with."""

    def __init__(self, folder: Folder):
        """Read nothing yet.

        Args:
            folder: The folder that is shown.
        """
        self.folder, self.cache, self.control = folder, Cache(), Control(folder)

    def routes(self) -> list[Route]:
        """Return the routes."""
        run = "/api/runs/{id}"
        return [
            Route("/", self.page, methods=["GET"]),
            Route("/static/{file:path}", self.static, methods=["GET"]),
            Route("/api/board", self.about, methods=["GET"]),
            Route("/api/runs", self.list_runs, methods=["GET"]),
            Route(f"{run}/metrics", self.metrics, methods=["GET"]),
            Route(f"{run}/evaluations", self.evaluations, methods=["GET"]),
            Route(f"{run}/memory", self.memory, methods=["GET"]),
            Route(f"{run}/settings", self.settings, methods=["GET"]),
            Route(f"{run}/run_file", self.run_file, methods=["GET"]),
            Route(f"{run}/samples", self.samples, methods=["GET"]),
            Route("/api/runs", self.start, methods=["POST"]),
            Route(f"{run}/stop", self.stop, methods=["POST"]),
            Route(f"{run}/resume", self.resume, methods=["POST"]),
            Route("/api/forecast", self.forecast, methods=["POST"]),
        ]

    def close(self) -> None:
        """End what takes long: the server ends. Runs go on."""
        self.control.close()

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

    # ---- what runs have written ----

    async def list_runs(self, request: Request) -> Response:
        """Answer with all runs."""
        return answer(await asyncio.to_thread(self.summaries))

    def summaries(self) -> list[dict[str, Any]]:
        """Return what the list says of each run."""
        self.control.reap()
        return [runs.summary(path, id_) for id_, path in self.folder.runs().items()]

    async def metrics(self, request: Request) -> Response:
        """Answer with the curves of a run."""
        points, since = _whole(request, "points", 1000), _whole(request, "since", -1)
        named = request.query_params.get("names")
        names = None if named is None else named.split(",")

        def curves(run: Path) -> Any:
            return self.cache.of(run).curves(min(points, MOST_POINTS), names, since)

        return await self._of_run(request, curves)

    async def evaluations(self, request: Request) -> Response:
        """Answer with the evaluations of a run."""
        return await self._of_run(request, lambda run: self.cache.of(run).evaluations())

    async def memory(self, request: Request) -> Response:
        """Answer with the memory of a run."""

        def read(run: Path) -> Any:
            found = runs.memory(run, self.cache.of(run).curves(1000, ["peak_memory_mb"]))
            return found | {"forecast": self._known_forecast(run)}

        return await self._of_run(request, read)

    async def settings(self, request: Request) -> Response:
        """Answer with the settings of a run."""
        return await self._of_run(request, runs.settings)

    async def run_file(self, request: Request) -> Response:
        """Answer with the text of a run file."""
        return await self._of_run(request, lambda run: {"text": runs.run_file(run)})

    async def samples(self, request: Request) -> Response:
        """Answer with the completions of a run's evaluations."""
        return await self._of_run(request, runs.samples)

    def _known_forecast(self, run: Path) -> Any:
        """Return the forecast that was made of the run file of a run, None if none was."""
        if not self.control.forecasts:
            return None
        try:
            return self.control.forecasts.get(runs.run_file(run))
        except NotThereError:
            return None

    # ---- what changes something ----

    async def start(self, request: Request) -> Response:
        """Start a run from a run file."""
        text, name = await _texts(request, "run_file", "name")
        return answer({"id": await asyncio.to_thread(self.control.start, text, name)})

    async def stop(self, request: Request) -> Response:
        """Stop a run."""
        return await self._after(request, self.control.stop)

    async def resume(self, request: Request) -> Response:
        """Go on with a run."""
        return await self._after(request, self.control.resume)

    async def _after(self, request: Request, act: Callable[[Path], None]) -> Response:
        """Answer with what the list says of a run after something was done to it."""
        await body_of(request)
        id_ = _id(request)

        def acted(run: Path) -> Any:
            act(run)
            return runs.summary(run, id_)

        return await self._of_run(request, acted)

    async def forecast(self, request: Request) -> Response:
        """Answer with the forecast of a run file."""
        [text] = await _texts(request, "run_file")
        return answer(await self.control.forecast(text))

    async def _of_run(self, request: Request, read: Callable[[Path], Any]) -> Response:
        """Answer with what a function reads of the run that a path names."""
        id_ = _id(request)
        return answer(await asyncio.to_thread(lambda: read(self.folder.run(id_))))


def _id(request: Request) -> str:
    """Return the id in a path. Raises NotThereError if it is no text in UTF-8."""
    try:
        return unquote(request.path_params["id"], errors="strict")
    except UnicodeDecodeError:
        raise NotThereError("an id must be text in UTF-8") from None


async def _texts(request: Request, *names: str) -> list[str]:
    """Return the texts in a request's body, which holds nothing else."""
    fields = Fields(await body_of(request))
    texts = [fields.needed(name, str) for name in names]
    fields.finish()
    return texts


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise Refusal(400, f"{name} must be a whole number from 0 on, not {text[:40]!r}.")
    return int(text)


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
    return refused(Refusal(500, "The board failed on this request; its terminal says how."))


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
        ClientDisconnect: _gone,
        Exception: _failed,
    }
    app = Starlette(routes=board.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, token)
