"""PeftModel and get_peft_model: a model with adapters by name, of which one, or none, is active."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.combine import PRUNED, combine_adapters
from lorakit.adapters.manage import (
    adapter_config,
    adapter_names,
    adapter_rows,
    check_adapter,
    delete_adapter,
    disable_adapters,
)
from lorakit.adapters.methods.prompts import PromptConfig
from lorakit.adapters.peft_files.layout import CONFIG_FILE, WEIGHTS_FILE
from lorakit.adapters.peft_files.save import save_adapter
from lorakit.compat.peft.configs import LoraConfig, TaskType
from lorakit.compat.peft.lora_model import LoraModel, Wrapper
from lorakit.compat.peft.preparation import Pretrained, uses_gradient_checkpointing
from lorakit.compat.peft.selection import (
    add_adapter,
    add_adapter_from,
    is_trained,
    same_selection,
    set_trained,
)
from lorakit.config.adapters import LoraConfig as PlainConfig
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import check, nearest
from lorakit.files.hub import resolve
from lorakit.files.local import read_json
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedWeight

# PEFT's options for loading. Only their defaults are accepted.
_FOR_LOADING = (
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


class PeftModel(Wrapper):
    """A model with adapters by name, of which one, or none, is active."""

    inside = "base_model"

    def __init__(
        self,
        model: nn.Module,
        peft_config: TargetConfig | PromptConfig | None = None,
        adapter_name: str = "default",
    ):
        """Wrap a model, with a new adapter or with those that are attached to it.

        Args:
            model: The model, which is changed in place.
            peft_config: What the new adapter is; None adds none.
            adapter_name: The name of the new adapter.
        """
        super().__init__()
        if peft_config is not None:
            add_adapter(model, adapter_name, peft_config)
        self.training, self.base_model = model.training, LoraModel(model)
        if isinstance(model, Pretrained) and uses_gradient_checkpointing(model):
            model.enable_input_require_grads()  # or A and B get no gradient where it is reentrant

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
        """Return `model` with an adapter that was saved.

        Args:
            model: The model, which is changed in place.
            model_id: The directory of the adapter, or its Hub id.
            adapter_name: The name that the adapter gets.
            is_trainable: Whether to train it; if not, it is frozen and the model is in eval mode.
            autocast_adapter_dtype: Must be True; adapters are fp32.
            low_cpu_mem_usage: Has no effect.
            torch_device: Has no effect; the adapter goes where its layers are.
            options: Other options of PEFT, which must be None or False.

        Returns:
            A PeftModelForCausalLM if the file says so, else a PeftModel.

        Raises:
            LorakitError: `lk.load_adapter` refuses the files, or an option is not supported.
        """
        _check_dtype(autocast_adapter_dtype)
        _check_loading(options, "from_pretrained")
        path = resolve(model_id, [CONFIG_FILE, WEIGHTS_FILE])
        task = read_json(path / CONFIG_FILE).get("task_type") if cls is PeftModel else None
        add_adapter_from(model, path, adapter_name, is_trainable)
        if not is_trainable:
            model.eval()
        return (PeftModelForCausalLM if task == TaskType.CAUSAL_LM else cls)(model)

    # ---- which adapters there are ----

    def get_base_model(self) -> nn.Module:
        """Return the model itself, with what is attached to it."""
        model: nn.Module = self.base_model.model
        return model

    @property
    def peft_config(self) -> dict[str, LoraConfig | TargetConfig | PromptConfig]:
        """The config of each adapter, by the adapter's name."""
        model = self.get_base_model()
        return {name: self._config_of(name) for name in adapter_names(model)}

    @property
    def active_peft_config(self) -> LoraConfig | TargetConfig | PromptConfig:
        """The config of the active adapter."""
        return self._config_of(self.active_adapter)

    def _config_of(self, name: str) -> LoraConfig | TargetConfig | PromptConfig:
        """Return the config of an adapter; one of LoRA becomes a LoraConfig of this package."""
        model = self.get_base_model()
        config: TargetConfig | PromptConfig = adapter_config(model, name)
        if not isinstance(config, PlainConfig):  # another method than LoRA
            return config
        if not isinstance(config, LoraConfig):
            config = LoraConfig(**vars(config))
        if config.base_model_name_or_path is None:
            config = dataclasses.replace(config, base_model_name_or_path=self._origin())
        return dataclasses.replace(config, inference_mode=not is_trained(model, name))

    def _origin(self) -> str | None:
        """Return where the model came from: a path, or a Hub id."""
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
        peft_config: TargetConfig | PromptConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach one more adapter, which waits for `set_adapter`."""
        _check_dtype(autocast_adapter_dtype)
        add_adapter(self.get_base_model(), adapter_name, peft_config)

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
        """Attach one more adapter that was saved, which waits for `set_adapter`.

        The arguments are those of `from_pretrained`.
        """
        _check_dtype(autocast_adapter_dtype)
        _check_loading(options, "load_adapter")
        path = resolve(model_id, [CONFIG_FILE, WEIGHTS_FILE])
        add_adapter_from(self.get_base_model(), path, adapter_name, is_trainable)
        if not is_trainable:
            self.eval()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was active, the first of the others becomes active."""
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
        """Attach one adapter made of several, as `lk.combine_adapters` does.

        Args:
            adapters: The names of the adapters that it is made of.
            weights: A weight for each of them.
            adapter_name: The name of the new adapter.
            combination_type: One of the kinds of `lk.combine_adapters`.
            svd_rank: The rank of the new adapter, for the kinds with "svd".
            svd_clamp: Must be None.
            svd_full_matrices: Has no effect on the result.
            svd_driver: Has no effect; torch chooses.
            density: The share of values that is kept, for the kinds that prune.
            majority_sign_method: "total" or "frequency", for the kinds that vote on signs.

        Raises:
            LorakitError: `lk.combine_adapters` refuses something, or svd_clamp is given.
        """
        check(svd_clamp is None, "add_weighted_adapter: lorakit has no svd_clamp")
        model = self.get_base_model()
        with same_selection(model):
            combine_adapters(
                model,
                adapters,
                weights,
                adapter_name,
                combination_type,
                # PEFT accepts both options for every kind, and uses them where the kind does.
                rank=svd_rank if "svd" in combination_type else None,
                density=density if combination_type.startswith(PRUNED) else None,
                majority_sign_method=majority_sign_method,
            )

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Compute without adapters inside the `with` block."""
        return disable_adapters(self.get_base_model())

    # ---- computing ----

    def _rows(self, names: Sequence[str] | None) -> AbstractContextManager[None]:
        """Return a context in which row i goes through adapter names[i]; "__base__" means none."""
        if names is None:
            return nullcontext()
        check(not self.training, "adapter_names: the model is in training mode; call eval() first")
        rows = [None if name == "__base__" else name for name in names]
        return adapter_rows(self.get_base_model(), rows)

    def forward(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Return what the model computes.

        Args:
            args: Positional arguments of the model.
            adapter_names: The adapter for each row of the batch, "__base__" for none.
            options: Named arguments of the model.

        Returns:
            What the model returns.

        Raises:
            LorakitError: `adapter_names` is given in training mode, or names no adapter.
        """
        with self._rows(adapter_names):
            return self.base_model(*args, **options)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Return what a model of transformers generates; for lorakit's decoder use `lk.generate`.

        The arguments are those of the model's `generate`, and adapter_names as in `forward`.
        """
        model: Any = self.get_base_model()
        beams = options.get("num_beams") or 1  # each of which is a row
        if adapter_names is not None:
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        with self._rows(adapter_names):
            return model.generate(*args, **options)

    # ---- parameters ----

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Train these adapters, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            check_adapter(self.get_base_model(), name, "set_requires_grad")
            set_trained(self.get_base_model(), name, requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many values train, and how many there are; each packed value counts as one."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        every = sum(p.numel() for p in self.parameters())
        for each in self.modules():
            if isinstance(each, PackedWeight):
                own = each.named_parameters(recurse=False)
                stored = sum(p.numel() for name, p in own if name != "bias")
                every += math.prod(each.shape) - stored
        return trained, every

    def print_trainable_parameters(self) -> None:
        """Print how many values are trained, how many there are, and the share of the first."""
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
        """Write all adapters, or the selected ones.

        The adapter "default" is written into the directory, every other one into a directory of
        its name inside it. An adapter that started from a part of the weight (PiSSA, OLoRA) is
        always written as plain LoRA, so path_initial_model_for_weight_conversion is not needed.

        Args:
            save_directory: The directory, which is made if it is missing.
            safe_serialization: Must be True; only safetensors are written.
            selected_adapters: The names of the adapters to write; None writes all.
            save_embedding_layers: Must not be True; embeddings that were not trained are not
                written.
            is_main_process: Whether to write at all.
            path_initial_model_for_weight_conversion: Has no effect.

        Raises:
            LorakitError: There is no such adapter, or an option is not supported.
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
            if isinstance(config, LoraConfig):
                origin = config.base_model_name_or_path
            else:
                origin = self._origin()
            save_adapter(self.get_base_model(), folder, name=name, base_model=origin)


class PeftModelForCausalLM(PeftModel):
    """A PeftModel whose arguments have names.

    The Trainer of transformers reads the names to know which columns of the data are wanted.
    """

    def forward(  # type: ignore[override]  # the names are what the class is for
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **options: Any,
    ) -> Any:
        """Return what the model computes; see `PeftModel.forward`."""
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
    peft_config: TargetConfig | PromptConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Return `model` with a new adapter, which computes and trains.

    Args:
        model: The model, which is changed in place.
        peft_config: What the adapter is: a LoraConfig from here, or a config of `lorakit`.
        adapter_name: The name that the adapter gets.
        mixed: Must be False; adapters of mixed kinds are not supported.
        autocast_adapter_dtype: Must be True; adapters are fp32.
        revision: Has no effect.
        low_cpu_mem_usage: Has no effect.

    Returns:
        A PeftModelForCausalLM if the config's task_type is "CAUSAL_LM", else a PeftModel.

    Raises:
        LorakitError: `lk.attach` refuses the config, or an option is not supported.
    """
    check(not mixed, "get_peft_model: adapters of mixed kinds are not supported")
    _check_dtype(autocast_adapter_dtype)
    causal = isinstance(peft_config, LoraConfig) and peft_config.task_type == TaskType.CAUSAL_LM
    return (PeftModelForCausalLM if causal else PeftModel)(model, peft_config, adapter_name)


def _check_dtype(autocast_adapter_dtype: bool) -> None:
    check(
        autocast_adapter_dtype,
        "autocast_adapter_dtype=False is not supported: adapters are fp32 whatever the model is",
    )


def _check_loading(options: Mapping[str, Any], what: str) -> None:
    """Raise LorakitError, naming the caller, for options that are unknown or not supported."""
    for name, value in options.items():
        check(name in _FOR_LOADING, f"{what}: unknown option {name!r}{nearest(name, _FOR_LOADING)}")
        check(value in (None, False), f"{what}: {name} is not supported; leave it out")
