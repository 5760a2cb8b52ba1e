"""The paths of runs: what they have written, and the buttons that act on them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakit.board import runs
from lorakit.board.answers import answer, body_of, id_of, number_of, texts_of
from lorakit.board.control import Control
from lorakit.board.folder import Folder, NotThereError
from lorakit.board.metrics import Cache
from lorakit.board.work import Work

MOST_POINTS = 20_000
MOST_ROWS = 100


class RunRoutes:
    """The routes of runs, and what they work with."""

    def __init__(self, folder: Folder, work: Work):
        """Read nothing yet.

        Args:
            folder: The folder that is shown.
            work: What takes long.
        """
        self.work = work
        self.folder, self.cache, self.control = folder, Cache(), Control(folder)
        self.ends: runs.Ends = {}
        self._reader: Any = None

    def routes(self) -> list[Route]:
        """Return the routes."""
        run = "/api/runs/{id}"
        read = {
            "metrics": self.metrics,
            "evaluations": self.evaluations,
            "memory": self.memory,
            "settings": self.settings,
            "run_file": self.run_file,
            "samples": self.samples,
            "rows": self.rows,
        }
        return [
            Route("/api/runs", self.list_runs, methods=["GET"]),
            *(Route(f"{run}/{name}", get, methods=["GET"]) for name, get in read.items()),
            Route("/api/runs", self.start, methods=["POST"]),
            Route(f"{run}/stop", self.stop, methods=["POST"]),
            Route(f"{run}/resume", self.resume, methods=["POST"]),
            Route("/api/forecast", self.forecast, methods=["POST"]),
        ]

    # ---- what runs have written ----

    async def list_runs(self, request: Request) -> Response:
        """Answer with all runs."""
        return answer(await asyncio.to_thread(self.summaries))

    def summaries(self) -> list[dict[str, Any]]:
        """Return what the list says of each run."""
        self.control.reap()
        return [runs.summary(path, id_, self.ends) for id_, path in self.folder.runs().items()]

    async def metrics(self, request: Request) -> Response:
        """Answer with the curves of a run."""
        points, since = number_of(request, "points", 1000), number_of(request, "since", -1)
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
            found = runs.memory(self.cache.of(run).curves(1000, ["peak_memory_mb"]))
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

    async def rows(self, request: Request) -> Response:
        """Answer with rows of a run, as tokens."""
        offset, limit = number_of(request, "offset", 0), number_of(request, "limit", 10)
        id_ = id_of(request)

        def read() -> Any:
            from lorakit.board.rows import RowReader  # which takes seconds

            self._reader = self._reader or RowReader()
            return self._reader.tokens(self.folder.run(id_), offset, min(limit, MOST_ROWS))

        return answer(await self.work.aside(read))

    def _known_forecast(self, run: Path) -> Any:
        """Return the forecast that was made of the run file of a run, None if none was."""
        if not self.control.forecasts:
            return None
        try:
            return self.control.forecasts.get(runs.run_file(run))
        except NotThereError:
            return None

    async def _of_run(self, request: Request, read: Callable[[Path], Any]) -> Response:
        """Answer with what a function reads of the run that a path names."""
        id_ = id_of(request)
        return answer(await asyncio.to_thread(lambda: read(self.folder.run(id_))))

    # ---- what changes something ----

    async def start(self, request: Request) -> Response:
        """Start a run from a run file."""
        text, name = await texts_of(request, "run_file", "name")
        return answer({"id": await self.work.aside(lambda: self.control.start(text, name))})

    async def stop(self, request: Request) -> Response:
        """Stop a run."""
        return await self._after(request, self.control.stop)

    async def resume(self, request: Request) -> Response:
        """Go on with a run."""
        return await self._after(request, self.control.resume)

    async def _after(self, request: Request, act: Callable[[Path], None]) -> Response:
        """Answer with what the list says of a run after something was done to it."""
        await body_of(request)
        id_ = id_of(request)

        def acted(run: Path) -> Any:
            act(run)
            return runs.summary(run, id_)

        return await self._of_run(request, acted)

    async def forecast(self, request: Request) -> Response:
        """Answer with the forecast of a run file."""
        [text] = await texts_of(request, "run_file")
        return answer(await self.control.forecast(text))
