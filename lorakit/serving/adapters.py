"""The models that an endpoint serves: the base, and adapters that come and go while it runs.

A client knows an adapter by any name. In the model it has another, which is new with each load. So
a name may hold a dot, and one that is given to another adapter later means nothing of what is kept
of the first.

An adapter may have a chat template beside it, which its chats are rendered by. A tokenizer of its
own it may have only if that is the model's, since all rows are read by one.
"""

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.adapters.manage import (
    adapter_names,
    delete_adapter,
    selected_adapter,
    set_adapter,
)
from lorakit.adapters.peft_files.load import load_adapter
from lorakit.adapters.peft_files.vocabulary import vocabulary_kept
from lorakit.config.errors import LorakitError
from lorakit.files.hub import fetch_adapter
from lorakit.inference.engine import Engine
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_directory import read_template
from lorakit.models.tokenizer_files import load_tokenizer
from lorakit.serving.refusals import Refusal, not_found
from lorakit.serving.worker import Worker


@dataclass(frozen=True)
class Served:
    """A model as clients choose it."""

    name: str
    """Its name for clients."""
    adapter: str | None
    """The adapter's name in the model; None: the base alone."""
    tok: Tokenizer
    """The tokenizer that renders its chats."""
    ends: tuple[str, ...] = ()
    """The tokens that end its answers, beside those that end the base's."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""


class Models:
    """The models that are served, by the names that clients use."""

    def __init__(self, model: Decoder, tok: Tokenizer, name: str):
        """Serve a model, and the adapters that it carries under their own names.

        Args:
            model: The model.
            tok: Its tokenizer.
            name: The name of the base.

        Raises:
            LorakitError: An adapter has the name of the base.
        """
        self.model, self.tok, self.base = model, tok, name
        self.served = {name: Served(name, None, tok)}
        for adapter in adapter_names(model):
            self._check_name(adapter)
            self.served[adapter] = Served(adapter, adapter, tok)
        self._loads = 0
        self._one_at_a_time = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """The names, the base's first."""
        return list(self.served)

    def find(self, name: str) -> Served:
        """Return a model by its name; refuse a name that is none."""
        if name not in self.served:
            raise not_found(name, self.names)
        return self.served[name]

    def add(self, name: str, path: str | Path) -> None:
        """Load an adapter before the worker runs.

        Args:
            name: Its name for clients.
            path: Its directory, its .gguf file, or its Hub id.

        Raises:
            LorakitError: The name is taken, or the adapter cannot be read.
        """
        self._check_name(name)
        local = fetch_adapter(path)
        tok = self._tokenizer(local)
        inner = self._new_name(name)
        load_adapter(self.model, local, name=inner)
        self.served[name] = Served(name, inner, tok, self._ends(tok))

    async def load(self, name: str, path: str, worker: Worker) -> None:
        """Load an adapter while the worker runs. What it computes goes on as it was.

        Args:
            name: Its name for clients.
            path: Its directory, its .gguf file, or its Hub id.
            worker: The worker that owns the model.

        Raises:
            LorakitError: The name is taken, or the adapter cannot be read, or the rows of a batch
                cannot choose it. Nothing has changed then.
        """
        async with self._one_at_a_time:
            self._check_name(name)
            local = await asyncio.to_thread(fetch_adapter, path)
            tok = await asyncio.to_thread(self._tokenizer, local)
            inner = self._new_name(name)
            await worker.call(lambda: self._attach(local, inner, worker.engine))
            self.served[name] = Served(name, inner, tok, self._ends(tok))

    async def unload(self, name: str, worker: Worker) -> None:
        """Forget an adapter: new requests do not find it, and those that run go on to their ends.

        Args:
            name: Its name for clients.
            worker: The worker that owns the model.

        Raises:
            Refusal: There is no such adapter.
        """
        adapter = self.find(name).adapter
        if adapter is None:
            raise Refusal(400, f"{name!r} is the base model, no adapter.", param="lora_name")
        del self.served[name]
        while worker.using(adapter):
            await asyncio.sleep(0.05)
        async with self._one_at_a_time:
            await worker.call(lambda: delete_adapter(self.model, adapter))

    def _check_name(self, name: str) -> None:
        if not name:
            raise LorakitError("an adapter needs a name")
        try:
            name.encode()
        except UnicodeEncodeError:  # the page of metrics, which is UTF-8, could not name it
            raise LorakitError(f"{name!a} is no name: it is not valid Unicode text") from None
        if name in self.served:
            raise LorakitError(f"the name {name!r} is taken; unload that adapter first")

    def _new_name(self, name: str) -> str:
        """Return a name in the model, where none holds a dot, that no adapter has had."""
        taken = adapter_names(self.model)
        numbers = itertools.count(self._loads + 1)
        name = name.replace(".", "-")
        self._loads = next(n for n in numbers if f"{name}#{n}" not in taken)
        return f"{name}#{self._loads}"

    def _attach(self, path: Path, name: str, engine: Engine) -> None:
        """Attach an adapter between two steps, which go on with what was selected."""
        before, tokens = selected_adapter(self.model), self.model.config.vocab_size
        with vocabulary_kept(self.model):
            load_adapter(self.model, path, name=name)
            try:
                if self.model.config.vocab_size != tokens:
                    raise LorakitError(
                        f"{path} has tokens of its own, which a model that runs cannot get: start "
                        "the server with it"
                    )
                engine.check_adapter(name)
            except LorakitError:
                delete_adapter(self.model, name)
                raise
            finally:
                if before is not None:
                    set_adapter(self.model, before)

    def _tokenizer(self, path: Path) -> Tokenizer:
        """Return the tokenizer of an adapter: the model's, with the template beside the adapter."""
        if (path / "tokenizer.json").is_file():
            own = load_tokenizer(path)
            if own.backend.get_vocab() != self.tok.backend.get_vocab():
                raise LorakitError(
                    f"{path} has a tokenizer of its own, which is not the model's: serve it alone"
                )
            return own
        template = read_template(path) if path.is_dir() else None
        if template is None:
            return self.tok
        return Tokenizer(self.tok.backend, self.tok.special_tokens, template, self.tok.source)

    def _ends(self, tok: Tokenizer) -> tuple[str, ...]:
        others = {*tok.end_token_ids} - {*self.tok.end_token_ids}
        added = tok.backend.get_added_tokens_decoder()
        return tuple(added[token].content for token in others if token in added)
