"""Convert adapters of single experts to those of fused experts, as in transformers 5, and back.

transformers 5 keeps the experts of a layer in two parameters, gate_up_proj and down_proj, and PEFT
adapts each as one (experts.py has the shapes). The config then has their names in
`target_parameters`, and their ranks and alphas in the patterns. lorakit has a linear layer for each
expert's gate, up and down. Both halves of gate_up_proj take part in it with an A of their own, so
its rank is twice theirs, and its alpha twice theirs, or with rsLoRA sqrt(2) times.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_files.experts import (
    experts_place,
    fused_place,
    is_fused,
    join_experts,
    split_experts,
)
from lorakit.adapters.peft_files.layout import (
    CONFIG_FILE,
    PATTERNS,
    PEFT_ALPHA,
    PEFT_RANK,
    PREFIX,
    AdapterFiles,
)
from lorakit.adapters.peft_files.lora_config import of_each_layer
from lorakit.adapters.peft_files.ties import adapted_heads
from lorakit.adapters.targets import ends_with, targets_for
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.files.safetensors import LazyTensor
from lorakit.models.decoder import Decoder

_RANKS = ("r", "lora_alpha", "use_rslora", *PATTERNS)  # the fields that scalings follow from
_LORA_A, _EMBEDDING_A = ".lora_A.weight", ".lora_embedding_A"


def fuse_experts(
    model: nn.Module, tensors: dict[str, Tensor], values: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of an adapter with its experts fused.

    Raises LorakitError if `model` has no experts, or those adapted differ in rank or alpha, or use
    DoRA.
    """
    if not isinstance(model, Decoder) or not model.config.num_experts:
        raise LorakitError("save_adapter: fused_experts, but the model has no experts")
    block, *leaves = model.config.moe_names
    single = re.compile(rf".*{experts_place(block)}\.\d+\.({'|'.join(leaves)})")
    heads = adapted_heads(model)  # their tensors are those of the embedding
    adapted_layers = [place for place in _adapted(tensors) if place not in heads]
    places = [place for place in adapted_layers if not single.fullmatch(place)]
    experts = [place for place in adapted_layers if single.fullmatch(place)]
    config = LoraConfig(**{key: values[key] for key in _RANKS if key in values})
    kinds = {(config.rank(place), config.alpha(place)) for place in experts}
    if len(kinds) > 1 or values.get("use_dora"):
        raise LorakitError(
            "save_adapter: fused_experts needs experts that are all of one rank and alpha, and no "
            "use_dora"
        )
    beside = {place for place in places if _taken_for_experts(place, model)}
    ranks, alphas = dict[str, int](), dict[str, float]()
    for place in places:
        name = f"{place}.weight" if place in beside else place
        if config.rank(place) != config.r:
            ranks[name] = config.rank(place)
        if config.alpha(place) != config.lora_alpha:
            alphas[name] = config.alpha(place)
    parameters = _parameters(model, experts, config, ranks, alphas)
    parameters += [f"{place}.weight" for place in places if place in beside]
    values = values | {
        "target_modules": targets_for([place for place in places if place not in beside], model),
        "target_parameters": parameters,
        "lora_dropout": 0.0,  # PEFT has none before parameters, and raises
    }
    values |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    names = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    fused = join_experts(names, model.config.moe_names, model.config.experts_interleaved)
    return {PREFIX + name: tensor for name, tensor in fused.items()}, values


def _taken_for_experts(place: str, model: Decoder) -> bool:
    """Return whether PEFT takes the name of a layer beside the experts for a name of theirs.

    For some families it moves each entry of target_modules that ends with gate_proj, up_proj or
    down_proj to target_parameters, and means the experts; a shared expert and the MLP of a layer
    without experts are left out then. The weight of such a layer as a parameter is adapted as the
    layer is. No multimodal model is among these families.
    """
    alone = model.source is None or model.source.surroundings is None
    return alone and place.rpartition(".")[2] in model.config.moe_names[1:]


def _parameters(
    model: Decoder,
    experts: Sequence[str],
    config: LoraConfig,
    ranks: dict[str, int],
    alphas: dict[str, float],
) -> list[str]:
    """Return the parameters of the adapted experts; their ranks and alphas go to the patterns."""
    if not experts:
        return []
    block, gate, _, down = model.config.moe_names
    fused, r, alpha = fused_place(block)[1:], config.rank(experts[0]), config.alpha(experts[0])
    adapted = {place.rpartition(".")[2] for place in experts}
    found: list[str] = []
    if gate in adapted:
        found.append(f"{fused}.gate_up_proj")
        ranks["experts.gate_up_proj"] = 2 * r
        alphas["experts.gate_up_proj"] = (math.sqrt(2) if config.use_rslora else 2) * alpha
    if down in adapted:
        found.append(f"{fused}.down_proj")
        ranks["experts.down_proj"] = r
        alphas["experts.down_proj"] = alpha
    return found


def without_parameters(files: AdapterFiles, model: nn.Module) -> AdapterFiles:
    """Return an adapter of parameters as one of layers: of each expert's, and of plain weights.

    The weight [out, in] of a linear layer is adapted as the layer is, if PEFT adapts it as a
    parameter: W + s B A. The patterns mean the name of the parameter there, with its ".weight".

    Raises LorakitError if another parameter is adapted, or experts of a `model` that has none of
    lorakit's.
    """
    values, parameters = files.values, files.values["target_parameters"]
    names = parameters if isinstance(parameters, list) else [parameters]
    weights = [name for name in names if str(name).endswith(".weight")]
    fused = [name for name in names if name not in weights]
    experts = isinstance(model, Decoder) and model.config.num_experts > 0
    if not all(experts and str(name).endswith(("gate_up_proj", "down_proj")) for name in fused):
        raise LorakitError(
            f"{files.path}: target_parameters={json.dumps(parameters)}: only weights of linear "
            "layers, and experts of lorakit's own decoder, are adapted as parameters"
        )
    known: dict[str, Any] = {"r": PEFT_RANK, "lora_alpha": PEFT_ALPHA}
    known |= {key: values[key] for key in _RANKS if values.get(key) is not None}
    config = from_mapping(LoraConfig, known, str(files.path / CONFIG_FILE))
    tensors = dict(files.tensors)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    single: dict[str, Tensor] = {}
    if fused:
        assert isinstance(model, Decoder)
        keys = [key for key in tensors if is_fused(re.sub(r"\.lora_[AB]\..*", "", key))]
        together = {key: tensors.pop(key).read() for key in keys}
        of, own_names = model.config, model.config.moe_names
        single = split_experts(together, of.num_experts, own_names, fused, of.experts_interleaved)
        ranks, alphas = _of_single_experts(config, single, own_names)
    for place in _adapted(tensors):
        parameter = f"{place}.weight"
        name = parameter if any(ends_with(parameter, each) for each in weights) else place
        ranks[place], alphas[place] = config.rank(name), config.alpha(name)
    tensors |= {key: _in_memory(tensor) for key, tensor in single.items()}
    each = of_each_layer(ranks, alphas)
    more = {
        "target_modules": list(ranks),
        "target_parameters": None,
        "r": each.r,
        "lora_alpha": each.lora_alpha,
        "rank_pattern": each.rank_pattern,
        "alpha_pattern": each.alpha_pattern,
    }
    return AdapterFiles(files.path, {**values, **more}, tensors)


def without_absent_experts(files: AdapterFiles, model: nn.Module) -> AdapterFiles:
    """Return an adapter whose target_modules select no experts if its tensors are none of theirs.

    To transformers 5 experts are parameters, which target_modules does not reach: there gate_proj
    is the layer of a shared expert or of an MLP. Here every expert has a layer of this name.
    """
    if not isinstance(model, Decoder) or not model.config.num_experts:
        return files
    if not files.values.get("target_modules") or any(".experts." in key for key in files.tensors):
        return files
    excluded = files.values.get("exclude_modules") or []
    if not isinstance(excluded, str):
        excluded = rf"(.*\.)?({'|'.join(map(re.escape, excluded))})" if excluded else ""
    regex = "|".join(filter(None, (excluded, r".*\.experts\..*")))
    return files._replace(values={**files.values, "exclude_modules": regex})


def _of_single_experts(
    config: LoraConfig, single: dict[str, Tensor], names: Sequence[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank and the alpha of each expert's layers, by their names.

    An expert's layer has the scaling of the fused parameter, and may have another rank.
    """
    block, *_, down = names
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for place in _adapted(single):
        parameter = "down_proj" if place.endswith(f".{down}") else "gate_up_proj"
        layer = place.partition(f"{experts_place(block)}.")[0]
        scaling = config.scaling(f"{layer}{fused_place(block)}.{parameter}")
        r = len(single[f"{PREFIX}{place}{_LORA_A}"])
        ranks[place] = r
        alphas[place] = scaling * (math.sqrt(r) if config.use_rslora else r)
    return ranks, alphas


def _adapted(keys: dict[str, Any]) -> list[str]:
    """Return the layers that have a lora_A, or as embeddings a lora_embedding_A, among the keys."""
    return [
        key.removeprefix(PREFIX).removesuffix(end)
        for key in keys
        for end in (_LORA_A, _EMBEDDING_A)
        if key.endswith(end)
    ]


def _in_memory(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), lambda: tensor)
