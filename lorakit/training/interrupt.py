"""Ctrl-C and SIGTERM, as a flag that a run looks at between its steps."""

import signal
import threading
import time
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
def interrupt(grace: float = 0.0) -> Iterator[Flag]:
    """Yield a flag that the first Ctrl-C or SIGTERM sets. A second one acts as usual.

    One that comes within `grace` seconds is taken for the same one, on another way. Outside of the
    main thread, which alone may set signal handlers, the flag is never set.
    """
    stop = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}
    began: list[float] = []  # when the first signal came

    def handle(number: int, frame: Any) -> None:
        if not stop.is_set():
            began.append(time.monotonic())
        stop.set()
        if grace == 0.0:
            signal.signal(number, before[number])
        elif time.monotonic() - began[0] > grace:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
