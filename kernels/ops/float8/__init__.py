"""Products of a frozen weight in float8, which GPUs multiply at twice the rate of bf16.

The maths
---------
e4m3 (arXiv:2209.05433) has 3 bits of mantissa, the largest value 448, the smallest normal one 2^-6
and steps of 2^-9 below that. A float keeps its relative error whatever it is multiplied by, so that
a scale has but one task, to bring the largest value to 448:

    W8 = e4m3(W / w)                    w = max |W| / 448              one for the weight
    x8 = e4m3(x / s)                    s = max |x| / 448              one for each row of x
    y  = s w (x8 W8^T)                  e4m3 products, fp32 sums, one rounding

Rounding moves a value by at most 1/16 of it, or by 2^-10 w or 2^-10 s near zero. Several layers
that read one x are one product in backward, as deep as all of them together; w goes into dy:

    dx = dy_q W_q + dy_k W_k + dy_v W_v = s [e4m3(w_q dy_q / s), ...] [W8_q; W8_k; W8_v]

Of a head, softmax takes away what all words have in common, and the gradients of the logits add up
to zero. So the mean row can be left out, W - 1 m^T, where neither a soft cap nor a z-loss sees it.
It is a large part of an embedding, whose rounding errors are then gone.

The gradients are e4m3 as well. e5m2 has more range, which a scale for each row has no need of, and
one bit less of mantissa: twice the error (docs/dev/LOG.md).

The memory layout
-----------------
`torch._scaled_mm` takes row-major x8 [M, K] and column-major W8^T [K, N], both with a multiple of
16 columns, and scales fp32 [M, 1] and [1, N]. So forward wants W8 [N, K], and backward its
transpose, [K, N]. A 4-bit weight becomes one or the other in one launch whenever it is needed, and
is forgotten again. Any other weight is kept in both, which takes as much memory as it has in bf16.

The trade-off
-------------
Nothing here has the bits of the products in the model's dtype: an error of some 4 % of a product's
size joins that of the 4 bits, some 10 %. The low-rank updates, norms and attention stay exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ... import dispatch
from ..frozen_linear.dense import Packed, dequantize
from ..nf4 import NF4Tensor, block_scales
from . import reference
from .reference import E4M3

STEP = 16  # that both sides of a weight are multiples of
MOST = 3  # layers of one backward product: q, k and v


class ScaledRows(NamedTuple):
    """A matrix in e4m3 whose rows have a scale each."""

    values: Tensor  # e4m3 [M, K]
    scale: Tensor  # fp32 [M, 1]


class StoredLayer(Protocol):
    """A frozen linear map, base(x) = x W^T + bias, and its W."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [M, K] W^T + bias, [M, N]."""

    @property
    def stored(self) -> Tensor | Packed:
        """W [N, K], as it is stored."""

    @property
    def bias(self) -> Tensor | None:
        """The bias [N], if there is one."""


def runs_on(device: torch.device) -> bool:
    """Return whether products in float8 run on a device.

    They do on NVIDIA's GPUs from compute capability 8.9 on, and anywhere under
    `use_backend("reference")`, which rounds to float8 and multiplies in fp32.
    """
    if dispatch.pick(device, "triton") == "triton":
        return dispatch.compiles_to() != "amdgcn" and dispatch.capability(device) >= (8, 9)
    return dispatch.forced() == "reference"


def takes(w: Tensor | Packed) -> bool:
    """Return whether a weight [N, K] may be multiplied in float8."""
    return w.dtype == torch.bfloat16 and not any(n % STEP for n in w.shape)


class Float8Weight:
    """A frozen weight whose products run in float8 (arXiv:2209.05433).

    Args:
        stored: W [N, K] in bf16, dense or packed, both sides a multiple of 16. An `NF4Tensor` with
            whole blocks in each row becomes e4m3 for every product again; any other is kept in
            e4m3, twice.
        centred: whether W is taken without the mean of its rows, as a head may be; it is kept then.
    """

    def __init__(self, stored: Tensor | Packed, *, centred: bool = False):
        self.stored, self.centred = stored, centred
        self.shape, self.dtype, self.device = tuple(stored.shape), stored.dtype, stored.device
        blocks = isinstance(stored, NF4Tensor) and self.shape[1] % stored.block_size == 0
        self.again = blocks and not centred
        dense: Tensor | None = None
        mean = torch.zeros(1, device=self.device)  # of fp32, which what is less it then is too
        if isinstance(stored, NF4Tensor) and self.again:
            largest = block_scales(stored).amax()  # each block holds a level 1 or -1
        else:
            dense = stored if isinstance(stored, Tensor) else dequantize(stored)
            mean = dense.mean(0, dtype=torch.float32) if centred else mean
            low, high = dense.amin(0) - mean, dense.amax(0) - mean
            largest = torch.maximum(high, -low).amax()
        self.scale, self.over = reference.scale_of(largest)
        # as torch wants them: one for each column of a product
        self.scales = self.scale.repeat(max(self.shape))[None]
        self.ones = torch.ones_like(self.scales)
        self.kept: tuple[Tensor, Tensor] | None = None
        if dense is not None:
            rows = reference.rounded(dense, mean, self.over)
            self.kept = rows, rows.t().contiguous()

    def rows(self) -> Tensor:
        """Return W / w, e4m3 [N, K]."""
        if self.kept is not None:
            return self.kept[0]
        return _backend(self.device).weight_rows(self.stored, self.over)

    def columns_to(self, out: Tensor) -> None:
        """Write the transpose of W / w to e4m3 [K, N], whose rows may lie apart."""
        if self.kept is not None:
            out.copy_(self.kept[1])
            return
        _backend(self.device).weight_columns(self.stored, self.over, out)


@dataclass(frozen=True, eq=False)
class Float8Linear:
    """A frozen layer whose weight is multiplied in float8 by what has kernels for it.

    Attributes:
        base: the layer.
        stored: its weight.
    """

    base: StoredLayer
    stored: Float8Weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [M, K] W^T + bias, [M, N], in the layer's own dtype."""
        return self.base(x)

    @property
    def bias(self) -> Tensor | None:
        """The bias [N], if there is one."""
        return self.base.bias


def _backend(device: torch.device) -> ModuleType:
    return dispatch.backend(__package__, device, cpu=False)


def scaled_rows(parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> ScaledRows:
    """Round matrices, side by side and each times its scale, to e4m3 with one scale for each row.

    Args:
        parts: [M, n] each, of any floating-point dtype, at most MOST of them.
        scales: fp32 [] of each, or None for 1.
    """
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    return ScaledRows(*_backend(parts[0].device).scaled_rows(parts, scales))


def product(x: ScaledRows, weight: Float8Weight, out: Tensor | None = None) -> Tensor:
    """Return x [M, K] W^T in bf16, [M, N]; it is written to `out` if that is given.

    The sums are fast ones: a forward product is rounded to bf16, 8 bits, in any case.
    """
    scales = weight.scales[:, : weight.shape[0]]
    return _backend(weight.device).product(x, weight.rows(), scales, True, out)


def product_back(grads: Sequence[Tensor], weights: Sequence[Float8Weight]) -> Tensor:
    """Return the sum of dy [M, N] W over the layers, [M, K] in bf16.

    The sums, which may be as deep as a vocabulary, are not fast ones.
    """
    rows = scaled_rows(grads, [weight.scale for weight in weights])
    scales = weights[0].ones[:, : weights[0].shape[1]]
    return _backend(rows.scale.device).product(rows, _columns(weights), scales, False, None)


def rounded_product_back(grad: ScaledRows, weight: Float8Weight) -> Tensor:
    """Return dy [M, N] W in bf16, [M, K], for a dy that is e4m3 already and without W's scale."""
    scales = weight.scales[:, : weight.shape[1]]
    return _backend(weight.device).product(grad, _columns([weight]), scales, False, None)


def _columns(weights: Sequence[Float8Weight]) -> Tensor:
    """Return the transposes of all W / w, side by side: e4m3 [K, N]."""
    if len(weights) == 1 and weights[0].kept is not None:
        return weights[0].kept[1]
    shape = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    columns = torch.empty(shape, dtype=E4M3, device=weights[0].device)
    start = 0
    for weight in weights:
        weight.columns_to(columns[:, start : start + weight.shape[0]])
        start += weight.shape[0]
    return columns
