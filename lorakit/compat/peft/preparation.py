"""Make a model ready for training in few bits, and say which members of its class that uses."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder


@runtime_checkable
class Pretrained(Protocol):
    """The members of a model of transformers that are used here."""

    name_or_path: str

    def enable_input_require_grads(self) -> None:
        """Let gradients flow into the embeddings' output."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compute the blocks again in the backward pass."""


def uses_gradient_checkpointing(model: nn.Module) -> bool:
    """Return whether a block of a transformers model says that it uses gradient checkpointing."""
    return any(m.__dict__.get("gradient_checkpointing", False) for m in model.modules())


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Freeze a model, and switch gradient checkpointing on.

    No dtype changes. PEFT makes everything that is not packed fp32 here, with the embeddings and
    the head, which are the larger part of a packed model. That is not needed: lorakit's adapters
    are fp32 in any case, and its norms and its loss sum in fp32 whatever the weights are, as those
    of transformers do.

    Args:
        model: A lorakit `Decoder`, a model of transformers, or any module.
        use_gradient_checkpointing: Whether to compute the blocks again in the backward pass, which
            saves the memory of what they would keep.
        gradient_checkpointing_kwargs: Options of torch's checkpointing, for models of transformers.

    Returns:
        The model itself.

    Raises:
        LorakitError: The model has no gradient checkpointing, and it is wanted.
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
