"""Tells a ledger which phase, layer and part of the model is running.

Forward is told by hooks of torch's on all modules, and backward by hooks on what blocks return: the
gradient of a block's output comes when its backward begins. Nothing of the model is changed.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from lorakit.adapters.layers.quantized_sum import QuantizedSum
from lorakit.models.blocks import Attention, Block, RMSNorm
from lorakit.models.decoder import Decoder
from lorakit.models.linear_attention import LinearAttention
from lorakit.models.mlp import MLP, Experts, MoE, Router
from lorakit.training.memory_plan.ledger import Kind, Ledger

PARTS: Mapping[type[nn.Module], str] = {
    Attention: "attention",
    LinearAttention: "attention",
    MLP: "mlp",
    MoE: "experts",
    Experts: "experts",
    Router: "experts",
    RMSNorm: "norms",
    Block: "residual",
}
NO_LAYER = -1


class Mark(NamedTuple):
    """A moment of a run."""

    phase: str
    """ "loading", "forward", "head", "backward", "optimizer" or "generate"."""
    layer: int
    """Number of the block that runs, in the whole model; NO_LAYER outside of the blocks."""


class Watch:
    """Sets mark and kind of a ledger while it is in use as a context.

    Args:
        ledger: The ledger.
        model: The decoder whose steps are booked.
        numbers: The number of each of its blocks in the whole model.
    """

    def __init__(self, ledger: Ledger, model: Decoder, numbers: list[int]):
        self.ledger, self.model = ledger, model
        self.layers = dict(zip(model.model.layers, numbers, strict=True))
        self.parts: list[str] = []  # of the modules that run, the innermost last
        self._stack = ExitStack()

    def __enter__(self) -> "Watch":
        for handle in (
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ):
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def begin(self, phase: str, kind: Kind, layer: int = NO_LAYER) -> None:
        """Book under a phase and a kind from now on."""
        self.ledger.mark, self.ledger.kind = Mark(phase, layer), kind

    def _before(self, module: nn.Module, args: Any) -> None:
        trunk, phase = self.model.model, self.ledger.mark.phase
        if module is trunk.embed_tokens and phase != "generate":
            self.begin("forward", self._between())
        if module in self.layers and phase in ("forward", "generate"):
            self.begin(phase, self._between(), self.layers[module])
        # FSDP2 gives a block a class of its own, which it is still one of
        part = next((PARTS[each] for each in type(module).__mro__ if each in PARTS), None)
        inner = self.parts[-1] if self.parts else "residual"
        # an expert is an MLP
        self.parts.append(inner if part is None or inner == "experts" else part)
        if part is not None:
            self.ledger.kind = "activations", self.parts[-1]
        if isinstance(module, QuantizedSum):
            self.ledger.kind = "quantized sums", ""

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self.parts.pop()
        phase = self.ledger.mark.phase
        if self.parts:
            self.ledger.kind = "activations", self.parts[-1]
        else:
            self.ledger.kind = self._between() if phase != "backward" else ("backward", "")
        if phase != "forward":
            return
        if module in self.layers:
            self._at_gradient(out, self.layers[module])
        if module is self.model.model.norm:
            self._at_gradient(out, NO_LAYER)
            self.begin("head", ("logits", ""))

    def _at_gradient(self, out: Any, layer: int) -> None:
        """Begin the backward of a layer when the first gradient of its outputs is there."""

        def begin(grad: Tensor) -> None:
            self.begin("backward", ("backward", ""), layer)

        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(begin)

    def _between(self) -> Kind:
        """Return the kind of what is made outside of the blocks."""
        return "activations", "checkpoints" if self.model.gradient_checkpointing else "residual"
