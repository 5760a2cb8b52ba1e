"""The socket that a server listens on, and its address."""

import contextlib
import socket
from collections.abc import Iterator

from lorakit.config.errors import LorakitError


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Hold a socket that listens in the block.

    Args:
        host: The name or the number of the address.
        port: The port; 0 takes a free one.

    Yields:
        The socket, and its address: "http://127.0.0.1:8000".

    Raises:
        LorakitError: The address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    shown = f"[{host}]" if ":" in host else host
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise LorakitError(
            f"cannot listen on {shown}:{port} ({reason}): choose another --port or --host, or end "
            "the program that has it"
        ) from None
    with listener:
        yield listener, f"http://{shown}:{listener.getsockname()[1]}"
