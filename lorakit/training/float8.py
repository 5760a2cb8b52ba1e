"""`frozen_dtype: float8`: which products of a run are computed in float8, and where that can be.

It is the products of frozen weights that an adapter's low-rank update sits on, and those of a
frozen head: `lorakit.kernels.ops.float8` has the maths. They run in float8 while the model trains.
An evaluation between two steps computes in the model's dtype, as whoever uses the adapter will.
"""

import torch
from torch import Tensor

from lorakit.adapters.layers.lora import LowRankLinear
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.kernels import Float8Linear, Float8Weight
from lorakit.kernels.ops.float8 import runs_on, takes
from lorakit.models.decoder import Decoder


def check_frozen_dtype(model: Decoder, config: TrainConfig) -> None:
    """Raise LorakitError if float8 is wanted and `model` cannot have it, by dtype or device."""
    if config.frozen_dtype is None:
        return
    if model.mesh is not None:
        raise LorakitError(
            "train: frozen_dtype float8 makes copies of whole weights, and those of the model are "
            "sharded; leave it out"
        )
    if any(_quantizes(layer) for layer in low_rank_layers(model)):
        raise LorakitError(
            "train: frozen_dtype float8 does not go with quantize_aware, which computes with other "
            "weights; leave one of them out"
        )
    if not runs_on(model.device):
        raise LorakitError(
            "train: frozen_dtype float8 needs an NVIDIA GPU of compute capability 8.9 or more (RTX "
            f"40, L4, H100 or later), and the model is on {model.device}; leave it out"
        )
    if model.dtype != torch.bfloat16:
        raise LorakitError(
            f"train: frozen_dtype float8 goes with a bfloat16 model, and this one is {model.dtype}"
        )


def _quantizes(layer: LowRankLinear) -> bool:
    return layer.active is not None and layer.active.rounding is not None


def start_float8(model: Decoder, z_loss: float = 0.0) -> str:
    """Let frozen products of `model` run in float8, and return a line that says how many do.

    `z_loss` is that of the run.
    """
    layers = low_rank_layers(model)
    count = 0
    for layer in layers:
        if layer.base.frozen and takes(layer.base.stored):
            layer.float8 = Float8Linear(layer.base, Float8Weight(layer.base.stored))
            count += 1
    weight = model.frozen_head()
    if weight is not None and takes(weight):
        detached = weight.detach() if isinstance(weight, Tensor) else weight
        centred = model.config.final_logit_softcapping is None and z_loss == 0
        model.float8_head = Float8Weight(detached, centred=centred)
    head = "and of the head " if model.float8_head is not None else ""
    return (
        f"frozen_dtype float8: products of {count} of {len(layers)} adapted layers {head}are "
        "computed in float8; the losses are near those of bfloat16, not the same"
    )


def end_float8(model: Decoder) -> None:
    """Undo `start_float8`."""
    for layer in low_rank_layers(model):
        layer.float8 = None
    model.float8_head = None


def low_rank_layers(model: Decoder) -> list[LowRankLinear]:
    """Return the linear layers with a low-rank update, in the order of the tree."""
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]
