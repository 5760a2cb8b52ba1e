"""The next tokens of rows: the step from tokens to the logits of the ones after them.

The decoder module computes a step of one new token per row as some 15 small ops a layer, and on a
CPU calling them costs more than reading the weights. Where a model consists of plain linear layers,
`kernels.decode_step` does the whole step in one compiled call, each row with the adapter that it
wants. plan.py says which models and adapters that takes. Other rows, and more than 64, go through
the modules.

The compiled step gives a row the same bits whoever is beside it, and also if its tokens come in
other parts. torch's products do not: their bits may depend on how many tokens are multiplied
together. So the engine gives a prompt's parts fixed bounds.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.adapters.manage import adapter_rows, attached, disable_adapters, selected_adapter
from lorakit.config.errors import LorakitError
from lorakit.inference.kv_cache import PAGE, PART, KVCache, Line, NewPositions
from lorakit.inference.plan import Plan, make_plan
from lorakit.models.decoder import Decoder
from lorakit.models.views import tables_of

COMPILED_ROWS = 64
"""Most rows that the compiled step takes: the most for which it was measured (docs/dev/LOG.md)."""
_COMPILED_PART = 64
"""Most tokens of a prompt that one compiled call takes."""


class Decoding:
    """The state of rows that are being continued; decoding(lines, ids) takes their next tokens."""

    def __init__(self, model: Decoder, rows: int, capacity: int, tokens: int | None = None):
        """Make room.

        Args:
            model: The model.
            rows: How many rows there is room for.
            capacity: Number of positions that a row may reach. Those of a learned prompt, with
                which rows begin, come on top.
            tokens: How many positions the rows hold together. None: each its capacity.
        """
        self.model = model
        self.capacity = capacity + model.beginning.length
        if tokens is None:
            tokens = rows * -(-self.capacity // PAGE) * PAGE
        self.cache = KVCache(model.config, tokens, rows, model.dtype, model.device)
        self.compiled: _CompiledStep | None = None
        # On a processor without AVX-512, torch's bf16 products run at a seventh of the speed of its
        # fp32 ones; there prompts take the compiled step too.
        slow_bf16 = torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.compiled_prompts = model.dtype == torch.bfloat16 and slow_bf16
        self.compile()

    def compiles(self, adapter: str | None) -> bool:
        """Return whether the compiled step takes rows with this adapter."""
        return self.compiled is not None and self.compiled.plan.numbers(1, [adapter]) is not None

    def compile(self) -> None:
        """Take the model as it is now into the compiled step, where that can compute it."""
        plan = make_plan(self.model, self.capacity)
        self.compiled = None
        if plan is not None:
            self.compiled = _CompiledStep(plan, self.model, self.cache, self.capacity)

    @torch.no_grad()
    def begin(self) -> Line:
        """Return the line of a new row, with the learned prompt if there is one."""
        line, prompt = self.cache.line(), self.model.beginning.length
        if prompt:
            self._grow([line], [prompt])
            call = NewPositions(self.cache, [line], [prompt])
            self.model.beginning(self.model, call, 1)
            call.commit()
        return line

    def read(self, prompts: Sequence[list[int]]) -> tuple[list[Line], Tensor]:
        """Begin a row with each prompt.

        Returns:
            The rows' lines, and the logits of the token after each prompt, fp32 [n, V].
        """
        device, lengths = self.model.device, [len(prompt) for prompt in prompts]
        lines = [self.begin() for _ in prompts]
        if not self.model.beginning.length and not (self.compiled and self.compiled_prompts):
            longest = max(lengths)
            ids = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
            return lines, self(lines, torch.tensor(ids, device=device), lengths)
        found = []
        for line, prompt in zip(lines, prompts, strict=True):
            for part in torch.tensor([prompt], device=device).split(PART, dim=1):
                logits = self([line], part)
            found.append(logits)
        return lines, torch.cat(found)

    def _grow(self, lines: Sequence[Line], new: Sequence[int]) -> None:
        for line, n in zip(lines, new, strict=True):
            if not self.cache.grow(line, n):
                raise LorakitError(f"the key-value cache has no room for {n} more positions")

    @torch.no_grad()
    def __call__(
        self,
        lines: Sequence[Line],
        ids: Tensor,
        new: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Tensor:
        """Take the tokens that follow in some rows.

        Args:
            lines: The line of each of the n rows, all different. They get the pages.
            ids: int64 [n, T]. T is at most PART, unless all rows are empty.
            new: How many of the T tokens of each row count; the rest is filling. None: all do.
            adapters: The adapter of each row, or None for the base alone. None: all go through the
                model as it was when it was compiled.

        Returns:
            The logits of the token after them, fp32 [n, V].

        Raises:
            LorakitError: The cache has no room for them.
        """
        n, T = ids.shape
        self._grow(lines, [T] * n if new is None else new)
        step = self.compiled
        numbers = None if step is None or new is not None else step.plan.numbers(n, adapters)
        if step is not None and numbers is not None:
            if T == 1 and n <= COMPILED_ROWS:
                return step(lines, ids, numbers)
            if T > 1 and n == 1 and self.compiled_prompts:
                for part in ids.split(_COMPILED_PART, dim=1):
                    logits = step(lines, part, numbers)
                return logits
        with nullcontext() if adapters is None else self._through(adapters):
            return self._by_modules(lines, ids, new)

    def _through(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Return the context in which each row goes through its adapter."""
        found = attached(self.model).values()
        if not found or any(each.merged is not None for each in found):
            return nullcontext()
        if set(names) == {selected_adapter(self.model)}:
            return nullcontext()
        return (
            disable_adapters(self.model)
            if set(names) == {None}
            else adapter_rows(self.model, names)
        )

    def _by_modules(self, lines: Sequence[Line], ids: Tensor, new: Sequence[int] | None) -> Tensor:
        n, T = ids.shape
        call = NewPositions(self.cache, lines, [T] * n if new is None else new)
        views = call.views(self.model.config, T)
        hidden = self.model.through_blocks(ids, self.model.embed(ids), views, call)
        call.commit()
        last = hidden[:, -1]
        if new is not None:
            starts, ends = call.bounds
            last = hidden[torch.arange(n, device=ids.device), ends - starts - 1]
        return self.model.head(last).float()


def decoding_of(
    model: Decoder, slots: int, capacity: int, cache_tokens: int | None = None
) -> Decoding:
    """Return what an engine with these settings holds of its rows."""
    if cache_tokens is None:
        cache_tokens = slots * -(-capacity // PAGE) * PAGE  # a row's last page is its own
    # layers with a window keep as much of rows that have ended as of those that run
    return Decoding(model, 2 * slots, capacity, cache_tokens)


class _CompiledStep:
    """`kernels.decode_step` for a model and its cache."""

    def __init__(self, plan: Plan, model: Decoder, cache: KVCache, capacity: int):
        self.plan, config = plan, model.config
        positions = torch.arange(capacity)
        self.tables = tables_of(config, positions)
        found = (list(each.values()) for each in (cache.keys, cache.values, cache.windows))
        self.memory = kernels.DecodeCache(plan.model, *found)

    def __call__(
        self, lines: Sequence[Line], ids: Tensor, adapters: Sequence[int | None]
    ) -> Tensor:
        """Take ids int64 [n, T], and put their keys and values into the cache.

        Args:
            lines: As in `Decoding`.
            ids: As in `Decoding`.
            adapters: The number of each row's adapter in the plan, or None.

        Returns:
            The logits of the token after them, fp32 [n, V].
        """
        T = ids.shape[1]
        places = [kernels.DecodePlace(line.length, line.pages) for line in lines]
        if len(places) == 1:
            start = places[0].position
            tables = [
                (c[None, start : start + T], s[None, start : start + T]) for c, s in self.tables
            ]
        else:
            starts = torch.tensor([place.position for place in places])
            positions = starts[:, None] + torch.arange(T)
            tables = [(cos[positions], sin[positions]) for cos, sin in self.tables]
        logits = kernels.decode_step(
            self.plan.model, ids.contiguous(), tables, self.memory, places, adapters
        )
        for line in lines:
            line.length += T
        return logits
