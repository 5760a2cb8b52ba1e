"""Serve a board until somebody ends it."""

import importlib.util
import secrets
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.board.folder import Folder
from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path
from lorakit.serving.listen import listen


def serve_board(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8700,
    open_page: bool = False,
    started: Callable[[str], Any] | None = None,
) -> None:
    """Show a folder of runs as a page on this machine, until the process is interrupted.

    Args:
        folder: The folder that holds the runs, at any depth.
        host: The address to listen on, one that only this machine reaches.
        port: The port to listen on; 0 takes a free one.
        open_page: Open the page in the browser.
        started: Called with the address of the page once it is served.

    Raises:
        LorakitError: The folder is none, the address is taken or reachable from other machines, or
            a package of the extra `web` is missing.
        KeyboardInterrupt: The process was interrupted.
    """
    shown = Folder(as_path(folder))
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise LorakitError(f'the board takes the package {package}: pip install "lorakit[web]"')
    from lorakit.board.app import Board, application
    from lorakit.board.gate import HOSTS
    from lorakit.serving.server import run

    if host not in HOSTS:
        raise LorakitError(
            f"a board can start programs, so it listens on {', '.join(HOSTS)} only, not on {host}; "
            "to see it from elsewhere, forward the port with ssh -L"
        )
    if not 0 <= port < 2**16:
        raise LorakitError(f"port is {port}; it must be at most 65535")
    token = secrets.token_urlsafe(32)
    with listen(host, port) as (listener, address):
        page = f"{address}/{token}/"
        board = Board(shown)
        app = application(board, token)

        def tell() -> None:
            if started is not None:
                started(page)
            if open_page:  # which may wait for the browser
                once = f"{address}/{app.ticket()}"
                threading.Thread(target=webbrowser.open, args=[once], daemon=True).start()

        run(app, listener, started=tell, ending=board.close)
