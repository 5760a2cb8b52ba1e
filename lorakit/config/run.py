"""The configurations: of a model, a quantization, an adapter, a training run. Frozen dataclasses.

Field names are the ones people know: a model's are those of Hugging Face's config.json, an
adapter's those of PEFT's adapter_config.json, a run's those of TRL.

Every value that comes from a file goes through `from_mapping`, which checks names and types: an
unknown name is an error that says the nearest valid one, and nothing is converted in silence.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.config.adapters import LoraConfig
from lorakit.config.aliases import ALIASES, own_names
from lorakit.config.errors import LorakitError, check, nearest
from lorakit.config.fields import from_mapping, to_dtype
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.config.training import TrainConfig

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class DataConfig:
    """Files of rows: JSONL, JSON, CSV or Parquet."""

    train: str
    validation: str | None = None
    format: str | None = None
    """what their rows are: "messages", "sharegpt", "prompt_completion", "preference", "alpaca" or
    "text"; null: what the fields of the first row say"""


@dataclass(frozen=True)
class RunConfig:
    """A run file: what to train, on what, and how."""

    model: str
    data: DataConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: QuantConfig | None = None
    dtype: str = "bfloat16"
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        check(
            self.quantize is not None or self.lora.init_lora_weights != "loftq",
            "init_lora_weights: loftq starts from the error of a quantization; set quantize too",
        )

    @classmethod
    def from_dict(cls, values: Any, where: str = "run file") -> "RunConfig":
        """From the mapping of a run file: the fields of this class, with TrainConfig's beside
        them, or the names of TRL and Axolotl (see aliases.py).

        Raises LorakitError with the nearest valid name for a key that is none of these, for two
        names of one setting, and for an alias that cannot be honoured.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
        try:
            values, notes = own_names(values)
        except ValueError as error:
            raise LorakitError(f"{where}: {error}") from None
        own = [f.name for f in dataclasses.fields(cls) if f.name != "train"]
        training = [f.name for f in dataclasses.fields(TrainConfig)]
        for name in values:
            if name not in own and name not in training:
                known = [*own, *training, *sorted(ALIASES)]
                raise LorakitError(f"{where}: unknown key {name!r}{nearest(name, known)}")
        if values.get("data") is not None:
            values["data"] = from_mapping(DataConfig, values["data"], f"{where}, data")
        if "lora" in values:
            values["lora"] = from_mapping(LoraConfig, values["lora"], f"{where}, lora")
        values["quantize"] = quant_config(values.get("quantize"), f"{where}, quantize")
        train = {name: values.pop(name) for name in training if name in values}
        values["train"] = from_mapping(TrainConfig, train, where)
        run = from_mapping(cls, values, where)
        to_dtype(run.dtype)
        for note in notes:
            log.warning("lorakit: %s: %s", where, note)
        return run
