"""The reference of a preference run: the model as it was before the first step.

A frozen copy of every parameter that trains takes the place of the trained values for the length of
one forward pass. Everything else in the model is frozen, so model and copy are the whole policy of
that moment, whatever trains: A and B, DoRA's magnitudes, biases, rows of an embedding, prompts,
modules that are trained whole.

To switch the adapter off instead would be right only for an adapter that changes nothing yet. It is
wrong for one that was trained before, for LoftQ, which starts from what quantization lost, and for
an A and B that both start at random. Even a fresh DoRA rounds otherwise than the base does: in
bfloat16 that moves the log-probability of a long answer by a whole nat.

The copy costs the memory of what trains, and the pass the time of the adapter. To compute all
log-probabilities before the first step instead would need a pass over rows that may never come, and
a place to keep the result.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.adapters.manage import disable_adapters
from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder
from lorakit.training.mode import evaluation_mode
from lorakit.training.state import trained_tensors


class Reference:
    """A frozen copy of all that trains in a model, as it is when the copy is made.

    Args:
        model: A model with a selected adapter. It stays on its device and keeps that adapter for as
            long as the copy is used.

    Raises:
        LorakitError: Nothing in the model trains.
    """

    def __init__(self, model: nn.Module):
        self._trained = _trained_parameters(model)
        if not self._trained:
            raise LorakitError("Reference: nothing in the model trains; attach an adapter first")
        self._values = {name: p.detach().clone() for name, p in self._trained.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the copy by name, as a checkpoint holds them."""
        return self._values

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with the copy inside the `with` block, without gradients.

        The trained values are set aside, not overwritten. So a graph that was built before the
        block can still go backward after it.

        Yields:
            Nothing. After the block the model computes with the trained values again.
        """
        ours = [(p, p.data) for p in self._trained.values()]
        try:
            for name, p in self._trained.items():
                p.data = self._values[name]
            with torch.no_grad():
                yield
        finally:
            for p, values in ours:
                p.data = values


def losses_of_reference(
    model: Decoder,
    reference: Reference | None,
    input_ids: Tensor,
    labels: Tensor,
    rows: Mapping[str, Tensor | None],
) -> Tensor:
    """Return the summed loss of each row under the reference, [B], in evaluation mode.

    Without one, the reference is the model with its adapter switched off.
    """
    with disable_adapters(model) if reference is None else reference.in_place():
        return losses_without_gradient(model, input_ids, labels, rows)


@torch.no_grad()
def losses_without_gradient(
    model: Decoder, input_ids: Tensor, labels: Tensor, rows: Mapping[str, Tensor | None]
) -> Tensor:
    """Return the summed loss of each row, [B], in evaluation mode.

    `rows` has the attention_mask and the cu_seqlens of `Decoder.row_losses`.
    """
    with evaluation_mode(model):
        return model.row_losses(input_ids, labels, **rows)[0]


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that trains, by name: the selected adapter's, then any others.

    The adapter's bear the names that checkpoints give them, in which its own name does not occur.
    """
    tensors = trained_tensors(model).items()
    found = {n: p for n, p in tensors if isinstance(p, nn.Parameter) and p.requires_grad}
    known = {id(p) for p in found.values()}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in known}
    return found | {f"base.{name}": p for name, p in others.items()}
