"""The memory of a run before it starts: one line, or the sentence that refuses it.

A forecast may be off, and the memory that is free may change. So a run is refused only if torch's
own bytes exceed what is free by more than MARGIN; a run that may be tight goes, and the line says
so. A run whose forecast fails goes too.

Small runs need no forecast: `surely_fits` counts each weight and each number that a layer reads or
writes several times over, and still stays far below the memory of any machine.
"""

import torch
from torch import nn

from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.training.memory_plan import elsewhere
from lorakit.training.memory_plan.planned import PlannedRun
from lorakit.training.memory_plan.search import settings_that_fit, settled_run
from lorakit.training.memory_plan.table import plan_line
from lorakit.training.units import format_bytes

MARGIN = 1.05
PLENTY = 4  # what surely fits takes at most this part of the memory
COPIES = 8  # of each number between two layers: more than any op keeps or makes


def check_memory(run: PlannedRun, memory: int) -> str:
    """Return the line about the memory of a run that is about to start.

    Args:
        run: The run.
        memory: The bytes that are free on its device, as `lorakit.memory.free_memory` returns them.

    Returns:
        The line; "" for a run so small that no forecast is worth its time.

    Raises:
        LorakitError: The run cannot fit. The message says what to change.
    """
    try:
        if surely_fits(run, memory):
            return ""
        settled = settled_run(run, memory)
        plan = settled.forecast()
    except Exception as error:  # a run that could go must not end by its forecast
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"memory: there is no forecast ({reason})"
    finally:
        elsewhere.end()  # a training needs its memory
    if plan.peak > MARGIN * memory:
        raise LorakitError(_refusal(run, plan.peak, memory))
    line = plan_line(plan, memory)
    if run.device == "cpu":
        line += "; the process takes 1.6 to 2.5 times that"
    return line + ("; this is tight, and may fail" if plan.reserved > memory else "")


def _refusal(run: PlannedRun, peak: int, memory: int) -> str:
    """Return the sentence that refuses a run, with the cheapest settings that fit."""
    needs = f"the run needs {format_bytes(peak)} of memory, and {format_bytes(memory)} are free"
    try:
        saving = settings_that_fit(run, memory)
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
    answers = 1 if train.objective == "sft" else 4  # two, and what they are compared with
    longest = train.max_seq_length if train.packing else run.tokens()
    tokens = train.rows_of_step * longest * answers
    if run.lengths:
        tokens = min(tokens, sum(run.lengths) * answers)
    row = tokens if train.packing else longest  # what a token may attend to
    weights, widths = _sizes(config)
    scores = config.num_hidden_layers * config.num_attention_heads * row
    bound = 12 * weights + 24 * run.lora.r * widths + 4 * COPIES * tokens * (widths + scores)
    return PLENTY * bound < memory


def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Return how many weights a model has, and the inputs and outputs of its linear layers."""
    with torch.device("meta"):
        model = Decoder(config)
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    widths = sum(layer.in_features + layer.out_features for layer in linear)
    return sum(p.numel() for p in model.parameters()), widths + 2 * config.vocab_size
