"""The models that the chat talks to: one base at a time, and the adapters of its runs.

A base is loaded when it is first asked for, and takes the place of the one before. Its rows are
made by the worker of the endpoint (serving/worker.py), so both sides of a chat are written at the
same time, each through its own adapter. An adapter whose file has changed, as that of a run that
goes on has, is loaded again.
"""

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.board.choices import Choice
from lorakit.board.work import in_thread
from lorakit.config.errors import LorakitError
from lorakit.inference.sampling import Sampling
from lorakit.models.load import load_model
from lorakit.models.tokenizer_files import load_tokenizer
from lorakit.serving.adapters import Models
from lorakit.serving.refusals import shutting_down
from lorakit.serving.worker import Job, Row, Worker

_SLOTS, _WAITING = 4, 12  # texts that are made at a time, and that may wait


@dataclass
class Loaded:
    """A base that is loaded, with its worker and the adapters that it has got."""

    choice: Choice
    models: Models
    worker: Worker
    stamps: dict[str, int] = field(default_factory=dict)
    """The times of the files of the adapters that are loaded, by their names."""


@dataclass(frozen=True)
class Asked:
    """How the answers of a chat are to be made."""

    max_new_tokens: int
    temperature: float
    seed: int | None


class Chat:
    """One base at a time, and what it is asked."""

    def __init__(self) -> None:
        """Load nothing yet."""
        self.loaded: Loaded | None = None
        self.loading: asyncio.Task[Loaded] | None = None
        self.closing = False
        self._one_at_a_time = asyncio.Lock()

    def is_loaded(self, base: Choice) -> bool:
        """Return whether a base is the one that is loaded."""
        return self.loaded is not None and self.loaded.choice == base

    async def use(self, base: Choice) -> Loaded:
        """Return a base, which is loaded if it is not yet. The one before goes.

        Loading goes on if nobody waits for it any more: the page may be opened again.

        Raises LorakitError if it cannot be loaded.
        """
        async with self._one_at_a_time:
            if self.loading is not None and not self.loading.done():
                await asyncio.wait([self.loading])
            if self.closing:
                raise shutting_down()
            if self.loaded is not None and self.loaded.choice == base:
                return self.loaded
            self.loading = asyncio.ensure_future(self._replace(base))
            self.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            return await asyncio.shield(self.loading)

    async def _replace(self, base: Choice) -> Loaded:
        before, self.loaded = self.loaded, None
        if before is not None:
            await before.worker.stop()
            del before
        models, worker = await in_thread(lambda: _load(base))
        worker.start()
        self.loaded = Loaded(base, models, worker)
        return self.loaded

    async def job(
        self, loaded: Loaded, side: Choice, messages: Sequence[dict[str, Any]], asked: Asked
    ) -> Job:
        """Begin the answer of a side.

        Args:
            loaded: The base.
            side: The base itself, or an adapter of it.
            messages: The chat.
            asked: How the answer is to be made.

        Returns:
            The job, whose pieces come from now on.

        Raises:
            LorakitError: The adapter cannot be loaded, or the chat has no template or is too long.
            Refusal: Too many texts wait, or the board ends.
        """
        models, worker = loaded.models, loaded.worker
        await self._load_adapter(loaded, side)
        self._check_loaded(loaded)
        served = models.find(side.name)
        ids = await asyncio.to_thread(
            served.tok.apply_chat_template, list(messages), add_generation_prompt=True
        )
        room = worker.capacity - len(ids)
        if room < 1:
            raise LorakitError(
                f"the chat has {len(ids)} tokens, and there is room for {worker.capacity}: begin "
                "a new one"
            )
        job = Job(
            rows=[Row(ids, min(asked.max_new_tokens, room), asked.seed, None)],
            model=side.name,
            adapter=served.adapter,
            sampling=Sampling(temperature=asked.temperature),
            stop=list(served.ends),
            logit_bias={},
            logprobs=None,
        )
        await worker.begin(job)
        return job

    async def _load_adapter(self, loaded: Loaded, side: Choice) -> None:
        """Load the adapter of a side, unless it is there as its file is now."""
        if side.name == loaded.choice.name or loaded.stamps.get(side.name) == side.stamp:
            return
        async with self._one_at_a_time:
            if loaded.stamps.get(side.name) == side.stamp:
                return
            self._check_loaded(loaded)
            if loaded.stamps.pop(side.name, None) is not None:
                await loaded.models.unload(side.name, loaded.worker)
            await loaded.models.load(side.name, side.place, loaded.worker)
            loaded.stamps[side.name] = side.stamp

    def _check_loaded(self, loaded: Loaded) -> None:
        if self.loaded is not loaded:
            raise LorakitError(
                "another page talks to another base now, and one is loaded at a time: ask again"
            )

    def close(self) -> None:
        """End every answer, and refuse new ones."""
        self.closing = True
        if self.loaded is not None:
            self.loaded.worker.close()

    async def end(self) -> None:
        """End the worker's thread. A model that is being loaded is not waited for."""
        if self.loading is not None:
            self.loading.cancel()
        if self.loaded is not None:
            await self.loaded.worker.stop()


def _load(base: Choice) -> tuple[Models, Worker]:
    """Load a base as the runs that used it did."""
    gc.collect()  # the one before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dtype, quantize = base.settings["dtype"], base.settings["quantize"]
    tok = load_tokenizer(base.place)
    model = load_model(
        base.place,
        dtype=dtype if isinstance(dtype, str) else "bfloat16",
        quantize=quantize if isinstance(quantize, dict) else None,
    )
    models = Models(model, tok, base.name)
    worker = Worker(
        model,
        tok,
        slots=_SLOTS,
        capacity=None,
        most_waiting=_WAITING,
        told=lambda job, piece: None,
    )
    return models, worker
