"""The weight Q(W + s B A) of a layer in merge-aware training, and when it is made again.

A part with `quantize_aware` computes with the weight that a later merge will write: the sum of base
and update, quantized by that merge's own function from that merge's own numbers. So what the model
computes while it trains is what the merged model computes.

    nf4      `merge(model, "nf4")`: the sum is fp32, and rounded to the layer's dtype before it is
             packed as the base is, or as QuantConfig() says if the base is dense
    blocks   `export_gguf`: the sum of a dense base is fp32 until it is quantized. That of a packed
             base is rounded to the layer's dtype first

The weight is kept as it is packed, and made again when A, B or the base have changed. So the micro-
batches of a step, the second forward pass of gradient checkpointing and all tokens of a completion
share one quantization. The price is the memory of one more packed weight for each layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.kernels.ops.gguf_blocks.layouts import BLOCK_LAYOUTS
from lorakit.models.gguf_names import Change
from lorakit.models.packed_layers import packed_layer

Quantizer = Callable[[Tensor, torch.dtype], kernels.QuantizedWeight]
"""Makes Q(W + s B A) of the sum [out, in], fp32 or wider, for a layer of that dtype."""


class QuantizedSum(nn.Module):
    """Makes the quantized sum of one layer and one part, where it is not there already."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.quantizer = quantizer
        self._made: kernels.QuantizedWeight | None = None
        self._made_of: list[Tensor] = []
        self._versions: list[int] = []

    @torch.no_grad()
    def forward(
        self, made_of: Sequence[Tensor], dtype: torch.dtype, total: Callable[[], Tensor]
    ) -> kernels.QuantizedWeight:
        """Return Q(W + s B A).

        Args:
            made_of: The tensors that the sum is made of.
            dtype: What the layer computes in.
            total: Makes the sum [out, in].

        Raises:
            LorakitError: The sum holds NaN or infinite values, which cannot be quantized.
        """
        versions = [t._version for t in made_of]
        if self._made is None or versions != self._versions or not self._is_of(made_of):
            self._made = None  # its memory is that of the next one
            try:
                self._made = self.quantizer(total(), dtype)
            except ValueError as error:
                raise LorakitError(f"quantize_aware: {error}") from None
            # these keep the memory, so that no other tensor gets its address
            self._made_of, self._versions = [t.detach() for t in made_of], versions
        return self._made

    def _is_of(self, tensors: Sequence[Tensor]) -> bool:
        pairs = zip(tensors, self._made_of, strict=True)
        return all(a.data_ptr() == b.data_ptr() and a.dtype == b.dtype for a, b in pairs)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_made": None, "_made_of": [], "_versions": []}


def as_nf4(config: QuantConfig, total: Tensor, dtype: torch.dtype) -> kernels.Packed:
    """Return a sum as `merge` packs it in 4 bits."""
    out_features, in_features = total.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(total.to(dtype), requires_grad=False)
    return packed_layer(linear, config).stored


@dataclass(frozen=True)
class Stored:
    """How `export_gguf` stores a weight."""

    block_type: str
    """The format, as `kernels.quantize_blocks` knows it, or "f16"."""
    change: Change | None
    """Turns a published weight into the one that the file holds; None: they are the same."""
    back: Change | None
    """Turns that into the published one."""
    rounds: bool
    """Whether the sum is rounded to the layer's dtype first."""

    def __call__(self, total: Tensor, dtype: torch.dtype) -> Callable[[torch.dtype], Tensor]:
        """Return what makes the stored sum dense."""
        w = total.to(dtype) if self.rounds else total
        w = (w if self.change is None else self.change(w)).float()
        return partial(self._dense, w.half() if self.block_type == "f16" else self._blocks(w))

    def _blocks(self, w: Tensor) -> Tensor:
        if not w.is_meta:
            return kernels.quantize_blocks(w, self.block_type)
        values, nbytes = BLOCK_LAYOUTS[self.block_type]  # of a forecast
        return w.new_empty((w.shape[0], w.shape[1] // values * nbytes), dtype=torch.uint8)

    def _dense(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight as whoever reads the file computes with it."""
        if self.block_type == "f16":
            w = stored.float()
        else:
            w = kernels.dequantize_blocks(stored, self.block_type)
        return (w if self.back is None else self.back(w)).to(dtype)
