"""The HTTP server under the endpoint: uvicorn, with an end that does not wait for long texts."""

import logging
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

_PATIENCE = 5
"""Seconds that the end of the server waits for clients that do not take their answers."""
_KEEP_ALIVE = 75
"""Seconds that a connection may be idle; longer than clients keep theirs, so that they close it."""


class _Server(uvicorn.Server):
    """uvicorn's server, with something to do when it has started and before it ends."""

    def __init__(
        self, config: uvicorn.Config, started: Callable[[], None], ending: Callable[[], None]
    ):
        super().__init__(config)
        self.tell, self.ending = started, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.ending()
        await super().shutdown(sockets)


def run(
    app: ASGIApp,
    listener: socket.socket,
    *,
    started: Callable[[], None],
    ending: Callable[[], None],
) -> None:
    """Serve an application until the process is interrupted or terminated.

    Args:
        app: The application.
        listener: The socket that listens.
        started: Called once requests are taken.
        ending: Called when the server begins to end; it ends the answers that take long.

    Raises:
        KeyboardInterrupt: The process was interrupted.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_PATIENCE,
    )
    _Server(config, started, ending).run(sockets=[listener])
