"""What a run trains: the selected adapter of a model, or with `train: full` the model itself.

A run asks it for what depends on which of the two it is: what is refused before the first step,
which parameters must get a gradient, and what a checkpoint holds.

    the adapter      its files in PEFT's format, and in the state every tensor of it as it is
    the model        a directory of a model as `save_model` writes it, whose weights are those of
                     the run to the bit; the state has no second copy of them
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import adapter_config, attached, selected_adapter
from lorakit.adapters.peft_files.save import save_adapter
from lorakit.adapters.start import start_adapter
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.load import open_model
from lorakit.models.mlp import Experts
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.save import other_towers, save_model
from lorakit.models.shards import is_sharded, keep
from lorakit.models.tokenizer import Tokenizer
from lorakit.training import state as run_state
from lorakit.training.divided import DividedWeights

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]
TOKENS = "the tokens of trained rows"  # checkpoints of 0.1.0 do not say them


class TrainedAdapter:
    """The selected adapter of a model. `layers` are the wrappers with a part of it, by name.

    Raises LorakitError if there is none, it is merged, or the model is float16.
    """

    what = "adapter"
    divided = None

    def __init__(self, model: Decoder):
        self.model = model
        self.layers = trainable_layers(model)

    def start(self, batches: Batches) -> str | None:
        """Carry out the initialization that the adapter awaits, and return a line about it."""
        started = start_adapter(self.model, batches)
        self.layers = trainable_layers(self.model)  # EVA may have left some out
        return None if started is None else str(started)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters that must get a gradient, by name."""
        for name, layer in self.layers.items():
            assert layer.selected is not None
            for ending, parameter in layer.trained_tensors(layer.selected).items():
                yield f"{name}.{ending}", parameter

    def same(self, tok: Tokenizer) -> dict[str, Any]:
        """Return what a run that goes on from a checkpoint shares with the one that made it."""
        selected = selected_adapter(self.model)
        assert selected is not None
        config = asdict(adapter_config(self.model, selected))
        if config.get("quantize_aware") is None:  # which checkpoints of 0.1.0 do not say
            config.pop("quantize_aware", None)
        rows = config.get("trainable_token_indices") or {}
        trained = rows if isinstance(rows, list) else {i for ids in rows.values() for i in ids}
        tokens = {str(i): tok.backend.id_to_token(i) for i in sorted(trained)}
        return {TOKENS: tokens, "adapter": json.loads(json.dumps(config))}

    def trained(self) -> dict[str, Tensor]:
        """Return what the optimizer moves, by name."""
        return _that_train(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the state of a checkpoint holds of the adapter."""
        return self.everything()

    def everything(self) -> dict[str, Tensor]:
        """Return every tensor of the adapter by name; all ranks must agree on them."""
        return run_state.trained_tensors(self.model)

    def restore(self, path: Path) -> None:
        """Give the adapter the tensors of the checkpoint at `path`.

        Raises LorakitError if they are those of another adapter.
        """
        run_state.restore_adapter(path, run_state.read_tensors(path), self.model)

    def save(self, path: Path, base_model: str | None) -> None:
        """Save the adapter, whose config names the base model."""
        save_adapter(self.model, path, base_model=base_model)


class TrainedModel:
    """The weights of a model that require gradients, but for those that `config.freeze` names.

    What is frozen already stays so. `layers` is empty: no layer carries an adapter.

    Raises LorakitError if the model carries an adapter, is packed or float16, if a pattern of
    `freeze` matches no weight, nothing is left to train, or the result cannot be saved.
    """

    what = "model"

    def __init__(self, model: Decoder, config: TrainConfig):
        self.model, self.freeze = model, config.freeze
        self.divided: DividedWeights | None = None
        self.layers: dict[str, Attached] = {}
        _check_dense(model)
        _check_float16(model)
        _check_saves(model, as_path(config.output_dir))
        if model.mesh is not None:
            _check_divided(model, config)
            for p in model.parameters():  # which were frozen as they were divided
                p.requires_grad_(True)
        freeze_matching(model, config.freeze)
        if model.mesh is not None:
            self.divided = DividedWeights(model)

    def start(self, batches: Batches) -> str:
        """Return a line about how much is trained; the weights are what training starts from."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        return f"train: full trains {trained:,} of the {total:,} parameters of the model"

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters that must get a gradient, by name."""
        return iter(self.trained().items())

    def trained(self) -> dict[str, Tensor]:
        """Return what the optimizer moves, by name: each weight, or this rank's part of it."""
        if self.divided is not None:
            return self.divided.parts
        return _that_train(self.model)

    def same(self, tok: Tokenizer) -> dict[str, Any]:
        """Return what a run that goes on from a checkpoint shares with the one that made it."""
        return {"train": "full", "freeze": list(self.freeze)}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the weights are in the files of the model."""
        return {}

    def everything(self) -> dict[str, Tensor]:
        """Return every weight that is trained by name; all ranks must agree on them.

        Those that the ranks divide exist once, and are left out.
        """
        return {name: p for name, p in _that_train(self.model).items() if not is_sharded(p)}

    def restore(self, path: Path) -> None:
        """Give the model the weights of the checkpoint at `path`, one after the other.

        Raises LorakitError if they are those of another model, or damaged.
        """
        _, weights, _ = open_model(path)
        for name, p in _that_train(self.model).items():
            if name not in weights or weights[name].shape != tuple(p.shape):
                raise LorakitError(f"{path}: {name} is not as in this run; is it another model?")
            with torch.no_grad():
                read = weights[name].read()
                assert isinstance(read, Tensor)  # a run saves dense weights
                keep(p, read)

    def save(self, path: Path, base_model: str | None) -> None:
        """Save the whole model. It has no base model but in its card."""
        save_model(self.model, path)


Trained = TrainedAdapter | TrainedModel


def trained_part(model: Decoder, config: TrainConfig) -> Trained:
    """Return what a run with this config trains of a model.

    Raises LorakitError if that cannot be trained.
    """
    return TrainedModel(model, config) if config.train == "full" else TrainedAdapter(model)


def trainable_layers(model: Decoder) -> dict[str, Attached]:
    """Return the wrappers of `model` that hold a part of the selected adapter, by name.

    Raises LorakitError if there are none, the adapter is merged, or the model is float16.
    """
    layers = {name: each for name, each in attached(model).items() if each.selected is not None}
    if not layers:
        raise LorakitError(
            "train: no adapter is attached; call lorakit.attach(model, ...) first, or train the "
            "model itself with train: full"
        )
    if any(layer.merged is not None for layer in layers.values()):
        raise LorakitError("train: the adapter is merged; call lorakit.unmerge(model) first")
    _check_float16(model)
    return layers


def is_not_the_models(tok: Tokenizer, model: Decoder) -> bool:
    """Return whether a tokenizer has new tokens, or was read from elsewhere than its model."""
    elsewhere = model.source is not None and tok.source not in (None, model.source.path)
    return tok.has_new_tokens or elsewhere


def _that_train(model: Decoder) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_divided(model: Decoder, config: TrainConfig) -> None:
    """Raise LorakitError for what does not go with weights that the ranks divide."""
    refused = {
        f"objective: {config.objective}, whose reference is a copy of the weights": config.compares,
        "optim: muon, which moves matrices that are whole": config.optim == "muon",
        "objective: distillation, which takes a head that is whole": config.objective
        == "distillation",
        f"hub_strategy: {config.hub_strategy}; take end": (
            config.push_to_hub and config.hub_strategy != "end"
        ),
        "a mixture of experts, of which a rank may use others than the next": any(
            isinstance(module, Experts) for module in model.modules()
        ),
    }
    for what, found in refused.items():
        if found:
            raise LorakitError(f"train: full with shard: full does not go with {what}")


def _check_float16(model: Decoder) -> None:
    if model.dtype == torch.float16:
        raise LorakitError(
            "train: gradients of a float16 model underflow; load it in bfloat16 or float32"
        )


def _check_dense(model: Decoder) -> None:
    """Raise LorakitError if the model carries an adapter, or weights that are packed."""
    if attached(model):
        raise LorakitError(
            "train: full trains the model's own weights, and an adapter is attached; detach it, "
            "or leave train: full out"
        )
    packed = [each for each in model.modules() if isinstance(each, PackedWeight)]
    if packed:
        raise LorakitError(
            f"train: full needs dense weights, and those of the model are quantized "
            f"({packed[0].config.quant_type}); load it without quantize, or train an adapter"
        )


def _check_saves(model: Decoder, output_dir: Path) -> None:
    """Raise LorakitError if the trained model could not be written to `output_dir`."""
    source = model.source
    if source is None:
        return
    if output_dir.resolve() == source.path.resolve():
        raise LorakitError(
            f"train: output_dir {output_dir} holds the model that is trained, whose files the "
            "result would replace; choose another name"
        )
    other_towers(source, output_dir, packed=False)


def freeze_matching(module: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze the parameters in whose names one of these regexes is found.

    Raises LorakitError if a pattern is in none of the names, or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        found = [p for name, p in parameters.items() if re.search(pattern, name)]
        if not found:
            raise LorakitError(
                f"freeze: {pattern!r} is in the name of no weight; names are as "
                f"{next(iter(parameters))}"
            )
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise LorakitError(
            "train: full has nothing to train: every weight is frozen; freeze fewer of them, or "
            "load the model again"
        )
