"""Start an attached adapter that needs more than its layers to start from.

`init_lora_weights` "loftq" reads the original weights, and "eva" reads batches of data. Neither is
at hand when an adapter is attached, so the parts of such an adapter say in `awaits` what has yet to
start them. `start_adapter` is the one place that carries it out; a training run calls it before its
first step. An adapter that the user started by hand, with `lorakit.loftq` or `lorakit.eva`, awaits
nothing any more.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from lorakit.adapters.eva import EvaResult, eva
from lorakit.adapters.layers.lora import LoraPart
from lorakit.adapters.loftq import LoftQResult, loftq
from lorakit.adapters.manage import attached


def start_adapter(
    module: nn.Module, batches: Callable[[], Iterable[Mapping[str, Tensor]]]
) -> LoftQResult | EvaResult | None:
    """Carry out the initialization that the selected adapter of `module` still awaits.

    Args:
        module: The model that the adapter is attached to. It keeps its mode, training or not.
        batches: Returns batches of keywords for `module`, such as input_ids and attention_mask; it
            is only called for an initialization that reads data.

    Returns:
        The outcome, which prints as one line; None if nothing was awaited.

    Raises:
        LorakitError: `loftq` or `eva` refuses.
    """
    awaited = _awaited(module)
    if awaited == "loftq":
        return loftq(module)
    if awaited == "eva":
        was_training = module.training
        module.eval()
        try:
            return eva(module, batches())
        finally:
            module.train(was_training)
    return None


def _awaited(module: nn.Module) -> str | None:
    """Return the one initialization that the parts of the selected adapter await, or None."""
    for each in attached(module).values():
        part = None if each.selected is None else each.adapters[each.selected]
        if isinstance(part, LoraPart) and part.awaits is not None:
            return part.awaits
    return None
