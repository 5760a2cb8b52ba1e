"""A run file: the model, the rows and all settings of a training run, in one mapping.

A mapping comes from YAML or from Python. Its keys are the fields of RunConfig, with the fields of
TrainConfig beside them, so that the file has one level for what it says most. It may use the names
of TRL, transformers and Axolotl instead (see aliases.py).
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.config.adapters import LoraConfig
from lorakit.config.aliases import ALIASES, own_names
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import from_mapping, to_dtype
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.config.training import TrainConfig

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class DataConfig:
    """Settings of the data: files of rows, in JSONL, JSON, CSV or Parquet."""

    train: str
    """File of the rows to train on."""
    validation: str | None = None
    """File of the rows to evaluate on; null evaluates on none."""
    format: str | None = None
    """Format of the rows: "messages", "sharegpt", "prompt_completion", "preference", "alpaca" or
    "text"; null lets the fields of the first row tell."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of a whole run: what to train, on what, and how."""

    model: str
    """Model to train: a directory, a .gguf file or a Hub id."""
    data: DataConfig
    """Files of the rows; one file name means the training rows alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Settings of the adapter."""
    quantize: QuantConfig | None = None
    """Storage of the frozen weights: a quant_type, settings, or null to leave them dense."""
    dtype: str = "bfloat16"
    """Dtype that the model computes in: "bfloat16" or "float32"."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training; in a run file they stand beside the other keys."""

    def __post_init__(self) -> None:
        if self.quantize is None and self.lora.init_lora_weights == "loftq":
            raise LorakitError(
                "init_lora_weights: loftq starts from the error of a quantization; set quantize too"
            )

    @classmethod
    def from_dict(cls, values: Any, where: str = "run file") -> "RunConfig":
        """Build the settings of a run from the mapping of a run file.

        Args:
            values: The mapping, whose keys are lorakit's names or those of TRL and Axolotl.
            where: The name of the file in messages.

        Returns:
            The settings. What an alias changes or leaves out is said in the log, one line each.

        Raises:
            LorakitError: A key is unknown, a value is wrong, two names set the same thing, or an
                alias asks for what lorakit cannot do.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
        try:
            own, notes = own_names(values)
        except ValueError as error:
            raise LorakitError(f"{where}: {error}") from None
        run = cls._from_own_names(own, where)
        for note in notes:
            log.warning("lorakit: %s: %s", where, note)
        return run

    @classmethod
    def _from_own_names(cls, values: dict[Any, Any], where: str) -> "RunConfig":
        """Build the settings from a mapping with lorakit's names alone, and change that mapping."""
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
        return run
