"""The interface of a method of adapting a model.

`attach`, `save_adapter` and `load_adapter` know no method by name. They find the method of a config
in methods/known.py and ask it: how does it plan an adapter, and what do PEFT's files hold of it?

    Method          the questions, which every method answers
    LinearMethod    most of the answers, for methods that adapt linear layers alone
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.manage import attached
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, AdapterFiles, name_in
from lorakit.adapters.plan import Plan
from lorakit.adapters.targets import targets_for
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping


class Config(Protocol):
    """Any dataclass: the config of each method is one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=Config)
T = TypeVar("T", bound=TargetConfig)


class Method(ABC, Generic[C]):
    """One way to adapt a model, and how PEFT's files hold it."""

    peft_type: str
    """The name of the method in adapter_config.json."""
    config_type: type[C]
    """The class of its configs. A config of a subclass belongs to the method too."""

    @abstractmethod
    def plan(self, model: nn.Module, config: C) -> Plan:
        """Return the plan of an adapter with this config: what it wraps in `model` and adds.

        Raises LorakitError for whatever cannot be adapted. `model` does not change.
        """

    @abstractmethod
    def config_values(self, model: nn.Module, name: str, config: C) -> dict[str, Any]:
        """Return the values of adapter_config.json for adapter `name`, which has this config."""

    @abstractmethod
    def read_config(self, files: AdapterFiles, model: nn.Module) -> C:
        """Return the config that these files describe, with the names that `model` has."""

    def key(self, place: str, ending: str) -> str:
        """Return the key in the file of a tensor of the module at `place`."""
        return f"{PREFIX}{place}.{ending}"

    def shared_tensors(self, model: nn.Module, name: str, config: C) -> dict[str, Tensor]:
        """Return the tensors in the file that belong to no one module, by their keys."""
        return {}

    def takes_from_the_base(self, config: C) -> bool:
        """Return whether PEFT takes the start of such an adapter out of the base's weights."""
        return False


class LinearMethod(Method[T]):
    """A method that adapts linear layers, and whose file repeats the fields of its config."""

    names_of_layers: tuple[str, ...] = ("target_modules",)
    """The fields of the config that hold names of layers."""

    def config_values(self, model: nn.Module, name: str, config: T) -> dict[str, Any]:
        """Return every field; the layers stand there by their shortest clear names."""
        values = fields_of(self, config)
        for chosen in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            del values[chosen]
        values["target_modules"] = targets_for(list(linear_parts(model, name)), model)
        return values

    def read_config(self, files: AdapterFiles, model: nn.Module) -> T:
        """Return the config with its names of layers as `model` has them."""
        config = config_from(self.config_type, files)
        renamed: dict[str, Any] = {}
        for field in self.names_of_layers:
            names = getattr(config, field)
            if isinstance(names, list):  # a regex stays as it is
                renamed[field] = [name_in(model, name) for name in names]
        return dataclasses.replace(config, **renamed)


def linear_parts(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the parts of adapter `name` in linear layers, by the sorted names of the layers."""
    return {
        place: wrapper.part_of(name)
        for place, wrapper in sorted(attached(model).items())
        if isinstance(wrapper, AttachedLinear) and name in wrapper.adapters
    }


def fields_of(method: Method[C], config: C) -> dict[str, Any]:
    """Return the fields of `config`, and those that every file of PEFT has."""
    always = {"peft_type": method.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
    return dataclasses.asdict(config) | always


def config_from(config_type: type[C], files: AdapterFiles, **more: Any) -> C:
    """Return the config that adapter_config.json describes, for any method but LoRA.

    Fields of PEFT's that `config_type` lacks are left out, and so are fields that are null. `more`
    holds values that the file does not decide.
    """
    values = files.values
    if values.get("bias", "none") != "none":
        raise LorakitError(f"{files.path}: bias={json.dumps(values['bias'])} is for LoRA alone")
    fields = {field.name for field in dataclasses.fields(config_type)}
    known = {key: value for key, value in values.items() if key in fields and value is not None}
    if values.get("layers_to_transform") is None:
        known.pop("layers_pattern", None)
    return from_mapping(config_type, known | more, str(files.path / CONFIG_FILE))
