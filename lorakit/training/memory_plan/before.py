"""The memory of a run before it starts: one line, or the sentence that refuses it.

A forecast may be off, and the memory that is free may change. So a run is refused only if torch's
own bytes exceed what is free by more than MARGIN, on the device or in host memory; a run that may
be tight goes, and the line says so. A run whose forecast fails goes too.

Of several processes the first one makes the forecast, for the one of them that has the least
memory, and all hear the answer.

Small runs need no forecast: `surely_fits` counts each weight and each number that a layer reads or
writes several times over, and still stays far below the memory of any machine.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, one_of
from lorakit.config.run import RunConfig
from lorakit.config.training import OPTIMIZERS
from lorakit.inference.kv_cache import PAGE
from lorakit.models.classifier import decoder_of
from lorakit.models.config import ModelConfig
from lorakit.models.devices import own_device
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.memory import free_memory
from lorakit.training.memory_plan import elsewhere
from lorakit.training.memory_plan.plan import MemoryPlan, teacher_of
from lorakit.training.memory_plan.planned import PlannedRun
from lorakit.training.memory_plan.search import settings_that_fit, settled_run
from lorakit.training.memory_plan.table import plan_line
from lorakit.training.ranks import joined
from lorakit.training.units import format_bytes

MARGIN = 1.05
PLENTY = 4  # what surely fits takes at most this part of the memory
COPIES = 8  # of each number between two layers: more than any op keeps or makes


def check_run(
    run: RunConfig,
    lengths: Sequence[int] | None = None,
    tok: Tokenizer | None = None,
    *,
    divided: bool = False,
) -> str:
    """Check the memory of a run file's run on the device of this process.

    All processes of a run must ask.

    Args:
        run: The settings of the run.
        lengths: The number of tokens of each row, as `encode_rows` says them.
        tok: The tokenizer of the run, with the run's add_tokens.
        divided: Whether the processes divide the weights, as `mesh_of_run` decides.

    Returns:
        The line of `check_memory`.

    Raises:
        LorakitError: The run cannot fit.
    """
    device = own_device()
    on_gpu = device.type == "cuda"
    with joined(device) as ranks:
        host = free_memory("cpu") // ranks.on_machine  # which they share
        free = free_memory(device) if on_gpu else host
        free, host = (min(ranks.share.collect([size])) for size in (free, host))

        def line() -> str:
            settings = place_of(device) | {"ranks": ranks.size}
            settings["shard"] = "full" if divided else "none"
            return check_memory(PlannedRun.from_run(run, lengths, tok, **settings), free, host)

        return ranks.first(line)


def check_memory(run: PlannedRun, memory: int, host: int | None = None) -> str:
    """Return the line about the memory of a run that is about to start.

    Args:
        run: The run.
        memory: The bytes that are free on its device, as `lorakit.memory.free_memory` returns them.
        host: The bytes of host memory that are free beside a GPU; None if nobody knows.

    Returns:
        The line; "" for a run so small that no forecast is worth its time.

    Raises:
        LorakitError: The run cannot fit. The message says what to change.
    """
    try:
        return _checked(run, memory, host)
    finally:
        elsewhere.end()  # a training needs its memory


def _checked(run: PlannedRun, memory: int, host: int | None) -> str:
    """Return or raise what `check_memory` does."""
    try:
        if surely_fits(run, memory):
            return ""
        plan = settled_run(run, memory).forecast()
    except Exception as error:  # a run that could go must not end by its forecast
        return no_forecast(error)
    if plan.peak > MARGIN * memory:
        raise LorakitError(_refusal(run, plan.peak, memory, host))
    if host is not None and plan.host > MARGIN * host:
        raise LorakitError(_host_refusal(run, plan.host, host))
    return line_of(run, plan, memory)


def place_of(device: torch.device) -> dict[str, Any]:
    """Return where a run is planned that goes on this device, as `PlannedRun` takes it."""
    if device.type != "cuda":
        return {"device": "cpu"}
    return {"device": "cuda", "capability": torch.cuda.get_device_capability(device)}


def no_forecast(error: Exception) -> str:
    """Return the line about a run whose forecast fails."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"memory: there is no forecast ({reason})"


def line_of(run: PlannedRun, plan: MemoryPlan, memory: int, more: str = "") -> str:
    """Return the line about a run that goes, with `more` behind what it needs."""
    line = plan_line(plan, memory) + more
    if run.device == "cpu":
        line += "; the process takes 1.6 to 2.5 times that"
    return line + ("; this is tight, and may fail" if plan.reserved > memory else "")


def _host_refusal(run: PlannedRun, needed: int, host: int) -> str:
    """Return the sentence that refuses a run for what waits in host memory."""
    waits = {
        "offload_weights": run.offload_weights,
        "activation_offloading": run.train.activation_offloading,
        "the paged optimizer": OPTIMIZERS[run.train.optim][1],
    }
    names = one_of([name for name, is_on in waits.items() if is_on])
    return (
        f"the run needs {format_bytes(needed)} of host memory beside the GPU's, and "
        f"{format_bytes(host)} are free: leave out {names}"
    )


def _refusal(run: PlannedRun, peak: int, memory: int, host: int | None) -> str:
    """Return the sentence that refuses a run, with the cheapest settings that fit."""
    needs = f"the run needs {format_bytes(peak)} of memory, and {format_bytes(memory)} are free"
    try:
        saving = settings_that_fit(run, memory, host)
    except LorakitError:
        return needs
    words = " ".join(saving.words())
    takes = format_bytes(saving.run.forecast().reserved)
    if saving.run.forecast().reserved <= memory:
        return f"{needs}: with {words} it needs {takes}"
    least = f" (the least is {takes}, with {words})" if words else ""
    return f"{needs}: take a smaller model or shorter rows{least}"


def surely_fits(run: PlannedRun, memory: int) -> bool:
    """Return whether a generous bound of what a run takes is far below the memory.

    Args:
        run: The run.
        memory: The bytes that are free.
    """
    if not isinstance(run.lora, LoraConfig) or run.generate is not None:
        return False
    train, config = run.train, run.config
    answers = 1 if train.objective == "sft" else 4  # two, and what they are compared with at most
    longest = train.max_seq_length if train.packing else run.tokens()
    if train.grpo is not None:  # and what is left of a completion's last page
        longest += train.grpo.max_completion_length + PAGE
    tokens = train.rows_of_step * longest * answers
    if run.lengths and train.grpo is None:
        tokens = min(tokens, sum(run.lengths) * answers)
    row = tokens if train.packing else longest  # what a token may attend to
    bound = 24 * run.lora.r * _sizes(config)[1]
    for each in (config, teacher_of(train)):
        if each is not None:
            weights, widths = _sizes(each)
            scores = each.num_hidden_layers * each.num_attention_heads * row
            bound += 12 * weights + 4 * COPIES * tokens * (widths + scores)
    return PLENTY * bound < memory


def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Return how many weights a model has, and the inputs and outputs of its linear layers."""
    with torch.device("meta"):
        model = decoder_of(config)
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    widths = sum(layer.in_features + layer.out_features for layer in linear)
    return sum(p.numel() for p in model.parameters()), widths + 2 * config.vocab_size
