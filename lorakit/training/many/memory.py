"""The memory of several adapters in one pass, before it starts: one line, or the refusal.

The forecast is that of one run (memory_plan/): the adapter that takes most, with the largest batch
of every adapter packed into one row. The other adapters are added with their gradients and states.
It is a bound: it takes the largest batches of all to come in one step, and the low-rank products of
all tokens to be as wide as those of that adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.adapters.attach import attach
from lorakit.adapters.manage import check_spans, selected
from lorakit.adapters.peft_files.load import read_settings
from lorakit.config.errors import LorakitError
from lorakit.config.fields import to_dtype
from lorakit.config.many import ManyConfig
from lorakit.config.run import RunConfig
from lorakit.data.packing import pack_rows
from lorakit.models.devices import own_device
from lorakit.models.empty import empty_model
from lorakit.training.memory import free_memory
from lorakit.training.memory_plan import elsewhere
from lorakit.training.memory_plan.before import MARGIN, line_of, no_forecast, place_of, surely_fits
from lorakit.training.memory_plan.forecast import plain
from lorakit.training.memory_plan.plan import model_config
from lorakit.training.memory_plan.planned import PlannedRun
from lorakit.training.memory_plan.search import settled_run
from lorakit.training.mode import bytes_of
from lorakit.training.units import format_bytes


def check_many_memory(many: ManyConfig, lengths: Mapping[str, Sequence[int]]) -> str:
    """Check what several adapters can be attached to, and their memory on this process's device.

    No weight of the model is read.

    Args:
        many: The settings of the run.
        lengths: The number of tokens of each row of each adapter, by its name.

    Returns:
        The line about the memory; "" for a run so small that no forecast is worth its time.

    Raises:
        LorakitError: An adapter fits no layer or cannot share a pass, or the run cannot fit.
    """
    sizes = _sizes_of_adapters(many)
    largest = max(sizes, key=sizes.__getitem__)
    others = sum(sizes.values()) - sizes[largest]
    device = own_device()
    free = free_memory(device)
    try:
        run = _as_one(many, largest, lengths, device)
        if surely_fits(run, free - others):
            return ""
        plan = settled_run(run, free - others).forecast()
    except Exception as error:  # a run that could go must not end by its forecast
        return no_forecast(error)
    finally:
        elsewhere.end()  # a training needs its memory
    if plan.peak + others > MARGIN * free:
        raise LorakitError(
            f"{len(sizes)} adapters in one pass need {format_bytes(plan.peak + others)} of memory, "
            f"{format_bytes(others)} of them for all but the largest, and {format_bytes(free)} are "
            "free: train fewer at a time, fewer rows of each (per_device_train_batch_size), or "
            "with gradient_checkpointing: true"
        )
    every = replace(plan, reserved=plan.reserved + others)
    more = f", {format_bytes(others)} of it for all adapters but the largest"
    return line_of(run, every, free, more)


def _sizes_of_adapters(many: ManyConfig) -> dict[str, int]:
    """Return the bytes of each adapter with gradients and state; check that they share a pass."""
    first = many.first
    model = empty_model(model_config(first.model), to_dtype(first.dtype), first.quantize)
    for name, run in many.runs.items():
        lora: Any = run.lora if run.adapter is None else read_settings(run.adapter, model)
        try:
            attach(model, plain(lora), name=name)
        except LorakitError as error:
            raise LorakitError(f"adapter {name!r}: {error}") from None
    check_spans(model, list(many.runs))
    sizes = {}
    for name, run in many.runs.items():
        with selected(model, name):
            own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            sizes[name] = own + bytes_of(model, run.train)
    return sizes


def _as_one(
    many: ManyConfig, largest: str, lengths: Mapping[str, Sequence[int]], device: torch.device
) -> PlannedRun:
    """Return the run of one adapter whose packed rows are those of all."""
    rows = [n for name, run in many.runs.items() for n in _largest_batch(run, lengths[name])]
    steps = max(run.train.batches_of_step for run in many.runs.values())
    run = many.runs[largest]
    train = replace(
        run.train,
        packing=True,
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=steps,
        max_seq_length=max(2, *rows),
        cuda_graph="off",
    )
    return PlannedRun.from_run(replace(run, train=train), rows, **place_of(device))


def _largest_batch(run: RunConfig, lengths: Sequence[int]) -> list[int]:
    """Return the lengths of the rows in the largest batch that an adapter may have."""
    size = run.train.rows_at_a_time
    if not run.train.packing:
        return sorted(lengths)[-size:]
    packs = pack_rows(lengths, size * run.train.max_seq_length)
    return max(([lengths[i] for i in pack] for pack in packs), key=sum)
