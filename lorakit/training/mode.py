"""The state of a model while it trains: dropout, noise, and what is kept for backward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lorakit.config.training import TrainConfig
from lorakit.models.decoder import Decoder
from lorakit.training.cores import own_threads
from lorakit.training.float8 import end_float8, start_float8
from lorakit.training.kept_layers import kept_layers
from lorakit.training.log import say


@contextmanager
def training_mode(model: Decoder, config: TrainConfig, tokens: int) -> Iterator[None]:
    """Set dropout, noise, threads and what is kept for backward for the block as the run wants it.

    `tokens` is the most that a batch may have.
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
    model.kept_layers = kept_layers(model, tokens, config.mlp_activations)
    try:
        # of pairs torch computes the logits, which is too much for its single thread
        with own_threads(model) if config.objective == "sft" else nullcontext():
            yield
    finally:
        model.train(was_training)
        model.gradient_checkpointing, model.offload_activations = checkpointing, offloading
        model.neftune_noise_alpha, model.kept_layers = noise, layers
        end_float8(model)
