"""Plan an adapter before the model changes.

A method first makes the whole `Plan`, and raises an error for whatever cannot be adapted. Only then
does `attach` carry it out. So an error leaves the model as it was.

    plan.layers      every module of the model by name; an adapted module counts as one
    plan.wrappers    name -> the wrapper that will stand there
    plan.parts       what the adapter adds, each with the wrapper that it goes into

A module may stand in the model under several names. It gets one wrapper, and the adapter one part.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from torch import nn

from lorakit.adapters.layers.base import (
    AttachedLinear,
    CalledBase,
    CalledTransposedBase,
    DenseBase,
    LinearBase,
    TransposedBase,
    must_be_called,
)
from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.layers.whole_modules import SavedModule, TrainedBias
from lorakit.adapters.layers.wrapper import Attached, PartT
from lorakit.adapters.manage import outer_modules
from lorakit.adapters.targets import select_layers
from lorakit.adapters.tied_weights import embedding_of_head, head_of_tied_decoder
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.models.decoder import Decoder

W = TypeVar("W", bound=Attached)
L = TypeVar("L", bound=AttachedLinear)


class Plan:
    """The wrappers that will stand in `model`, and the parts that the new adapter adds to them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = {name: each for name, each in outer_modules(model) if name}
        self.wrappers: dict[str, Attached] = {}
        self.parts: list[tuple[Attached, nn.Module]] = []
        self.own_head: str | None = None
        """The head of a tied decoder, if it is adapted by itself."""
        self._wrapper_of: dict[int, Attached] = {}  # by the id of the module at its name

    def wrap(self, name: str, kind: type[W]) -> W | None:
        """Plan a wrapper of this kind around the module `name`, or take the one that it has.

        Returns None if the plan has wrapped this module already, under another name. Raises
        LorakitError if another adapter has wrapped it in another kind.
        """
        return self._wrap(name, kind, kind)

    def wrap_linear(self, name: str, kind: type[L]) -> L | None:
        """Plan a wrapper around a linear layer; see `wrap`."""
        return self._wrap(name, kind, lambda layer: kind(_linear_base(layer)))

    def _wrap(self, name: str, kind: type[W], make: Callable[[nn.Module], W]) -> W | None:
        """Do as `wrap` says; `make` builds a wrapper around a module that has none."""
        module = self.layers[name]
        if isinstance(module, Attached) and type(module) is not kind:
            raise LorakitError(
                f"attach: {name} is a {type(module).__name__} of another adapter, and cannot "
                f"be a {kind.__name__} too; leave it out (exclude_modules), or detach that one"
            )
        known = self._wrapper_of.get(id(module))
        if known is not None:
            self.wrappers[name] = known
            return None
        wrapper = module if isinstance(module, kind) else make(module)
        self.wrappers[name] = self._wrapper_of[id(module)] = wrapper
        return wrapper

    def add(self, wrapper: Attached[PartT], part: PartT) -> None:
        """Plan `part` as what the adapter adds to the module that `wrapper` stands for."""
        self.parts.append((wrapper, part))

    def tie_heads(self, heads: Sequence[str], embedding: Attached) -> None:
        """Let the linear layers `heads`, which share the weight of `embedding`, change with it.

        Raises LorakitError for a head that the plan adapts by itself.
        """
        for name in heads:
            head = self.layers[name]
            if name == self.own_head:
                raise LorakitError(
                    f"attach: {name} shares its weight with an embedding that is adapted too; "
                    "leave one of them out"
                )
            if not isinstance(head, TiedHead):
                assert isinstance(head, nn.Linear)
                self.wrappers[name] = TiedHead(head, embedding)

    def wrapper_of(self, name: str) -> Attached | None:
        """Return the planned wrapper of the module `name`, whichever of its names was planned."""
        return self.wrappers.get(name, self._wrapper_of.get(id(self.layers[name])))

    def select(self, config: TargetConfig, embeddings: Sequence[str] = ()) -> list[str]:
        """Return the layers that `config` selects, linear ones and those of `embeddings`.

        A tied decoder has no head of its own. If the config selects it, the plan makes one, with
        the embedding's weight.

        Raises LorakitError as `select_layers` does, and for a layer inside a module that another
        adapter trains whole.
        """
        transposed = config.fan_in_fan_out
        linear = [name for name, each in self.layers.items() if is_linear(each, transposed)]
        head = head_of_tied_decoder(self.model)
        linear += [] if head is None else ["lm_head"]
        chosen = select_layers(linear + self._inside_saved_modules(), embeddings, config)
        if head is not None and "lm_head" in chosen:
            if isinstance(self.layers["model.embed_tokens"], Attached):
                raise LorakitError(
                    "attach: lm_head shares its weight with model.embed_tokens, which another "
                    "adapter changes; detach that one first"
                )
            self.own_head, self.layers["lm_head"] = "lm_head", head
        for name in chosen:
            if name not in self.layers:
                raise LorakitError(
                    f"attach: {name} lies in a module that another adapter trains whole; leave it "
                    "out (exclude_modules), or detach that one"
                )
        return chosen

    def select_linear(self, config: TargetConfig) -> list[str]:
        """Return the layers that `config` selects, for a method that adapts linear ones alone."""
        chosen = self.select(config)
        for name in chosen:
            self.check_linear(name, "only LoRA adapts both")
        return chosen

    def _inside_saved_modules(self) -> list[str]:
        """Return the linear layers inside the modules that another adapter trains whole."""
        return [
            f"{name}.{inner}"
            for name, each in self.layers.items()
            if isinstance(each, SavedModule)
            for inner, layer in each.base.named_modules()
            if inner and isinstance(layer, (nn.Linear, LinearBase))
        ]

    def check_linear(self, name: str, advice: str) -> None:
        """Raise LorakitError for a subclass of nn.Linear, or a head that shares its weight.

        `advice` ends the message about such a head.
        """
        layer = self.layers[name]
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            raise LorakitError(f"attach: {name} is a {type(layer).__name__}, not an nn.Linear")
        if (embedding := embedding_of_head(self.layers, layer)) is not None:
            raise LorakitError(f"attach: {name} shares its weight with {embedding}; {advice}")

    def carry_out(self, adapter: str) -> None:
        """Put the wrappers into the model, and the parts of `adapter` into the wrappers."""
        for wrapper, part in self.parts:
            wrapper.add_part(adapter, part)
        if self.own_head is not None:
            assert isinstance(self.model, Decoder)
            self.model.lm_head = self.layers[self.own_head]
        for name, module in self.layers.items():
            planned = self.wrapper_of(name)
            if planned is not None and planned is not module:
                self.model.set_submodule(name, planned)


def is_linear(module: nn.Module, transposed: bool = False) -> bool:
    """Return whether `module` is a linear layer, adapted or not.

    With `transposed`, one that stores its weight as [in, out] counts too.
    """
    if isinstance(module, (SavedModule, TrainedBias)):
        module = module.base
    return (transposed and _is_transposed(module)) or isinstance(
        module, (nn.Linear, LinearBase, AttachedLinear)
    )


def _is_transposed(module: nn.Module) -> bool:
    """Return whether `module` is a Conv1D of transformers, without an import of transformers."""
    return type(module).__name__ == "Conv1D"


def _linear_base(layer: nn.Module) -> LinearBase:
    """Return the base for a wrapper of the linear layer `layer`."""
    if isinstance(layer, LinearBase):
        return layer
    called = must_be_called(layer)
    if _is_transposed(layer):
        transposed = cast(nn.Linear, layer)  # it has a weight and a bias too
        return CalledTransposedBase(transposed) if called else TransposedBase(transposed)
    assert isinstance(layer, nn.Linear)
    return CalledBase(layer) if called else DenseBase(layer)
