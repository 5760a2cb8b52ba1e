"""LoraModel, which stands between a PeftModel and the model, as in PEFT.

    PeftModel.base_model            a LoraModel
    PeftModel.base_model.model      the model, with adapters attached in place

So modules have the names that they have in PEFT, and in the keys of its files. An attribute that
one of the two wrappers lacks is looked up in the module that it holds.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.adapters.manage import attached, detach, selected_adapter, set_adapter
from lorakit.adapters.merge import merge, merge_and_unload, unmerge
from lorakit.compat.peft.selection import same_training, set_trained
from lorakit.config.errors import check


class Wrapper(nn.Module):
    """A module around another one, which answers for attributes that the wrapper lacks."""

    inside: str  # the name of the attribute that holds the other module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inside:  # nothing is held yet
                raise
            return getattr(super().__getattr__(self.inside), name)


class LoraModel(Wrapper):
    """A model with adapters, under the name that it has in PEFT."""

    inside = "model"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.training, self.model = model.training, model

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return what the model computes."""
        return self.model(*args, **options)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Compute with this adapter, and train it unless `inference_mode`."""
        set_adapter(self.model, adapter_name)
        set_trained(self.model, adapter_name, not inference_mode)

    def disable_adapter_layers(self) -> None:
        """Compute without adapters until `enable_adapter_layers`."""
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Compute with the active adapter again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for each in attached(self.model).values():
            each.set_enabled(enabled)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active adapter, or the one named, into the weights, as `lk.merge` does.

        The merge checks for NaN and infinite values whatever safe_merge is.
        """
        with same_training(self.model):
            self._select_for("merge_adapter", adapter_names)
        merge(self.model)

    def unmerge_adapter(self) -> None:
        """Give back the weights from before the merge, to the bit, as `lk.unmerge` does."""
        unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Return the model with one adapter in its weights, and no adapter attached.

        A quantized base becomes dense.

        Args:
            progressbar: Has no effect.
            safe_merge: Has no effect, since the merge always checks for NaN and infinite values.
            adapter_names: A list of one name; by default the active adapter is merged.

        Returns:
            The model that was wrapped.

        Raises:
            LorakitError: Several adapters are named, there is no such adapter, or the result
                is not finite.
        """
        self._select_for("merge_and_unload", adapter_names)
        return merge_and_unload(self.model)

    def unload(self) -> nn.Module:
        """Return the model without adapters."""
        return detach(self.model)

    def _select_for(self, caller: str, names: Sequence[str] | None) -> None:
        """Select the one adapter of `names` that `caller` is about to merge, if any is named."""
        if names is not None:
            check(len(names) == 1, f"{caller}: one adapter is merged; combine several first")
            set_adapter(self.model, names[0])

    @property
    def active_adapter(self) -> str | None:
        """The adapter that the model computes with."""
        return selected_adapter(self.model)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter in a list, which is empty if there is none."""
        return [] if self.active_adapter is None else [self.active_adapter]
