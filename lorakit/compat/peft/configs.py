"""PEFT's LoraConfig and TaskType.

The LoraConfig here is lorakit's with the other fields of PEFT's, so that a script that sets them
still runs. Those that change nothing are accepted. Those that would change what is computed, and
that lorakit lacks, are refused; adapters/peft_files/features.py has the table of both.
"""

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapters.peft_files.features import check_new
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PEFT_ALPHA, PEFT_RANK
from lorakit.config.adapters import LoraConfig as PlainConfig
from lorakit.config.errors import check
from lorakit.config.fields import from_mapping
from lorakit.files.hub import resolve
from lorakit.files.local import as_path, read_json, write_json

_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # PEFT's for every family that lorakit knows


class TaskType(str, enum.Enum):
    """The task of a model. lorakit's adapters do not depend on it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# For these tasks PEFT trains a head whole, as if it stood in modules_to_save.
_WITH_CLASSIFIER = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class LoraConfig(PlainConfig):
    """A low-rank adapter, described by the fields of PEFT's LoraConfig.

    Raises:
        LorakitError: A field that lorakit lacks would change what is computed, the task needs a
            module of its own to be trained, or lorakit's LoraConfig refuses a value.
    """

    r: int = PEFT_RANK
    """Rank of the update, as in lorakit's LoraConfig."""
    lora_alpha: int | float = PEFT_ALPHA
    """Strength of the update, with PEFT's default instead of lorakit's."""
    # None stands here only until __post_init__ puts the default in its place.
    target_modules: str | list[str] | None = None  # type: ignore[assignment]
    """Layers to adapt, as in lorakit's LoraConfig. null: ["q_proj", "v_proj"]."""
    task_type: TaskType | str | None = None
    """The task of the model. "CAUSAL_LM" gives a PeftModelForCausalLM."""
    base_model_name_or_path: str | None = None
    """The model that the adapter belongs to, as a path or a Hub id. It is written into the file."""
    inference_mode: bool = False
    """Freeze the adapter from the start."""
    # These change nothing here.
    peft_type: Any = "LORA"
    revision: Any = None
    auto_mapping: Any = None
    peft_version: Any = None
    megatron_core: Any = None
    qalora_group_size: Any = None
    runtime_config: Any = None
    # These have to stay unused.
    alora_invocation_tokens: Any = None
    arrow_config: Any = None
    corda_config: Any = None
    eva_config: Any = None
    kasa_config: Any = None
    layer_replication: Any = None
    loftq_config: Any = field(default_factory=dict)
    lora_ga_config: Any = None
    megatron_config: Any = None
    monteclora_config: Any = None
    target_parameters: Any = None
    use_bdlora: Any = None
    use_qalora: Any = False
    velora_config: Any = None

    def __post_init__(self) -> None:
        check_new(vars(self))
        task = self.task_type
        check(
            task is None or task in list(TaskType),
            f"LoraConfig: task_type is {task!r}; choose one of {', '.join(TaskType.__members__)}",
        )
        check(
            task not in _WITH_CLASSIFIER,
            f"LoraConfig: task_type {task!r} is not supported; name the head in modules_to_save, "
            "without a task_type",
        )
        self._set("target_modules", self.target_modules or _DEFAULT_TARGETS)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
            value = vars(self)[name]
            if isinstance(value, (set, tuple, range)):
                self._set(name, sorted(value))
        for name in ("rank_pattern", "alpha_pattern"):
            self._set(name, vars(self)[name] or {})
        super().__post_init__()

    def _set(self, name: str, value: Any) -> None:
        """Give a field of this frozen dataclass its final value."""
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write adapter_config.json into a directory, which is made if it is missing."""
        folder = as_path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, self.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LoraConfig":
        """Read the config of an adapter.

        Args:
            path: The directory of the adapter, or its Hub id.

        Returns:
            The config.

        Raises:
            LorakitError: The file is missing or damaged, or the adapter is not LoRA.
        """
        file = resolve(path, [CONFIG_FILE]) / CONFIG_FILE
        values = read_json(file)
        check(
            values.get("peft_type") == "LORA",
            f"{file}: peft_type is {values.get('peft_type')!r}; only 'LORA' is supported",
        )
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: v for key, v in values.items() if key in known and v is not None}
        config: LoraConfig = from_mapping(cls, values, str(file))
        return config


PeftConfig = LoraConfig
