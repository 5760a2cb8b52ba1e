"""The paths of comparisons: their results, and the blind votes."""

import asyncio
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakit.board import comparisons
from lorakit.board.answers import answer, body_of, id_of
from lorakit.board.folder import Folder
from lorakit.board.work import Work
from lorakit.serving.fields import Fields
from lorakit.serving.refusals import Refusal

if TYPE_CHECKING:
    from lorakit.comparison.votes import Ballot, Side


class ComparisonRoutes:
    """The routes of comparisons."""

    def __init__(self, folder: Folder, work: Work):
        """Read nothing yet.

        Args:
            folder: The folder that is shown.
            work: What takes long.
        """
        self.folder, self.work = folder, work

    def routes(self) -> list[Route]:
        """Return the routes."""
        one = "/api/comparisons/{id}"
        return [
            Route("/api/comparisons", self.list_comparisons, methods=["GET"]),
            Route(one, self.comparison, methods=["GET"]),
            Route(f"{one}/vote", self.pair, methods=["GET"]),
            Route(f"{one}/vote", self.vote, methods=["POST"]),
            Route(f"{one}/share", self.share, methods=["GET"]),
        ]

    async def list_comparisons(self, request: Request) -> Response:
        """Answer with all comparisons."""

        def read() -> Any:
            return comparisons.summaries(self.folder.comparisons())

        return answer(await asyncio.to_thread(read))

    async def comparison(self, request: Request) -> Response:
        """Answer with the results of a comparison."""
        id_ = id_of(request)

        def read() -> Any:
            return comparisons.read(self.folder.comparison(id_))

        return answer(await asyncio.to_thread(read))

    async def pair(self, request: Request) -> Response:
        """Answer with the next blind pair of two runs."""
        return await self._voting(request, comparisons.next_pair)

    async def share(self, request: Request) -> Response:
        """Answer with what the votes on two runs say."""
        return await self._voting(request, comparisons.share)

    async def _voting(self, request: Request, read: Any) -> Response:
        query = request.query_params
        first, second = query.get("first"), query.get("second")
        if first is None or second is None:
            raise Refusal(400, "The query must name two runs, as first and second.")
        return answer(await self.work.aside(lambda: read(self._ballot(request, first, second))))

    async def vote(self, request: Request) -> Response:
        """Save a vote, and answer with the next pair."""
        fields = Fields(await body_of(request))
        first, second = fields.needed("first", str), fields.needed("second", str)
        ticket, winner = fields.needed("ticket", int), fields.needed("winner", str)
        fields.finish()
        if winner not in ("left", "right", "tie"):
            raise Refusal(400, f"winner is left, right or tie, not {winner[:40]!r}.")

        def save() -> Any:
            votes = self._ballot(request, first, second)
            votes.vote(ticket, cast("Side", winner))
            return comparisons.next_pair(votes)

        return answer(await self.work.aside(save))

    def _ballot(self, request: Request, first: str, second: str) -> "Ballot":
        return comparisons.ballot(self.folder.comparison(id_of(request)), first, second)
