"""Ctrl-C and SIGTERM, as a flag that a run looks at between its steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Flag:
    """A flag that a handler of signals can set.

    It has no lock. With threading.Event, a signal that comes while the handler of another one holds
    the lock would wait for ever.
    """

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Set the flag for good."""
        self._set = True

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._set


@contextmanager
def interrupt() -> Iterator[Flag]:
    """Yield a flag that the first Ctrl-C or SIGTERM sets. A second one acts as usual.

    Outside of the main thread, which alone may set signal handlers, the flag is never set.
    """
    stop = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
