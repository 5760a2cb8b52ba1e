"""What stands in the place of a module while adapters are attached to it, and the walks over them.

    Attached.base        the module itself, frozen, untouched
    Attached.adapters    what each adapter adds to it, by the adapter's name

One adapter, or none, is selected; its parameters train and those of the others do not. An adapter
need not have a part in every Attached: one without computes its base. Inside `disable_adapters`
all of them do. Inside `adapter_rows` each row of a batch goes through an adapter of its own.

A merged Attached computes with `merged`, a plain module that holds base and adapter in one; the
base is kept beside it, so that `unmerge` restores the very bits (subtracting the update again would
not), and `detach` puts it back where it was.

What kinds there are is not said here: see lora.py and its neighbours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.models.adapted_layer import AdaptedLayer


class Part(nn.Module):
    """What adapter `name` adds to one module, and the config that it came with."""

    def __init__(self, config):
        super().__init__()
        self.config = config


class Attached(AdaptedLayer):
    """The common part of every kind; a kind says how one adapter computes, what of it is saved, and
    what the module is with the adapter in its weights.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.selected: str | None = None
        self.enabled = True
        self.merged: nn.Module | None = None
        self.rows: list[tuple[str | None, Tensor]] | None = None  # which ones each adapter computes
        self.using: tuple[nn.Module | None] = (None,)  # a tuple, lest torch registers it again
        self.train(base.training)

    # ---- what a kind says ----

    def compute(self, adapter: nn.Module, *args, **options):
        """The module's output with the part `adapter`."""
        raise NotImplementedError

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """What is trained of adapter `name`, by the ending of its key in PEFT's file."""
        raise NotImplementedError

    def stored(self, name: str) -> dict[str, Tensor]:
        """The same, and what else a file gives values to: the buffers of a module that is trained
        whole.
        """
        return self.tensors(name)

    def saved(self, name: str) -> dict[str, Tensor]:
        """What is `stored`, as it is written."""
        return self.stored(name)

    @torch.no_grad()
    def restore(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give adapter `name` the values that `saved` gave, of the same shapes."""
        for ending, tensor in self.stored(name).items():
            tensor.copy_(values[ending])

    def joined(self, weight: Tensor | None) -> nn.Module:
        """The module with the selected adapter in its weights; `weight` in place of the base's."""
        raise NotImplementedError

    @property
    def plain(self) -> nn.Module:
        """The module that was replaced."""
        return self.base

    def update(self):
        """The low-rank update, kernels.LoraWeights, where the kind has one and it is selected."""
        return None

    def adapted(self):
        """The same, if the fused kernels may compute base and update in one."""
        return None

    # ---- the same for all ----

    def forward(self, *args, **options):
        (adapter,) = self.using
        if adapter is None:
            return self.without(*args, **options)
        return self.compute(adapter, *args, **options)

    def without(self, *args, **options):
        """Where no one adapter is used for all rows: the base, the merged module, or row by row."""
        if self.rows is not None and self.enabled:
            return self._by_rows(*args, **options)
        return self.current()(*args, **options)

    def current(self) -> nn.Module:
        """What computes where no adapter is added to it: the base, or the merged module."""
        return self.merged if self.merged is not None and self.enabled else self.plain

    def _by_rows(self, *args, **options) -> Tensor:
        if not args:
            raise LorakitError(
                f"adapter_rows: a {type(self.base).__name__} is called with keywords alone: which "
                "of them holds the rows is not known"
            )
        x, *args = args
        count = sum(len(index) for _, index in self.rows)
        if len(x) != count:
            raise LorakitError(
                f"adapter_rows: {count} adapters for a batch of {len(x)} rows"
                + (" (experts, and packed documents, mix rows)" if len(x) > count else "")
            )
        found = []
        for name, index in self.rows:
            part = x[index.to(x.device)]
            if name in self.adapters:
                found.append(self.compute(self.adapters[name], part, *args, **options))
            else:
                found.append(self.plain(part, *args, **options))
        order = torch.cat([index for _, index in self.rows]).argsort()
        return torch.cat(found)[order.to(x.device)]

    def alone(self) -> nn.Module | None:
        """The one module that computes, None if an adapter is added to it or rows differ."""
        whole = self.using[0] is None and (self.rows is None or not self.enabled)
        return self.current() if whole else None

    def in_use(self) -> bool:
        """Whether any adapter has a part in it."""
        return len(self.adapters) > 0

    def put(self, name: str, adapter: nn.Module) -> None:
        self.adapters[name] = adapter.train(self.training)

    def select(self, name: str | None) -> None:
        self.selected = name if name in self.adapters else None
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)
        self.refresh()

    def refresh(self) -> None:
        """After a change of what decides: which adapter `forward` adds."""
        whole = self.enabled and self.merged is None and self.rows is None
        chosen = whole and self.selected is not None
        self.using = (self.adapters[self.selected] if chosen else None,)
