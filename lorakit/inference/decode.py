"""The next tokens of rows: the step from tokens to the logits of the ones after them.

The decoder module computes a step of one new token per row as some 15 small ops a layer, and on a
CPU calling them costs more than reading the weights. Where a model consists of plain linear layers,
`kernels.decode_step` does the whole step in one compiled call, each row with the adapter that it
wants. plan.py says which models and adapters that takes. Other rows, and more than 32, go through
the modules.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.adapters.manage import adapter_rows, attached, disable_adapters, selected_adapter
from lorakit.inference.kv_cache import PART, KVCache, NewPositions
from lorakit.inference.plan import Plan, make_plan
from lorakit.models.decoder import Decoder
from lorakit.models.rope import rope_tables

COMPILED_ROWS = 32
"""Most rows that the compiled step takes: the most for which it was measured (docs/dev/LOG.md)."""
_COMPILED_PART = 64
"""Most tokens of a prompt that one compiled call takes."""


class Decoding:
    """The state of rows that are being continued; decoding(lines, ids) takes their next tokens."""

    def __init__(self, model: Decoder, lines: int, capacity: int):
        """Make room.

        Args:
            model: The model.
            lines: How many rows there is room for.
            capacity: Number of positions that a row may reach. Those of a learned prompt, with
                which rows begin, come on top.
        """
        self.model = model
        capacity += model.beginning.length
        self.cache = KVCache(model.config, lines, capacity, model.dtype, model.device)
        self.compiled: _CompiledStep | None = None
        self.compile()
        # On a processor without AVX-512, torch's bf16 products run at a seventh of the speed of its
        # fp32 ones; there prompts take the compiled step too.
        slow_bf16 = torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.compiled_prompts = model.dtype == torch.bfloat16 and slow_bf16

    def compile(self) -> None:
        """Take the model as it is now into the compiled step, where that can compute it."""
        plan = make_plan(self.model)
        self.compiled = None if plan is None else _CompiledStep(plan, self.model, self.cache)

    def begin(self, line: int) -> None:
        """Forget what a line held; a row begins there, with the learned prompt if there is one."""
        self.cache.lengths[line] = 0
        prompt = self.model.beginning.length
        if prompt:
            call = NewPositions(self.cache, [line], [prompt])
            self.model.beginning(self.model, call, 1)
            call.commit()

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        """Begin a row with each prompt, in the first lines.

        Returns:
            The logits of the token after each prompt, fp32 [n, V].
        """
        device, lengths = self.model.device, [len(prompt) for prompt in prompts]
        for line in range(len(prompts)):
            self.begin(line)
        if not self.model.beginning.length and not (self.compiled and self.compiled_prompts):
            longest = max(lengths)
            ids = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
            return self(range(len(prompts)), torch.tensor(ids, device=device), lengths)
        found = []
        for line, prompt in enumerate(prompts):
            for part in torch.tensor([prompt], device=device).split(PART, dim=1):
                logits = self([line], part)
            found.append(logits)
        return torch.cat(found)

    def __call__(
        self,
        lines: Sequence[int],
        ids: Tensor,
        new: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Tensor:
        """Take the tokens that follow in some rows.

        Args:
            lines: The line of each of the n rows, all different.
            ids: int64 [n, T]. T is at most PART, unless all rows are empty.
            new: How many of the T tokens of each row count; the rest is filling. None: all do.
            adapters: The adapter of each row, or None for the base alone. None: all go through the
                model as it was when it was compiled.

        Returns:
            The logits of the token after them, fp32 [n, V].
        """
        n, T = ids.shape
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

    def _by_modules(self, lines: Sequence[int], ids: Tensor, new: Sequence[int] | None) -> Tensor:
        n, T = ids.shape
        call = NewPositions(self.cache, lines, [T] * n if new is None else new)
        views = call.views(self.model.config, T)
        hidden = self.model.through_blocks(self.model.embed(ids), views, call)
        call.commit()
        last = hidden[:, -1]
        if new is not None:
            last = hidden[torch.arange(n, device=ids.device), call.index[2] - call.index[1] - 1]
        return self.model.head(last).float()


class _CompiledStep:
    """`kernels.decode_step` for a model and its cache."""

    def __init__(self, plan: Plan, model: Decoder, cache: KVCache):
        self.plan, self.cache, config = plan, cache, model.config
        positions = torch.arange(cache.capacity)
        self.tables = [rope_tables(rope, config.head_dim, positions) for rope in config.ropes]
        self.memory = kernels.DecodeCache(plan.model, cache.keys, cache.values, cache.windows)

    def __call__(self, lines: Sequence[int], ids: Tensor, adapters: Sequence[int | None]) -> Tensor:
        """Take ids int64 [n, T], and put their keys and values into the cache.

        Args:
            lines: As in `Decoding`.
            ids: As in `Decoding`.
            adapters: The number of each row's adapter in the plan, or None.

        Returns:
            The logits of the token after them, fp32 [n, V].
        """
        lengths, T = self.cache.lengths, ids.shape[1]
        places = [(line, lengths[line]) for line in lines]
        if len(places) == 1:
            start = places[0][1]
            tables = [
                (c[None, start : start + T], s[None, start : start + T]) for c, s in self.tables
            ]
        else:
            starts = torch.tensor([start for _, start in places])
            positions = starts[:, None] + torch.arange(T)
            tables = [(cos[positions], sin[positions]) for cos, sin in self.tables]
        logits = kernels.decode_step(
            self.plan.model, ids.contiguous(), tables, self.memory, places, adapters
        )
        for line, start in places:
            lengths[line] = start + T
        return logits
