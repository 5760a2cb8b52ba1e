"""A run file: the model, the rows and all settings of a training run, in one mapping.

A mapping comes from YAML or from Python. Its keys are the fields of RunConfig, with the fields of
TrainConfig beside them, so that the file has one level for what it says most. It may use the names
of TRL, transformers and Axolotl instead (see aliases.py).
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.config.adapters import LoraConfig
from lorakit.config.aliases import ALIASES, RENAMED, own_names
from lorakit.config.classifier import ClassifierConfig, ProblemType
from lorakit.config.data import DataConfig, data_config
from lorakit.config.distillation import DistillationConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import from_mapping, to_dtype, without_unset
from lorakit.config.grpo import GrpoConfig, grpo_config
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.config.training import TrainConfig

log = logging.getLogger("lorakit")

SEVERAL = ("adapters", "sweep")
"""The keys that only a run file of several adapters has; see many.py."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of a whole run: what to train, on what, and how."""

    model: str
    """Model to train: a directory, a .gguf file or a Hub id."""
    data: DataConfig
    """Rows of the run; the name of a file or of a data set on the Hub, or a list of sources, means
    the training rows alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Settings of a new adapter."""
    adapter: str | None = None
    """Adapter to go on training, with the settings that it has: its directory or Hub id.
    Without this key a new one starts."""
    add_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to tokenizer and model. Their rows of the embedding and the head are
    trained with the adapter, and the tokenizer is saved beside it."""
    quantize: QuantConfig | None = None
    """Storage of the frozen weights: a quant_type, settings, or null to leave them dense."""
    dtype: str = "bfloat16"
    """Dtype that the model computes in: "bfloat16" or "float32"."""
    shard: Literal["auto", "none", "full"] = "auto"
    """Whether several processes divide the weights: "full", "none", or "auto", which divides them
    if they take more than half of the free memory; gradients and state of train: full count."""
    offload_weights: bool = False
    """Whether the frozen weights wait in host memory and go to the GPU one block at a time."""
    chat_template: str | None = None
    """Chat template to use instead of the model's own: "chatml", "gemma", "gemma4", "llama3" or
    "zephyr", a jinja file, or a directory with a template. It is saved with the adapter."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes of objective classification, in the order of the head's outputs; an
    empty list takes the labels of the rows."""
    problem_type: ProblemType | None = None
    """Meaning of the labels: "single_label_classification" or "regression"; null takes numbers with
    a fraction for what is to be told, and other labels for classes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training; in a run file they stand beside the other keys."""

    def __post_init__(self) -> None:
        if self.train.train == "full":
            self._check_full(with_lora=self.lora != LoraConfig())
        if self.train.grpo is not None:
            self._check_grpo()
        self._check_head()
        if self.lora.quantize_aware is not None:
            self._check_aware()
        if self.adapter is not None and self.lora != LoraConfig():
            raise LorakitError(
                f"adapter: the adapter in {self.adapter} has settings of its own: leave out lora"
            )
        if self.adapter is not None and self.add_tokens:
            raise LorakitError(
                f"add_tokens: the adapter in {self.adapter} trains the tokens that it has: leave "
                "out add_tokens, or start a new adapter"
            )
        if self.quantize is None and self.lora.init_lora_weights == "loftq":
            raise LorakitError(
                "init_lora_weights: loftq starts from the error of a quantization; set quantize too"
            )

    @property
    def rows(self) -> DataConfig:
        """The data, with the format that rows of the objective have if they name none."""
        if self.train.objective != "classification" or self.data.format is not None:
            return self.data
        return dataclasses.replace(self.data, format="classification")

    def _check_head(self) -> None:
        """Raise LorakitError for settings of a head that the run gives no model."""
        given = {"labels": bool(self.labels), "problem_type": self.problem_type is not None}
        objective = self.train.objective
        for name, said in given.items():
            if said and objective != "classification":
                raise LorakitError(
                    f"{name} goes with objective classification, not with {objective}"
                )
            if said and self.adapter is not None:
                raise LorakitError(
                    f"adapter: the adapter in {self.adapter} has a head of its own: leave out "
                    f"{name}"
                )
        if len(self.labels) == 1:
            raise LorakitError("labels names one class; a classifier tells two at least")
        if self.labels:
            ClassifierConfig(self.labels, self.problem_type)  # which says what is wrong with them

    def _check_aware(self) -> None:
        """Raise LorakitError for what does not go with quantizing sums of base and update."""
        kind = self.lora.quantize_aware
        if self.shard == "full" or self.offload_weights:
            raise LorakitError(
                f"quantize_aware {kind} needs whole weights on the device: leave out shard and "
                "offload_weights"
            )
        if self.train.frozen_dtype is not None:
            raise LorakitError(f"quantize_aware {kind} does not go with frozen_dtype float8")

    def _check_grpo(self) -> None:
        """Raise LorakitError for what does not go with sampling from the model in training."""
        if self.data.validation is not None:
            raise LorakitError("objective grpo evaluates on no validation rows yet; leave them out")
        if self.shard == "full" or self.offload_weights:
            raise LorakitError(
                "objective grpo samples from whole weights on the device: leave out shard and "
                "offload_weights"
            )

    def _check_full(self, with_lora: bool) -> None:
        """Raise LorakitError for what does not go with training the model itself."""
        for name, given in (("lora", with_lora), ("adapter", self.adapter is not None)):
            if given:
                raise LorakitError(f"train: full trains the model, no adapter: leave out {name}")
        if self.offload_weights:
            raise LorakitError(
                "train: full changes the weights, which then cannot wait in host memory: leave out "
                "offload_weights"
            )
        if self.quantize is not None:
            raise LorakitError(
                "train: full needs dense weights, which quantize packs: leave out quantize, or "
                "train an adapter"
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
            LorakitError: Keys are unknown, a value is wrong, two names set the same thing, or an
                alias asks for what lorakit cannot do.
        """
        own, notes = cls.own_keys(values, where)
        _check_flat_grpo(values, own, where)
        run = cls._from_own_names(own, where)
        cls.tell(notes, where)
        return run

    @classmethod
    def own_keys(cls, values: Any, where: str) -> tuple[dict[Any, Any], list[str]]:
        """Return keys of a run file by lorakit's names alone, and lines about what that changes.

        Raises LorakitError if keys are unknown, or two names set the same thing.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must be a mapping of names to values, not {values!r:.60}")
        try:
            own, notes = own_names(values)
        except ValueError as error:
            raise LorakitError(f"{where}: {error}") from None
        return own, notes + cls._take_out_unknown(own, where)

    @staticmethod
    def tell(notes: Iterable[str], where: str) -> None:
        """Say in the log what the names of other libraries changed or left out."""
        for note in notes:
            log.warning("lorakit: %s: %s", where, note)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping of a run file that says the same, without what is the default.

        Returns:
            A mapping that JSON and YAML can hold, from which `from_dict` makes equal settings.
        """
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        train = said.pop("train")
        values = {"model": said.pop("model"), "data": _unlike_default(said.pop("data"))}
        values |= _differing(self, said) | _unlike_default(train)
        if self.quantize is not None:  # whose defaults are not those of null
            values["quantize"] = dataclasses.asdict(self.quantize)
        return values

    @classmethod
    def _take_out_unknown(cls, values: dict[Any, Any], where: str) -> list[str]:
        """Take unknown keys without a value out of a mapping, and return a line about each.

        Raises LorakitError for unknown keys with a value, which names all of them.
        """
        own = [f.name for f in dataclasses.fields(cls) if f.name != "train"]
        valid = [*own, *(f.name for f in dataclasses.fields(TrainConfig))]
        unknown = [name for name in values if name not in valid]
        with_value = [name for name in unknown if values[name] is not None]
        if with_value:
            known = [*valid, *sorted(ALIASES)]
            inner = {"distillation": DistillationConfig, "grpo": GrpoConfig}
            where_to = {
                f.name: f" (say it in {mapping})"
                for mapping, settings in inner.items()
                for f in dataclasses.fields(settings)
            }
            several = " (only `lorakit train` takes a file of several adapters)"
            where_to |= dict.fromkeys(SEVERAL, several)
            hints = [where_to.get(name) or nearest(name, known) for name in with_value]
            each = ", ".join(map("{!r}{}".format, with_value, hints))
            raise LorakitError(f"{where}: unknown key{'s' * (len(with_value) > 1)} {each}")
        for name in unknown:
            del values[name]
        return [f"{name!r} is unknown, has no value and is ignored" for name in unknown]

    @classmethod
    def _from_own_names(cls, values: dict[Any, Any], where: str) -> "RunConfig":
        """Build the settings from a mapping with lorakit's names alone, and change that mapping."""
        if values.get("data") is not None:
            values["data"] = data_config(values["data"], f"{where}, data")
        if "lora" in values and values["lora"] is not None:
            if values.get("train") == "full":
                raise LorakitError(
                    f"{where}: train: full trains the model, no adapter: leave out lora"
                )
            lora = without_unset(LoraConfig, values["lora"])
            values["lora"] = from_mapping(LoraConfig, lora, f"{where}, lora")
        if values.get("distillation") is not None:
            given = without_unset(DistillationConfig, values["distillation"])
            where_of = f"{where}, distillation"
            values["distillation"] = from_mapping(DistillationConfig, given, where_of)
        if "grpo" in values:
            values["grpo"] = grpo_config(values["grpo"], f"{where}, grpo")
        values["quantize"] = quant_config(values.get("quantize"), f"{where}, quantize")
        training = [f.name for f in dataclasses.fields(TrainConfig) if f.name in values]
        train = {name: values.pop(name) for name in training}
        values["train"] = from_mapping(TrainConfig, without_unset(TrainConfig, train), where)
        run = from_mapping(cls, without_unset(cls, values), where)
        to_dtype(run.dtype)
        return run


def _check_flat_grpo(values: Mapping[Any, Any], own: Mapping[Any, Any], where: str) -> None:
    """Raise LorakitError for settings of grpo, outside of a mapping, in a run that has none.

    Args:
        values: The mapping of the run file.
        own: The same with lorakit's names alone.
        where: The name of the file in messages.
    """
    objective = own.get("objective") or "sft"
    said = [name for name, value in values.items() if value is not None]
    flat = [name for name in said if RENAMED.get(name, "").startswith("grpo.")]
    if objective == "grpo" or not flat:
        return
    own_mapping = {f.name for f in dataclasses.fields(DistillationConfig)}
    other = objective == "distillation" and flat[0] in own_mapping
    todo = "say it in distillation" if other else "say that, or leave it out"
    raise LorakitError(f"{where}: {flat[0]} goes with objective grpo, not with {objective}; {todo}")


def _unlike_default(settings: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that are not the defaults, by name."""
    said = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return _differing(settings, said)


def _differing(settings: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some values that are not the defaults of a dataclass, as plain values."""
    found = {}
    for f in dataclasses.fields(settings):
        if f.name in values:
            default = f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            if values[f.name] != default:
                found[f.name] = _plain(values[f.name])
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _unlike_default(value)
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    return value
