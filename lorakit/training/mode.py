"""The state of a model while it trains: dropout, noise, and what is kept for backward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor

from lorakit.config.training import OPTIMIZERS, TrainConfig
from lorakit.models.decoder import Decoder
from lorakit.training.adamw import state_bytes
from lorakit.training.cores import own_threads
from lorakit.training.float8 import end_float8, start_float8
from lorakit.training.kept_layers import kept_layers
from lorakit.training.log import say
from lorakit.training.muon import matrices, momentum_bytes
from lorakit.training.paged_state import has_remainder


def bytes_of(model: Decoder, config: TrainConfig) -> int:
    """Return the bytes of gradients and resident state of all that trains."""
    state_bits, paged = OPTIMIZERS[config.optim]
    of_muon = set(matrices(model)) if config.optim == "muon" else set[Tensor]()
    several, total = config.batches_of_step > 1, 0
    for p in model.parameters():
        if p.requires_grad:
            wide_sum = 4 if several and has_remainder(p) else 0
            total += p.nbytes + wide_sum * p.numel()
            state = momentum_bytes(p) if p in of_muon else state_bytes(p, state_bits)
            total += 0 if paged else state
    return total


@contextmanager
def evaluation_mode(model: Decoder) -> Iterator[None]:
    """Let a model compute in evaluation mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def training_mode(
    model: Decoder, config: TrainConfig, tokens: int, made_later: int | None = None
) -> Iterator[None]:
    """Set dropout, noise, threads and what is kept for backward for the block as the run wants it.

    `tokens` is the most that a batch may have, and `made_later` the bytes of gradients and state;
    None counts those of all that trains now.
    """
    was_training = model.training
    checkpointing, offloading = model.gradient_checkpointing, model.offload_activations
    noise, layers = model.neftune_noise_alpha, model.kept_layers
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing
    model.offload_activations = config.activation_offloading
    model.neftune_noise_alpha = config.neftune_noise_alpha
    if config.frozen_dtype is not None:
        say(start_float8(model, config.z_loss))
    later = bytes_of(model, config) if made_later is None else made_later
    model.kept_layers = kept_layers(model, tokens, config.mlp_activations, later)
    try:
        # of pairs torch computes the logits, which is too much for its single thread
        with own_threads(model) if config.objective == "sft" else nullcontext():
            yield
    finally:
        model.train(was_training)
        model.gradient_checkpointing, model.offload_activations = checkpointing, offloading
        model.neftune_noise_alpha, model.kept_layers = noise, layers
        end_float8(model)
