"""Write an adapter in PEFT's format; load.py reads it.

    adapter_config.json          the config, with the fields that every version of PEFT reads
    adapter_model.safetensors    base_model.model.<module>.<ending> -> tensor, where <ending> is

    lora_A.weight [r, in], lora_B.weight [out, r]               a linear layer
    lora_B.bias [out], lora_magnitude_vector [out]              with lora_bias, with DoRA
    lora_embedding_A [r, V], lora_embedding_B [H, r]            an embedding
    token_adapter.trainable_tokens_delta [n, H]                 trained rows of an embedding
    base_layer.bias [out]                                       a trained bias of an adapted layer
    bias                                                        a trained bias of another module
    weight, and the like                                        a module that is trained whole, as
                                                                the head for classes (labels.py)
    ia3_l [out, 1] or [1, in]                                   IA3
    vera_lambda_b [out], vera_lambda_d [r]                      VeRA, whose matrices of all layers
                                                                are base_model.vera_A and vera_B
    miss_block [r, out], or [r, mini_r]                         MiSS
    lora_A [r, in], lora_B [out, r], lora_E [r, 1]              AdaLoRA, the triplets that are left

A prompt has no module: it is prompt_embeddings, [n, H], or [n, 2 L Hk D] for keys and values.

The method of the adapter says what stands in the config (methods/method.py), and each wrapper says
which tensors it has. Experts are linear layers of their own, as in the published model files. The
fused form of transformers 5 is written on request (fused_experts.py). A base that is part of a
multimodal model has the names of that one (text_part.py).
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorakit.adapters.manage import adapter_config, attached, check_adapter, require_selected
from lorakit.adapters.methods.known import method_of
from lorakit.adapters.peft_files.fused_experts import fuse_experts
from lorakit.adapters.peft_files.labels import SEQ_CLS, save_labels
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorakit.adapters.peft_files.text_part import for_whole_model
from lorakit.adapters.peft_files.ties import TWINS, adapted_heads
from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path, write_json
from lorakit.files.safetensors import write_safetensors
from lorakit.models.classifier import Classifier
from lorakit.models.decoder import Decoder


@runtime_checkable
class _Generating(Protocol):
    """A causal language model of transformers."""

    def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> Any:
        """Only causal models have this method; it is never called here."""


def save_adapter(
    module: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    fused_experts: bool = False,
) -> None:
    """Write an adapter into a directory, in PEFT's format.

    The weights are written before the config, and each file whole or not at all.

    Args:
        module: The module that the adapter is attached to.
        path: The directory; it is made if it is missing.
        name: The adapter; None means the selected one.
        base_model: What the config records as base_model_name_or_path.
        fused_experts: Write the experts of a `Decoder` as transformers 5 holds them, for PEFT. By
            default they are linear layers of their own, which servers read.

    Raises:
        LorakitError: There is no such adapter, `path` is a file, or the experts cannot be fused.
    """
    if name is None:
        name = require_selected(module, "save_adapter")
    check_adapter(module, name, "save_adapter")
    config = adapter_config(module, name)
    method = method_of(config)
    values = method.config_values(module, name, config)
    if not isinstance(module, (Decoder, _Generating)):  # to PEFT a CAUSAL_LM generates
        values["task_type"] = None
    if isinstance(module, Classifier):
        values["task_type"] = SEQ_CLS
    tensors = adapter_tensors(module, name) | method.shared_tensors(module, name, config)
    if fused_experts:
        tensors, values = fuse_experts(module, tensors, values)
    tensors, values = for_whole_model(module, tensors, values)
    path = as_path(path)
    if path.exists() and not path.is_dir():
        raise LorakitError(f"save_adapter: {path} is a file; a directory is wanted")
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    if isinstance(module, Classifier):
        save_labels(path, module.classifier)
    write_json(path / CONFIG_FILE, values | {"base_model_name_or_path": base_model})


def adapter_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of the modules that adapter `name` changes, by their keys in the file."""
    method = method_of(adapter_config(module, name))
    tensors = {
        method.key(place, ending): tensor.detach()
        for place, wrapper in attached(module).items()
        if name in wrapper.adapters
        for ending, tensor in wrapper.tensors_to_save(name).items()
    }
    for head, embedding in adapted_heads(module).items():  # PEFT looks for it under both names
        for ending, (other, transposed) in TWINS.items():
            own = tensors.get(f"{PREFIX}{embedding}.{other}")
            if own is not None:
                twin = own.t() if transposed else own
                tensors[f"{PREFIX}{head}.{ending}"] = twin.clone(
                    memory_format=torch.contiguous_format
                )
    return tensors
