"""Work that takes long, for which nobody waits when the board ends."""

import asyncio
import threading
import time

import pytest

from lorakit.board.work import Work, in_thread
from lorakit.serving.refusals import Refusal


def test_the_result_and_the_error_come_from_a_thread_of_their_own():
    def fail():
        raise ValueError("no")

    async def work():
        found = await Work().aside(threading.get_ident)
        with pytest.raises(ValueError, match="no"):
            await Work().aside(fail)
        return found

    assert asyncio.run(work()) != threading.get_ident()


def test_the_end_waits_for_nothing():
    stuck = threading.Event()

    async def end():
        work = Work()
        waiting = [asyncio.ensure_future(work.aside(stuck.wait)) for _ in range(2)]
        await asyncio.sleep(0.01)
        work.end()
        for each in waiting:
            with pytest.raises(Refusal, match="shutting down"):
                await each
        with pytest.raises(Refusal, match="shutting down"):  # and from now on
            await work.aside(stuck.wait)

    began = time.monotonic()
    asyncio.run(end())
    assert time.monotonic() - began < 5  # the threads would wait for ever
    stuck.set()


def test_what_nobody_waits_for_ends_in_silence(caplog):
    async def leave():
        left = asyncio.ensure_future(in_thread(lambda: time.sleep(0.05)))
        await asyncio.wait([left], timeout=0.01)

    asyncio.run(leave())
    time.sleep(0.1)
    assert caplog.records == []
