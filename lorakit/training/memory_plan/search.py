"""Searches over forecasts: what each saving saves, what fits, and how much of it.

More rows, longer rows and higher ranks never take less memory. So a search needs few forecasts: it
guesses by a straight line between two known points, since bytes grow almost linearly.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tqdm import tqdm

from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import to_dtype
from lorakit.config.quantization import QuantConfig
from lorakit.kernels.pretend import pretend_gpu
from lorakit.models.empty import empty_model
from lorakit.training.division import SHARE, with_what_trains
from lorakit.training.kept_layers import fitting_layers
from lorakit.training.memory_plan.planned import PlannedRun

What = Literal["batch", "length", "rank"]
# The steps that a search goes in, and where it ends.
GRAIN: dict[What, int] = {"batch": 1, "length": 64, "rank": 8}
MOST: dict[What, int] = {"batch": 4096, "length": 1 << 20, "rank": 4096}
# Kinds of bytes that a run holds when it counts what is free.
_FROZEN = ("weights", "packed weights", "scales", "embeddings", "head")
_TRAINED = ("adapters", "trained weights")


@dataclass(frozen=True)
class Saving:
    """A change of a run's settings that saves memory."""

    settings: dict[str, str]
    """Settings by their names in a run file, with their values as YAML."""
    run: PlannedRun
    """Run with these settings."""

    def words(self) -> list[str]:
        """Return the settings as arguments key=value of the command line."""
        return [f"{name}={value}" for name, value in self.settings.items()]


Change: TypeAlias = Callable[[PlannedRun], Saving | None]


def settled_run(run: PlannedRun, memory: int) -> PlannedRun:
    """Return the run with what its memory decides: the settings that are "auto".

    Args:
        run: The run as it is.
        memory: The bytes that torch may take of the device.

    Returns:
        The run with as many rows at a time as fit, or one row if none fits; with "full" for a
        shard of "auto" if whole weights take more than half of the memory; and with the number of
        blocks that keep gate and up on a GPU, which is mlp_activations "keep" for all of them and
        "recompute" for none.

    Raises:
        LorakitError: The run cannot be forecast.
    """
    if run.shard == "auto":
        needed = with_what_trains(weights_of(run), run.train, to_dtype(run.dtype))
        divided = run.ranks > 1 and needed > SHARE * memory
        run = dataclasses.replace(run, shard="full" if divided else "none")
    if run.train.splits_itself:
        run = run.with_rows(max(1, rows_that_fit(run, memory)))
    if run.train.mlp_activations != "auto" or run.device == "cpu" or run.generate is not None:
        return run
    kept = _kept_layers(run, memory)
    if kept == run.config.num_hidden_layers:
        return run.with_train(mlp_activations="keep")
    return dataclasses.replace(run, kept_layers=kept) if kept else _lean(run)


def weights_of(run: PlannedRun) -> int:
    """Return the bytes of the weights of a run's model, as `shard: auto` counts them."""
    model = empty_model(run.config, to_dtype(run.dtype), run.quantize)
    return sum(p.nbytes for p in model.parameters())


def _kept_layers(run: PlannedRun, memory: int) -> int:
    """Return how many blocks a run would let keep gate and up; see kept_layers.py."""
    resident = _lean(run).forecast().resident
    trained = sum(resident.get(kind, 0) for kind in _TRAINED)
    made_later = trained + resident.get("optimizer state", 0)  # gradients take what is trained
    free = memory - made_later - trained - sum(resident.get(kind, 0) for kind in _FROZEN)
    documents = run.documents()
    tokens = run.rows * run.tokens() if documents is None else sum(documents)
    with pretend_gpu(run.capability):
        model = empty_model(run.config, to_dtype(run.dtype), None)
        return fitting_layers(model, tokens, free)


def forecast_savings(run: PlannedRun) -> list[Saving]:
    """Return the single changes that save memory, the largest saving first.

    Args:
        run: The run as it is.

    Returns:
        The changes, each with the run that it makes, whose forecast is at most 0.99 times what the
        run reserves. What cannot be together with the run's other settings is left out.

    Raises:
        LorakitError: The run itself cannot be forecast.
    """
    before, found = run.forecast().reserved, []
    changes = [_half_the_rows, *_CHANGES]
    for change in tqdm(changes, "forecasting", unit="change", disable=None, leave=False):
        saving = change(run)
        after = None if saving is None else _reserved(saving.run)
        if saving is not None and after is not None and after <= 0.99 * before:
            found.append((after, saving))
    return [saving for _, saving in sorted(found, key=lambda pair: pair[0])]


def settings_that_fit(run: PlannedRun, memory: int, host: int | None = None) -> Saving:
    """Return the cheapest change of a run's settings with which it fits.

    Changes that leave the results as they are come before those that store numbers in fewer bits,
    and quick ones before slow ones. The rows of a step stay as many as they are.

    Args:
        run: The run as it is.
        memory: The bytes that torch may take of the device.
        host: The bytes that may wait in host memory beside a GPU; None for any number.

    Returns:
        The change, with no settings if the run fits as it is. If nothing makes it fit, what takes
        the least; so ask its forecast.

    Raises:
        LorakitError: The run cannot be forecast.
    """
    start, taken = settled_run(run, memory), list[Change]()
    now = Saving({}, start)
    reserved = now.run.forecast().reserved
    for change in _CHANGES:
        if reserved <= memory:
            break
        then = _with(start, [*taken, change])
        after = _reserved(then.run, host)
        if after is not None and after < reserved:
            now, reserved = then, after
            taken.append(change)
    if reserved > memory:
        return now
    for change in reversed(taken[:-1]):  # the slow ones first: perhaps the last one made it
        without = [each for each in taken if each is not change]
        then = _with(start, without)
        after = _reserved(then.run, host)
        if after is not None and after <= memory:
            now, taken = then, without
    if _row_by_row in taken:
        now = _merged(now, _split(now.run, rows_that_fit(now.run, memory)))
    return now


def rows_that_fit(run: PlannedRun, memory: int) -> int:
    """Return how many rows at a time fit, as a part of the rows of a step without a rest.

    Args:
        run: The run, of whose rows_of_step the parts are taken.
        memory: The bytes that torch may take of the device.

    Returns:
        The number of rows; 0 if not even one fits.

    Raises:
        LorakitError: The run cannot be forecast.
    """
    run = _lean(run)
    parts = [rows for rows in range(1, run.rows_of_step + 1) if run.rows_of_step % rows == 0]

    def reserved(number: int) -> int:
        return run.with_rows(parts[number - 1]).forecast().reserved

    if reserved(len(parts)) <= memory:  # most often everything fits
        return parts[-1]
    fitting = _last_below(reserved, memory, len(parts))
    return parts[fitting - 1] if fitting else 0


def largest_that_fits(run: PlannedRun, what: What, memory: int) -> int:
    """Return how many rows at a time, tokens of a row or ranks of the adapter fit.

    Args:
        run: The run, whose other settings stay.
        what: "batch" for rows at a time, "length" for tokens in the longest row, in steps of 64, or
            "rank" for the adapter's rank, in steps of 8.
        memory: The bytes that torch may take of the device.

    Returns:
        The largest number with which the forecast fits; 0 if not even the smallest does.

    Raises:
        LorakitError: A run with the smallest number cannot be forecast, or the run has no adapter.
    """
    if what == "rank" and not isinstance(run.lora, LoraConfig):
        raise LorakitError("the run has no adapter of LoRA, so there is no rank to search for")
    run, grain, most = _lean(run), GRAIN[what], MOST[what]
    if what == "length":
        most = min(most, run.config.context_length)

    def reserved(steps: int) -> int:
        return _sized(run, what, steps * grain).forecast().reserved

    return grain * _last_below(reserved, memory, max(1, most // grain))


def _last_below(size_of: Callable[[int], int], limit: int, most: int) -> int:
    """Return the largest number from 1 to `most` whose size is at most `limit`, or 0.

    Sizes must not fall. They are asked for at few numbers, which `_guess` picks.
    """
    sizes = {1: size_of(1)}
    if sizes[1] > limit:
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        guess = _guess(sizes, low, high, limit)
        sizes[guess] = size_of(guess)
        if sizes[guess] <= limit:
            low = guess
        else:
            high = guess
    return low


def _guess(sizes: Mapping[int, int], low: int, high: int, limit: int) -> int:
    """Return the number between `low` and `high` to ask for next.

    It lies where a straight line through two known sizes reaches the limit. Every third guess is in
    the middle, so that a bend in the sizes costs little.
    """
    other = high if high in sizes else max((number for number in sizes if number < low), default=0)
    if not other:
        return low + 1
    if high in sizes and len(sizes) % 3 == 0:
        return (low + high) // 2
    slope = (sizes[other] - sizes[low]) / (other - low)
    guess = low + int((limit - sizes[low]) / slope) if slope > 0 else high - 1
    return max(low + 1, min(high - 1, guess))


# ---- what the searches share ----


def _lean(run: PlannedRun) -> PlannedRun:
    """Return the run with the least that mlp_activations "auto" comes down to on a full GPU."""
    if run.train.mlp_activations != "auto" or run.device == "cpu":
        return run
    return run.with_train(mlp_activations="recompute")


def _reserved(run: PlannedRun, host: int | None = None) -> int | None:
    """Return the bytes that a run reserves.

    Return None if its settings cannot be together, or more waits in host memory than `host`.
    """
    try:
        plan = run.forecast()
    except LorakitError:
        return None
    return plan.reserved if host is None or plan.host <= host else None


def _with(run: PlannedRun, changes: Sequence[Change]) -> Saving:
    """Return the run with changes, one after the other; one that has nothing to change is none."""
    now = Saving({}, run)
    for change in changes:
        now = _merged(now, change(now.run))
    return now


def _merged(before: Saving, then: Saving | None) -> Saving:
    return before if then is None else Saving({**before.settings, **then.settings}, then.run)


def _sized(run: PlannedRun, what: What, number: int) -> PlannedRun:
    """Return the run with so many rows at a time, tokens of a row or ranks."""
    if what == "batch":
        return run.with_train(per_device_train_batch_size=max(number, _fewest(run)))
    if what == "length":
        return dataclasses.replace(run.with_train(max_seq_length=number), lengths=None)
    assert isinstance(run.lora, LoraConfig)
    return dataclasses.replace(run, lora=dataclasses.replace(run.lora, r=number))


def _train(run: PlannedRun, **settings: bool | str) -> Saving:
    words = {name: str(v).lower() if isinstance(v, bool) else v for name, v in settings.items()}
    return Saving(words, run.with_train(**settings))


def _split(run: PlannedRun, rows: int) -> Saving:
    steps = run.rows_of_step // rows
    names = "per_device_train_batch_size", "gradient_accumulation_steps"
    settings = dict(zip(names, (str(rows), str(steps)), strict=True))
    return Saving(settings, run.with_rows(rows))


# ---- changes ----


def _checkpointing(run: PlannedRun) -> Saving | None:
    if run.train.gradient_checkpointing:
        return None
    return _train(run, gradient_checkpointing=True)


def _offloading(run: PlannedRun) -> Saving | None:
    if run.train.activation_offloading or run.device == "cpu":
        return None
    if run.train.gradient_checkpointing:
        return _train(run, activation_offloading=True)
    return _train(run, gradient_checkpointing=True, activation_offloading=True)


def _half_the_rows(run: PlannedRun) -> Saving | None:
    halves = run.rows % 2 == 0 and run.rows // 2 >= _fewest(run)
    return _split(run, run.rows // 2) if halves else None


def _row_by_row(run: PlannedRun) -> Saving | None:
    return _split(run, 1) if run.rows > 1 and _fewest(run) == 1 else None


def _fewest(run: PlannedRun) -> int:
    """Return the fewest rows that are computed at a time; KTO compares them with each other."""
    return 2 if run.train.form == "kto" else 1


def _recomputing(run: PlannedRun) -> Saving | None:
    if run.train.mlp_activations == "recompute" or run.train.gradient_checkpointing:
        return None
    return _train(run, mlp_activations="recompute")


def _small_state(run: PlannedRun) -> Saving | None:
    small = {"adamw_torch": "adamw_8bit", "paged_adamw_32bit": "paged_adamw_8bit"}
    optim = small.get(run.train.optim)
    return None if optim is None else _train(run, optim=optim)


def _paged_state(run: PlannedRun) -> Saving | None:
    paged = {"adamw_torch": "paged_adamw_32bit", "adamw_8bit": "paged_adamw_8bit"}
    optim = paged.get(run.train.optim)
    return None if optim is None else _train(run, optim=optim)


def _sharded(run: PlannedRun) -> Saving | None:
    if run.ranks == 1 or run.shard == "full":
        return None
    return Saving({"shard": "full"}, dataclasses.replace(run, shard="full"))


def _packed(run: PlannedRun) -> Saving | None:
    if run.quantize is not None or run.lora is None:
        return None
    return Saving({"quantize": "nf4"}, dataclasses.replace(run, quantize=QuantConfig()))


def _packed_ends(run: PlannedRun) -> Saving | None:
    """Pack the embedding and the head too, if the rest is packed."""
    quant = run.quantize
    if quant is None or quant.embed_tokens is not None:
        return None
    packed = dataclasses.replace(quant, embed_tokens="nf4")
    apart = not run.config.tie_word_embeddings and run.config.classifier is None
    if apart and quant.lm_head is None:
        packed = dataclasses.replace(packed, lm_head="nf4")
    plain = dataclasses.asdict(QuantConfig())
    said = {n: v for n, v in dataclasses.asdict(packed).items() if v != plain[n]}
    words = "{" + ", ".join(f"{n}: {json.dumps(v)}" for n, v in said.items()) + "}"
    words = words.replace('"', "")  # names of layers and formats need no quotes in YAML
    return Saving({"quantize": words}, dataclasses.replace(run, quantize=packed))


def _weights_on_host(run: PlannedRun) -> Saving | None:
    if run.offload_weights or run.device == "cpu" or run.lora is None:
        return None
    return Saving({"offload_weights": "true"}, dataclasses.replace(run, offload_weights=True))


# The order of `settings_that_fit`: what changes no result, the quickest first, then what stores
# numbers in fewer bits. Weights in host memory come last: they change no result either, but each
# pass over them crosses the bus.
_CHANGES: list[Change] = [
    _row_by_row,
    _sharded,
    _recomputing,
    _paged_state,
    _checkpointing,
    _offloading,
    _small_state,
    _packed,
    _packed_ends,
    _weights_on_host,
]
