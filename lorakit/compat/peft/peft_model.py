"""PEFT's names over lorakit's functions: a script that uses PEFT changes one import.

    from lorakit.compat.peft import LoraConfig, get_peft_model, PeftModel

Each name does what it does in PEFT, on a model of transformers as on lorakit's decoder, and nothing
here computes: what an adapter is, and what is refused, is the business of `lk.attach` and its
neighbours. docs/migration.md has both beside each other, and what differs.

    PeftModel.base_model            a LoraModel
    PeftModel.base_model.model      the model, with adapters attached in place

so that the names of modules are those that PEFT gives, and the keys of its files. What a PeftModel
has not itself, the model is asked for.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lorakit.adapters.attach import attach
from lorakit.adapters.combine import PRUNED, combine_adapters
from lorakit.adapters.manage import (
    adapter_config,
    adapter_names,
    adapter_rows,
    attached,
    check_adapter,
    delete_adapter,
    detach,
    disable_adapters,
    selected_adapter,
    set_adapter,
)
from lorakit.adapters.merge import merge, merge_and_unload, unmerge
from lorakit.adapters.methods.prompts import PromptConfig
from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.layout import CONFIG_FILE, WEIGHTS_FILE
from lorakit.adapters.peft_files.load import load_adapter
from lorakit.adapters.peft_files.save import adapter_tensors, save_adapter
from lorakit.adapters.peft_files.ties import key_of
from lorakit.config.adapters import LoraConfig as PlainConfig
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError, check, nearest
from lorakit.config.fields import from_mapping
from lorakit.files.hub import resolve
from lorakit.files.local import as_path, read_json, write_json
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedWeight

DEFAULT_TARGETS = ["q_proj", "v_proj"]  # PEFT's for every family that lorakit knows


class TaskType(str, enum.Enum):
    """What a model is for. lorakit's adapters do not depend on it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


WITH_CLASSIFIER = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT adds to modules_to_save
# options of PEFT for loading that have to be left as they are there
FOR_LOADING = (
    "config",
    "device_map",
    "ephemeral_gpu_offload",
    "ignore_mismatched_sizes",
    "key_mapping",
    "max_memory",
    "offload_folder",
    "revision",
    "subfolder",
    "token",
    "torch_dtype",
)


@dataclass(frozen=True)
class LoraConfig(PlainConfig):
    """lorakit's LoraConfig with the other fields of PEFT's.

    Raises LorakitError for a field that lorakit has not and that would change what is computed, a
    task that needs a module of its own to be trained, and what lorakit's LoraConfig refuses.
    """

    target_modules: str | list[str] | None = None
    """None: ["q_proj", "v_proj"]"""
    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    """frozen from the start"""
    # what changes nothing here
    peft_type: Any = "LORA"
    revision: Any = None
    auto_mapping: Any = None
    peft_version: Any = None
    megatron_core: Any = None
    qalora_group_size: Any = None
    runtime_config: Any = None
    # what has to be unused
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

    def __post_init__(self):
        features.check_new(vars(self))
        task = self.task_type
        check(
            task is None or task in list(TaskType),
            f"LoraConfig: task_type is {task!r}; choose one of {', '.join(TaskType.__members__)}",
        )
        check(
            task not in WITH_CLASSIFIER,
            f"LoraConfig: task_type {task!r} is not supported; name the head in modules_to_save, "
            "without a task_type",
        )
        self._take("target_modules", self.target_modules or DEFAULT_TARGETS)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
            if isinstance(getattr(self, name), (set, tuple, range)):
                self._take(name, sorted(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            self._take(name, getattr(self, name) or {})
        super().__post_init__()

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write adapter_config.json into a directory, which is made if missing."""
        folder = as_path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, self.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LoraConfig":
        """From the directory of an adapter, or its Hub id. Raises LorakitError as `load_adapter`
        does for a bad file.
        """
        file = resolve(path, [CONFIG_FILE]) / CONFIG_FILE
        values = read_json(file)
        check(
            values.get("peft_type") == "LORA",
            f"{file}: peft_type is {values.get('peft_type')!r}; only 'LORA' is supported",
        )
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: v for key, v in values.items() if key in known and v is not None}
        return from_mapping(cls, values, str(file))


PeftConfig = LoraConfig


@runtime_checkable
class Pretrained(Protocol):
    """What is asked of a model of transformers."""

    name_or_path: str

    def enable_input_require_grads(self) -> None: ...

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None: ...


class _Outside(nn.Module):
    """Answers for what it holds."""

    inside: str  # the name of what it holds

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inside:  # nothing is held yet
                raise
            return getattr(super().__getattr__(self.inside), name)


class LoraModel(_Outside):
    """The model under the name that it has in PEFT."""

    inside = "model"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.training, self.model = model.training, model

    def forward(self, *args, **options):
        return self.model(*args, **options)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """As `PeftModel.set_adapter`."""
        set_adapter(self.model, adapter_name)
        _train(self.model, adapter_name, not inference_mode)

    def disable_adapter_layers(self) -> None:
        """Compute without adapters until `enable_adapter_layers`."""
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for each in attached(self.model).values():
            each.enabled = enabled
            each.refresh()

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """`lk.merge` of the active adapter, or of the one named; it is always safe."""
        with _same_training(self.model):
            self._select_for("merge_adapter", adapter_names)
        merge(self.model)

    def unmerge_adapter(self) -> None:
        """`lk.unmerge`: the weights are what they were, to the bit."""
        unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The model with the active adapter, or the one named, in its weights, and no other; always
        safe. A quantized base becomes dense.
        """
        self._select_for("merge_and_unload", adapter_names)
        return merge_and_unload(self.model)

    def unload(self) -> nn.Module:
        """The model without adapters."""
        return detach(self.model)

    def _select_for(self, what: str, names: Sequence[str] | None) -> None:
        if names is not None:
            check(len(names) == 1, f"{what}: one adapter is merged; combine several first")
            set_adapter(self.model, names[0])

    @property
    def active_adapter(self) -> str | None:
        return selected_adapter(self.model)

    @property
    def active_adapters(self) -> list[str]:
        return [] if self.active_adapter is None else [self.active_adapter]


class PeftModel(_Outside):
    """A model with adapters by name, of which one, or none, is active."""

    inside = "base_model"

    def __init__(
        self,
        model: nn.Module,
        peft_config: PlainConfig | None = None,
        adapter_name: str = "default",
    ):
        super().__init__()
        if peft_config is not None:
            _add(model, adapter_name, peft_config)
        self.training, self.base_model = model.training, LoraModel(model)
        if isinstance(model, Pretrained) and _is_checkpointing(model):
            model.enable_input_require_grads()  # or reentrant checkpoints give A and B no gradient

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: Any = None,
        **options: Any,
    ) -> "PeftModel":
        """`model` with the adapter of a directory, or of a Hub id; frozen and in eval mode unless
        it is to be trained. It goes where the layers are, whatever torch_device is. Raises
        LorakitError as `lk.load_adapter` does, and for an option that lorakit does not have.
        """
        _check_dtype(autocast_adapter_dtype)
        _check_loading(options, "from_pretrained")
        path = resolve(model_id, [CONFIG_FILE, WEIGHTS_FILE])
        task = read_json(path / CONFIG_FILE).get("task_type") if cls is PeftModel else None
        _load(model, path, adapter_name, is_trainable)
        if not is_trainable:
            model.eval()
        return (PeftModelForCausalLM if task == TaskType.CAUSAL_LM else cls)(model)

    # ---- which adapters there are ----

    def get_base_model(self) -> nn.Module:
        """The model itself, with what is attached to it."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, LoraConfig | TargetConfig | PromptConfig]:
        """The config of each adapter."""
        model = self.get_base_model()
        return {name: self._config_of(name) for name in adapter_names(model)}

    @property
    def active_peft_config(self) -> LoraConfig | TargetConfig | PromptConfig:
        return self._config_of(self.active_adapter)

    def _config_of(self, name: str) -> LoraConfig | TargetConfig | PromptConfig:
        model = self.get_base_model()
        config = adapter_config(model, name)
        if not isinstance(config, PlainConfig):  # of another method than LoRA
            return config
        if not isinstance(config, LoraConfig):
            values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            config = LoraConfig(**values)
        if config.base_model_name_or_path is None:
            config = dataclasses.replace(config, base_model_name_or_path=self._origin())
        return dataclasses.replace(config, inference_mode=not _trains(model, name))

    def _origin(self) -> str | None:
        model = self.get_base_model()
        if isinstance(model, Decoder):
            return None if model.source is None else str(model.source.path)
        return (model.name_or_path or None) if isinstance(model, Pretrained) else None

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Compute with this adapter, and train it unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PlainConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach one more adapter, which waits for `set_adapter`."""
        _check_dtype(autocast_adapter_dtype)
        _add(self.get_base_model(), adapter_name, peft_config)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: Any = None,
        **options: Any,
    ) -> None:
        """Attach the adapter of a directory, or of a Hub id; it waits for `set_adapter`."""
        _check_dtype(autocast_adapter_dtype)
        _check_loading(options, "load_adapter")
        path = resolve(model_id, [CONFIG_FILE, WEIGHTS_FILE])
        _load(self.get_base_model(), path, adapter_name, is_trainable)
        if not is_trainable:
            self.eval()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the first of the others is from now on."""
        delete_adapter(self.get_base_model(), adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Attach one adapter made of several, as `lk.combine_adapters` does."""
        check(svd_clamp is None, "add_weighted_adapter: lorakit has no svd_clamp")
        options = {  # PEFT takes, and leaves, what a kind does not know
            "rank": svd_rank if "svd" in combination_type else None,
            "density": density if combination_type.startswith(PRUNED) else None,
        }
        with _nothing_else(self.get_base_model()):
            combine_adapters(
                self.get_base_model(),
                adapters,
                weights,
                adapter_name,
                combination_type,
                majority_sign_method=majority_sign_method,
                **options,
            )

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside the `with` block the model computes without adapters."""
        return disable_adapters(self.get_base_model())

    # ---- computing ----

    def _rows(self, names: Sequence[str] | None) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        check(not self.training, "adapter_names: the model is in training mode; call eval() first")
        names = [None if name == "__base__" else name for name in names]
        return adapter_rows(self.get_base_model(), names)

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **options):
        """What the model computes. adapter_names: of each row of the batch the adapter, "__base__"
        for none.
        """
        with self._rows(adapter_names):
            return self.base_model(*args, **options)

    def generate(self, *args, adapter_names: Sequence[str] | None = None, **options):
        """What the model generates, for those that do (lorakit's decoder: `lk.generate`)."""
        beams = options.get("num_beams") or 1  # each of which is a row
        if adapter_names is not None:
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        with self._rows(adapter_names):
            return self.get_base_model().generate(*args, **options)

    # ---- parameters ----

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Train these adapters, or do not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            check_adapter(self.get_base_model(), name, "set_requires_grad")
            _train(self.get_base_model(), name, requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many values are trained, and how many there are; packed ones count each."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        every = sum(p.numel() for p in self.parameters())
        for each in self.modules():
            if isinstance(each, PackedWeight):
                stored = {n: p for n, p in each.named_parameters(recurse=False) if n != "bias"}
                every += math.prod(each.shape) - sum(p.numel() for p in stored.values())
        return trained, every

    def print_trainable_parameters(self) -> None:
        trained, every = self.get_nb_trainable_parameters()
        share = 100 * trained / every
        print(
            f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}"
        )

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
    ) -> None:
        """Write all adapters, or those selected: "default" into the directory, others into one of
        their name inside it. What started from a part of the weight is plain LoRA in the file
        without path_initial_model_for_weight_conversion. Raises LorakitError if there is no such
        adapter.
        """
        check(safe_serialization, "save_pretrained: adapters are written as safetensors only")
        check(
            save_embedding_layers is not True,
            "save_pretrained: embeddings that were not trained are not written; save the model",
        )
        names = self.peft_config if selected_adapters is None else selected_adapters
        for name in names:
            check_adapter(self.get_base_model(), name, "save_pretrained")
        for name in names if is_main_process else []:
            folder = Path(save_directory) / ("" if name == "default" else name)
            config = self._config_of(name)
            lora = isinstance(config, LoraConfig)
            origin = config.base_model_name_or_path if lora else self._origin()
            save_adapter(self.get_base_model(), folder, name=name, base_model=origin)


class PeftModelForCausalLM(PeftModel):
    """A PeftModel whose arguments have names: the Trainer of transformers reads them to know which
    columns of the data are wanted.
    """

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **options
    ):
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        named = {name: value for name, value in named.items() if value is not None}
        return super().forward(**named, **options)


def get_peft_model(
    model: nn.Module,
    peft_config: PlainConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """`model` with a new adapter, attached in place. Raises LorakitError as `lk.attach` does."""
    check(not mixed, "get_peft_model: adapters of mixed kinds are not supported")
    _check_dtype(autocast_adapter_dtype)
    causal = isinstance(peft_config, LoraConfig) and peft_config.task_type == TaskType.CAUSAL_LM
    return (PeftModelForCausalLM if causal else PeftModel)(model, peft_config, adapter_name)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Freeze `model`, and switch gradient checkpointing on. Returns `model`.

    No dtype changes. PEFT makes all that is not packed fp32 here, embeddings and head too, which
    are the larger part of a packed model: lorakit's adapters are fp32 in any case, its norms and
    its loss sum in fp32 whatever the weights are, and so do those of transformers.
    """
    model.requires_grad_(False)
    if not use_gradient_checkpointing:
        return model
    if isinstance(model, Decoder):
        model.gradient_checkpointing = True
        return model
    if not isinstance(model, Pretrained):
        raise LorakitError(
            f"prepare_model_for_kbit_training: a {type(model).__name__} has no gradient "
            "checkpointing; pass use_gradient_checkpointing=False"
        )
    options = dict(gradient_checkpointing_kwargs or {})
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    return model


def get_peft_model_state_dict(
    model: PeftModel, state_dict: None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The tensors of an adapter by the keys of its file, copies where it started from a part of the
    weight. Raises LorakitError if there is no such adapter, or a state_dict is given.
    """
    check(state_dict is None, "get_peft_model_state_dict: the model's own state_dict is taken")
    check_adapter(model.get_base_model(), adapter_name, "get_peft_model_state_dict")
    return adapter_tensors(model.get_base_model(), adapter_name)


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give an adapter the values of such tensors. Raises LorakitError, and changes nothing, if one
    is missing, belongs to nothing, or has another shape.
    """
    base, given = model.get_base_model(), peft_model_state_dict
    check_adapter(base, adapter_name, "set_peft_model_state_dict")
    known = adapter_tensors(base, adapter_name)  # a tied head has what its embedding has
    having = [
        (each, {key_of(place, each, ending): ending for ending in each.stored(adapter_name)})
        for place, each in attached(base).items()
        if adapter_name in each.adapters
    ]
    for key in sorted(key for _, keys in having for key in keys if key not in given):
        raise LorakitError(f"set_peft_model_state_dict: tensor {key} is missing")
    for key in sorted(given.keys() - known.keys()):
        raise LorakitError(
            f"set_peft_model_state_dict: tensor {key} belongs to no adapted layer of this model"
        )
    for key, tensor in given.items():
        check(
            isinstance(tensor, Tensor),
            f"set_peft_model_state_dict: {key} is no tensor but a {type(tensor).__name__}",
        )
        check(
            tensor.shape == known[key].shape,
            f"set_peft_model_state_dict: tensor {key} is {tuple(tensor.shape)}, the model needs "
            f"{tuple(known[key].shape)}",
        )
    for each, keys in having:
        each.restore(adapter_name, {ending: given[key] for key, ending in keys.items()})


# ---- as PEFT does it, where lorakit selects and trains at once ----


def _check_dtype(autocast_adapter_dtype: bool) -> None:
    check(
        autocast_adapter_dtype,
        "autocast_adapter_dtype=False is not supported: adapters are fp32 whatever the model is",
    )


def _check_loading(options: Mapping[str, Any], what: str) -> None:
    for name, value in options.items():
        check(name in FOR_LOADING, f"{what}: unknown option {name!r}{nearest(name, FOR_LOADING)}")
        check(value in (None, False), f"{what}: {name} is not supported; leave it out")


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether a model of transformers is: its blocks say so in an attribute."""
    return any(m.__dict__.get("gradient_checkpointing", False) for m in model.modules())


def _trains(model: nn.Module, name: str) -> bool:
    parts = [m.adapters[name] for m in attached(model).values() if name in m.adapters]
    return any(p.requires_grad for part in parts for p in part.parameters())


def _train(model: nn.Module, name: str, required: bool) -> None:
    for each in attached(model).values():
        if name in each.adapters:
            each.adapters[name].requires_grad_(required)


@contextmanager
def _nothing_else(model: nn.Module) -> Iterator[None]:
    """One more adapter comes inside the `with` block; what computes and what trains stays so."""
    before = selected_adapter(model)
    with nullcontext() if before is None else _same_training(model):
        yield
        if before is not None:
            set_adapter(model, before)


@contextmanager
def _same_training(model: nn.Module) -> Iterator[None]:
    """What trains now does so after the `with` block, whatever is selected inside it."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    yield
    for parameter, trains in required:
        parameter.requires_grad_(trains)


def _add(model: nn.Module, name: str, config: PlainConfig) -> None:
    with _nothing_else(model):
        attach(model, config, name=name)
    if isinstance(config, LoraConfig) and config.inference_mode:
        _train(model, name, False)


def _load(model: nn.Module, path: Path, name: str, is_trainable: bool) -> None:
    with _nothing_else(model):
        load_adapter(model, path, name=name)
    _train(model, name, is_trainable)
