"""The wrapper that stands in the place of a module while adapters are attached to it.

    Attached.base        the module that the adapters add to; it is frozen and never written to
    Attached.adapters    the part of each adapter, by the adapter's name

A *part* is what one adapter adds to one module. An adapter need not have a part in every wrapper.
One adapter, or none, is selected. Its parameters train, and those of the others do not.

A wrapper computes in one of three states:

    one part     it adds the selected part to its base (`active` is that part)
    by rows      inside `adapter_rows`, each row of a batch goes through a part of its own; inside
                 `adapter_spans` each span of a packed row does, and all of them train
    one module   one module computes alone (`current_module`): the original where no part is
                 selected or adapters are disabled, or the merged module

A merged wrapper keeps its base beside `merged`, a plain module that holds base and part in one
weight. So `unmerge` restores the very bits; subtracting the update again would not. `detach` puts
the original back where it was.

This file has what all wrappers share. Their kinds are in lora.py, embeddings.py, whole_modules.py
and adapters/methods/.
"""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.kernels import LoraWeights, SpanWeights
from lorakit.models.adapted_layer import AdaptedLayer, RowGroups, Spans
from lorakit.models.sharding import gathered
from lorakit.models.shards import home, is_sharded

PartT = TypeVar("PartT", bound=nn.Module)


class Part(nn.Module):
    """The part of one adapter in one module, and the config that the adapter came with."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config


class Attached(AdaptedLayer, Generic[PartT]):
    """A module and the parts that adapters add to it.

    Each subclass is one kind of wrapper. It says how a part computes, which tensors of it are
    trained and saved, and what the module is with the part in its weights.
    """

    active: PartT | None

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.selected: str | None = None
        self.enabled = True
        self.merged: nn.Module | None = None
        self.gathers = False  # whether the merged module is sharded, outside of its block's unit
        self.row_groups: RowGroups | None = None
        self.spans: Spans | None = None
        self._refresh()
        self.train(base.training)

    # ---- what the kinds override ----

    def compute(self, part: PartT, *args: Any, **options: Any) -> Any:
        """Return the module's output with `part` added."""
        raise NotImplementedError

    def compute_spans(self, *args: Any, **options: Any) -> Any:
        """Return the output for a packed row whose spans have adapters of their own."""
        raise NotImplementedError

    def make_merged(self, weight: Tensor | None) -> nn.Module:
        """Return a plain module with the selected part in its weights.

        `weight` takes the place of the base's own; None means the base's own.
        """
        raise NotImplementedError

    def trained_tensors(self, name: str) -> Mapping[str, nn.Parameter]:
        """Return the tensors that adapter `name` trains here, by how their keys end in the file."""
        raise NotImplementedError

    def loadable_tensors(self, name: str) -> Mapping[str, Tensor]:
        """Return the tensors of adapter `name` that a file gives values to.

        They are the trained tensors and, where a module is trained whole, its buffers.
        """
        return self.trained_tensors(name)

    def tensors_to_save(self, name: str) -> Mapping[str, Tensor]:
        """Return the tensors of adapter `name` as a file holds them, by how their keys end."""
        return self.loadable_tensors(name)

    @torch.no_grad()
    def restore(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give adapter `name` values that `tensors_to_save` returned, of the same shapes."""
        for ending, tensor in self.loadable_tensors(name).items():
            tensor.copy_(values[ending])

    @property
    def original(self) -> nn.Module:
        """The module that was here before and returns on `detach`."""
        return self.base

    @property
    def device(self) -> torch.device:
        """The device that the base computes on, where new parts belong."""
        return home(next(self.base.parameters()))

    def low_rank_update(self) -> LoraWeights | None:
        """Return base and update, if the active part is a low-rank update."""
        return None

    def fusible_update(self) -> LoraWeights | None:
        """Return base and update, if the fused kernels may compute both in one."""
        return None

    def span_updates(self) -> SpanWeights | None:
        """Return base and the updates of the adapters that have spans, if kernels take them."""
        return None

    def takes_spans(self, name: str) -> bool:
        """Return whether adapter `name` may have a span of a packed row here."""
        return False

    def has_parts(self) -> bool:
        """Return whether any adapter has a part here."""
        return len(self.adapters) > 0

    # ---- the parts ----

    def part_of(self, name: str) -> PartT:
        """Return the part of adapter `name`."""
        return cast(PartT, self.adapters[name])  # a ModuleDict does not know its modules' type

    @property
    def part(self) -> PartT:
        """The part of the selected adapter."""
        assert self.selected is not None
        return self.part_of(self.selected)

    def add_part(self, name: str, part: PartT) -> None:
        """Hold `part` for adapter `name`; `select` it to compute with it."""
        self.adapters[name] = part.train(self.training)

    # ---- the state: each method sets one field, and `_refresh` works out what follows ----

    def select(self, name: str | None) -> None:
        """Compute with adapter `name` from now on, and train it alone."""
        self.selected = name if name is not None and name in self.adapters else None
        for other, part in self.adapters.items():
            _let_train(part, other == name)
        self._refresh()

    def set_enabled(self, enabled: bool) -> None:
        """Compute with the adapters, or without any."""
        self.enabled = enabled
        self._refresh()

    def set_merged(self, merged: nn.Module | None) -> None:
        """Compute with `merged`, made by `make_merged`; None returns to base and part."""
        self.merged = merged
        self.gathers = merged is not None and any(map(is_sharded, merged.parameters()))
        self._refresh()

    def set_row_groups(self, row_groups: RowGroups | None) -> None:
        """Compute each row with an adapter of its own; None returns to one for all rows."""
        self.row_groups = row_groups
        self._refresh()

    def set_spans(self, spans: Spans | None) -> None:
        """Compute and train an adapter in each span of a packed row; None returns to one for all.

        The span's tokens are those of the row, as `x [1, T, ...]` has them. Where none of the
        adapters has a part, the base computes alone.
        """
        if spans is None:
            self.spans = None
            self.select(self.selected)
            return
        self.spans = [span for span in spans if span[0] in self.adapters]
        for name, _, _ in self.spans:
            _let_train(self.adapters[name], True)
        self._refresh()

    def _refresh(self) -> None:
        """Work out what the state's fields mean for `forward`."""
        apart = self.row_groups is not None or self.spans is not None
        one_for_all = self.enabled and self.merged is None and not apart
        active = self.part if one_for_all and self.selected is not None else None
        # Not by setattr: torch would register it as a submodule, and its parameters would have two
        # names.
        self.__dict__["active"] = active

    @property
    def by_rows(self) -> bool:
        """Whether each row of a batch goes through a part of its own."""
        return (self.row_groups is not None or bool(self.spans)) and self.enabled

    def current_module(self) -> nn.Module:
        """Return the module that an update is added to, or that computes alone."""
        return self.merged if self.merged is not None and self.enabled else self.original

    def only_module(self) -> nn.Module | None:
        """Return the one module that computes alone; None in the other two states."""
        return None if self.active is not None or self.by_rows else self.current_module()

    # ---- computing ----

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute the module's output in the state that the wrapper is in."""
        if self.active is not None:
            return self.compute(self.active, *args, **options)
        return self.compute_inactive(*args, **options)

    def compute_inactive(self, *args: Any, **options: Any) -> Any:
        """Compute where no part is active: row by row, or with one module alone."""
        if self.by_rows:
            compute = self.compute_spans if self.spans else self._compute_by_rows
            return compute(*args, **options)
        module = self.current_module()
        if not self.gathers:
            return module(*args, **options)
        with gathered(module):
            return module(*args, **options)

    def _compute_by_rows(self, *args: Any, **options: Any) -> Any:
        """Compute the rows of each adapter together, and put them back in order.

        Other tensors with as many rows are taken apart as the first one is, and so are several
        results put together: a norm also reads what x is added to, and returns the sum.
        """
        if not args:
            raise LorakitError(
                f"adapter_rows: a {type(self.base).__name__} is called with keywords alone: which "
                "of them holds the rows is not known"
            )
        x = args[0]
        groups = self.row_groups
        assert groups is not None
        count = sum(len(index) for _, index in groups)
        if len(x) != count:
            raise LorakitError(
                f"adapter_rows: {count} adapters for a batch of {len(x)} rows"
                + (" (experts, and packed documents, mix rows)" if len(x) > count else "")
            )
        found = []
        for name, index in groups:
            index = index.to(x.device)
            rows = [
                each[index] if isinstance(each, Tensor) and each.shape[:1] == x.shape[:1] else each
                for each in args
            ]
            if name is not None and name in self.adapters:
                found.append(self.compute(self.part_of(name), *rows, **options))
            else:
                found.append(self.original(*rows, **options))
        order = torch.cat([index for _, index in groups]).argsort().to(x.device)
        if isinstance(found[0], tuple):
            return tuple(torch.cat(parts)[order] for parts in zip(*found, strict=True))
        return torch.cat(found)[order]


def _let_train(part: nn.Module, trains: bool) -> None:
    """Let the parameters of a part require gradients, or not.

    A session selects an adapter for every call, among many in every layer: `requires_grad_` walks
    ten times as long over a few parameters.
    """
    left = [part]
    while left:
        module = left.pop()
        for p in module._parameters.values():
            if p is not None:
                p.requires_grad = trains
        left += [child for child in module._modules.values() if child is not None]
