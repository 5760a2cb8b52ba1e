"""What takes long: in threads for which the end of the board does not wait.

To load a model takes minutes, and the end of a board should take none. So such work goes on in a
daemon thread, and whoever waits for it is told at once that the board ends.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from lorakit.serving.refusals import shutting_down

T = TypeVar("T")
NAME = "lorakit board"  # of the threads


async def in_thread(function: Callable[[], T]) -> T:
    """Return what a function gives that is called in a thread of its own."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: list[T], error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is None:
            done.set_result(result[0])
        else:
            done.set_exception(error)

    def work() -> None:
        result, problem = list[T](), None
        try:
            result.append(function())
        except BaseException as error:
            problem = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=work, name=NAME, daemon=True).start()
    return await done


class Work:
    """The work of one board, until it ends."""

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Tell all who wait, from now on too, that the board ends."""
        self._ended.set()

    async def aside(self, function: Callable[[], T]) -> T:
        """Return what a function gives that may take long. Raises Refusal if the board ends."""
        return await self.wait(in_thread(function))

    async def wait(self, work: Awaitable[T]) -> T:
        """Return what some work gives. Raises Refusal, and cancels it, if the board ends first."""
        task, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise shutting_down()
            return task.result()
        finally:
            task.cancel()
            ended.cancel()
