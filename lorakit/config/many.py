"""A run file of several adapters over one frozen model, which are trained in one pass a step.

    adapters: {small: {lora: {r: 8}}, large: {lora: {r: 64}}}
    sweep: {lora.r: [8, 64], learning_rate: [1.0e-4, 3.0e-4]}

The keys of an adapter are laid over those of the file, `data` as a whole. A sweep makes an adapter
of every combination of its values. With both keys, each adapter is made with every combination.
What belongs to the model or to all checkpoints is the same for all adapters (SHARED).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.fields import merged
from lorakit.config.run import SEVERAL, RunConfig
from lorakit.config.training import TrainConfig

SHARED_OF_MODEL = ("model", "quantize", "dtype", "shard", "offload_weights", "chat_template")
SHARED = (
    "save_steps",
    "save_total_limit",
    "resume",
    "gradient_checkpointing",
    "activation_offloading",
    "mlp_activations",
)
"""Settings of the training that all adapters of one pass have in common."""
_MOST = 256  # adapters; a sweep of more is a slip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class ManyConfig:
    """Settings of a run of several adapters."""

    output_dir: str
    """Directory that holds a folder for each adapter, which is that of a run."""
    runs: dict[str, RunConfig]
    """Settings of the run of each adapter, by its name, as if it was trained alone."""

    def __post_init__(self) -> None:
        check_names(list(self.runs))
        check_shared({name: run.train for name, run in self.runs.items()})
        _check_equal(SHARED_OF_MODEL, self.runs)
        first = next(iter(self.runs.values()))
        if first.shard == "full" or first.offload_weights:
            raise LorakitError(
                "several adapters are trained over weights that one device holds: leave out shard "
                "and offload_weights"
            )
        for name, run in self.runs.items():
            if run.add_tokens:
                raise LorakitError(
                    f"adapter {name!r}: add_tokens trains rows of the embedding, which several "
                    "adapters cannot in one pass: leave it out, or train this adapter by itself"
                )

    @property
    def first(self) -> RunConfig:
        """The settings of the first adapter, for what all have in common."""
        return next(iter(self.runs.values()))

    @classmethod
    def from_dict(cls, values: Any, where: str = "run file") -> "ManyConfig":
        """Build the settings from the mapping of a run file with `adapters` or `sweep`.

        Args:
            values: The mapping, whose other keys are those of a run file. All names may be those of
                TRL and Axolotl.
            where: The name of the file in messages.

        Returns:
            The settings.

        Raises:
            LorakitError: As `RunConfig.from_dict` does; two adapters have one name, or differ in
                what all share.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r:.60}")
        shared = _own({k: v for k, v in values.items() if k not in SEVERAL}, where)
        folder = shared.pop("output_dir", None) or TrainConfig.output_dir
        runs: dict[str, RunConfig] = {}
        for name, keys in _adapters(values, where):
            inner = f"{where}, adapter {name}"
            if name in runs:
                raise LorakitError(
                    f"{where}: two adapters are called {name!r}; name them yourself, in adapters"
                )
            own = _own(keys, inner)
            if own.get("output_dir") is not None:
                raise LorakitError(
                    f"{inner}: each adapter has its folder in the output_dir of all; leave it out"
                )
            said = _laid_over(shared, own) | {"output_dir": f"{folder}/{name}"}
            runs[name] = RunConfig.from_dict(said, inner)
        try:
            return cls(str(folder), runs)
        except LorakitError as error:
            raise LorakitError(f"{where}: {error}") from None


def check_names(names: Sequence[str]) -> None:
    """Raise LorakitError unless these can be the names of adapters and of their folders."""
    if not names:
        raise LorakitError("there is no adapter to train: name one in adapters, or give a sweep")
    if len(names) > _MOST:
        raise LorakitError(f"{len(names)} adapters are too many; train {_MOST} at a time at most")
    folders: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name) or name.startswith("checkpoint-"):
            raise LorakitError(
                f"{name!r:.80} is no name of an adapter, which is that of its folder too: one has "
                "letters, digits, _ and -, and does not begin with checkpoint-"
            )
        other = folders.setdefault(name.casefold(), name)
        if other != name:
            raise LorakitError(
                f"adapters {other!r} and {name!r} would have one folder where capitals make no "
                "difference; choose other names"
            )


def check_shared(configs: Mapping[str, TrainConfig]) -> None:
    """Raise LorakitError unless adapters with these settings can be trained in one pass.

    What the loss of each must be is for training/together.py to say.
    """
    _check_equal(SHARED, configs)
    repositories: dict[str | None, str] = {None: ""}
    for name, config in configs.items():
        refused = {
            "train: full": config.train == "full",
            "per_device_train_batch_size and gradient_accumulation_steps as auto: give numbers": (
                config.splits_itself
            ),
            "a checkpoint to resume from: take auto": config.resume not in (None, "auto"),
            "trackers that know one run at a time: take tensorboard": (
                not set(config.trackers) <= {"tensorboard"}
            ),
        }
        for what, found in refused.items():
            if found:
                raise LorakitError(
                    f"adapter {name!r}: several adapters in one pass do not go with {what}"
                )
        if config.hub_model_id in repositories and config.hub_model_id is not None:
            raise LorakitError(
                f"adapters {repositories[config.hub_model_id]!r} and {name!r} would be uploaded to "
                "one repository; give each its own hub_model_id"
            )
        repositories[config.hub_model_id] = name


def _check_equal(names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raise LorakitError if settings by the names of adapters differ in one of these fields."""
    first, *others = settings
    for name in names:
        value = getattr(settings[first], name)
        for other in others:
            found = getattr(settings[other], name)
            if found != value:
                raise LorakitError(
                    f"{name} belongs to all adapters: it is {_said(value)} of {first!r} and "
                    f"{_said(found)} of {other!r}; say it once, beside adapters"
                )


def _said(value: Any) -> str:
    return repr(getattr(value, "quant_type", value))


def _own(values: Any, where: str) -> dict[Any, Any]:
    """Return keys of a run file by lorakit's names alone."""
    if values is None:  # `small:` alone says nothing more
        return {}
    own, notes = RunConfig.own_keys(values, where)
    RunConfig.tell(notes, where)
    return own


def _laid_over(shared: Mapping[Any, Any], own: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the keys of an adapter over those of all.

    Rows of its own come without the validation rows of all, and an adapter to go on from comes
    without their `lora`.
    """
    result = merged(shared, own)
    if "data" in own:
        result["data"] = own["data"]
    if own.get("adapter") is not None:
        result["lora"] = own.get("lora")
    return result


def _adapters(values: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the keys of each adapter that a run file asks for."""
    named = values.get("adapters")
    sweep = list(_swept(values.get("sweep") or {}, f"{where}, sweep"))
    if named is None:
        if not sweep:
            raise LorakitError(f"{where}: adapters and sweep are empty; name an adapter")
        named = {"": {}}
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
        raise LorakitError(
            f"{where}: adapters must be a mapping of names to keys of a run file, as "
            f"{{small: {{lora: {{r: 8}}}}}}, not {named!r:.60}"
        )
    for name, keys in named.items():
        for combination in product(*(choices for _, choices in sweep)):
            said = dict(keys) if isinstance(keys, Mapping) else keys
            parts = [name] if name else []
            for (key, _), value in zip(sweep, combination, strict=True):
                said = merged(said or {}, _nested(key, value))
                parts.append(f"{key.rpartition('.')[2]}-{_as_name(value)}")
            yield "--".join(parts), said


def _swept(sweep: Any, where: str, before: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield the keys of a sweep, such as "lora.r", with their values."""
    if not isinstance(sweep, Mapping):
        raise LorakitError(f"{where} must be a mapping of keys to lists, not {sweep!r:.60}")
    for key, values in sweep.items():
        name = f"{before}{key}"
        if isinstance(values, Mapping):
            yield from _swept(values, where, f"{name}.")
        elif isinstance(values, list) and values:
            yield name, values
        else:
            raise LorakitError(
                f"{where}: {name} must be a list of the values to try, not {values!r:.60}"
            )


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for key "a.b"."""
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _as_name(value: Any) -> str:
    """Return a value as a part of a name, which holds no dot: 0.00015 is 15e-5."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        said = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        return re.sub(r"[^A-Za-z0-9_]+", "-", said).strip("-") or "x"
    if isinstance(value, int) or not Decimal(repr(value)).is_finite():
        return str(value)
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    number = "".join(map(str, digits))
    return f"{'-' * sign}{number}{f'e{exponent}' if exponent else ''}"
