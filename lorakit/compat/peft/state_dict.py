"""Take the tensors of an adapter, by the keys of its file, from a model, and give them back."""

from collections.abc import Mapping

from torch import Tensor

from lorakit.adapters.manage import adapter_config, attached, check_adapter
from lorakit.adapters.methods.known import method_of
from lorakit.adapters.peft_files.save import adapter_tensors
from lorakit.compat.peft.peft_model import PeftModel
from lorakit.config.errors import LorakitError, check


def get_peft_model_state_dict(
    model: PeftModel, state_dict: None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the keys of its file.

    An adapter that started from a part of the weight gives copies, of plain LoRA of twice the rank.

    Args:
        model: The model that the adapter is attached to.
        state_dict: Must be None; the tensors are those of the model.
        adapter_name: The adapter.

    Returns:
        The tensors, in the dtype and the shape in which they are saved.

    Raises:
        LorakitError: There is no such adapter, or a state_dict is given.
    """
    check(state_dict is None, "get_peft_model_state_dict: the model's own state_dict is taken")
    check_adapter(model.get_base_model(), adapter_name, "get_peft_model_state_dict")
    return adapter_tensors(model.get_base_model(), adapter_name)


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give an adapter the values that `get_peft_model_state_dict` returned.

    Args:
        model: The model that the adapter is attached to.
        peft_model_state_dict: The tensors by the keys of the adapter's file, all of them.
        adapter_name: The adapter.

    Raises:
        LorakitError: There is no such adapter, or a tensor is missing, belongs to nothing, or
            has another shape. The adapter stays as it was.
    """
    base = model.get_base_model()
    check_adapter(base, adapter_name, "set_peft_model_state_dict")
    method = method_of(adapter_config(base, adapter_name))
    # The endings of each adapted module's tensors, by the tensors' keys in the file.
    endings = {
        each: {method.key(place, ending): ending for ending in each.loadable_tensors(adapter_name)}
        for place, each in attached(base).items()
        if adapter_name in each.adapters
    }
    needed = {key for keys in endings.values() for key in keys}
    # A tied head has the tensors of its embedding: they may be given, and need not be.
    _check_tensors(peft_model_state_dict, adapter_tensors(base, adapter_name), needed)
    for each, keys in endings.items():
        values = {ending: peft_model_state_dict[key] for key, ending in keys.items()}
        each.restore(adapter_name, values)


def _check_tensors(
    given: Mapping[str, Tensor], known: Mapping[str, Tensor], needed: set[str]
) -> None:
    """Raise LorakitError for a tensor that is missing, unknown or of another shape."""
    missing = sorted(needed - given.keys())
    if missing:
        raise LorakitError(f"set_peft_model_state_dict: tensor {missing[0]} is missing")
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise LorakitError(
            f"set_peft_model_state_dict: tensor {unknown[0]} belongs to no adapted layer of this "
            "model"
        )
    for key, tensor in given.items():
        check(
            isinstance(tensor, Tensor),
            f"set_peft_model_state_dict: {key} is no tensor but a {type(tensor).__name__}",
        )
        check(
            tensor.shape == known[key].shape,
            f"set_peft_model_state_dict: tensor {key} is {tuple(tensor.shape)}, the model needs "
            f"{tuple(known[key].shape)}",
        )
