"""int8: one scale per row, the weights of LLM.int8 (arXiv:2208.07339, section 2.1).

    scale_i = max_j |W_ij|
    q_ij    = round(W_ij * (127 / scale_i))        ties to even; int8 [N, K]
    W'_ij   = (q_ij * scale_i) * fl(1 / 127)       fp32, then one rounding to the wanted dtype

It takes 8 + 32 / K bits per parameter, with an error of at most scale / 254. It is for weights in
which 4 bits would cost too much, the embedding and the output head, and to read the weights of
LLM.int8. That method multiplies int8 by int8 and quantizes the activations for it. Here the weight
alone is quantized, and products run in the model's dtype on the dequantized weight, which is closer
to the 16-bit model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from . import reference


@dataclass(frozen=True, repr=False, eq=False)
class Int8Tensor:
    """A matrix [N, K] in int8, with one scale per row (arXiv:2208.07339, section 2.1).

    Attributes:
        values: int8 [N, K].
        scale: the largest magnitude of each row, fp32 [N].
        dtype: the dtype of the original.

    Raises:
        ValueError: values and scale do not fit each other.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def __post_init__(self):
        fits = self.values.dim() == 2 and self.scale.shape == self.values.shape[:1]
        fits &= self.values.device == self.scale.device
        if not fits or self.values.dtype != torch.int8 or self.scale.dtype != torch.float32:
            raise ValueError(
                f"values are {self.values.dtype} {tuple(self.values.shape)} with scales "
                f"{self.scale.dtype} {tuple(self.scale.shape)}, not int8 [N, K] with float32 [N]"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        """The device that the tensors lie on."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """The bytes of all that is stored, scales included."""
        return self.values.nbytes + self.scale.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """The bits that are stored for each value, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to(self, device: torch.device | str, *, copy: bool = False) -> "Int8Tensor":
        """Return the matrix on a device; with `copy` always in memory of its own."""
        values, scale = (part.to(device, copy=copy) for part in (self.values, self.scale))
        return Int8Tensor(values, scale, self.dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the file entries of the tensor `name`, as bitsandbytes writes them.

        They are the values, the scales of the rows, and the layout, 0 for rows.
        """
        beside = name.removesuffix("weight")
        layout = torch.zeros((), dtype=torch.uint8, device=self.device)
        return {name: self.values, beside + "SCB": self.scale, beside + "weight_format": layout}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> "Int8Tensor":
        """Return the tensor `name` from the entries of a file; the inverse of `tensors`.

        A file does not say the original's dtype; it is taken to be that of LLM.int8, fp16.

        Args:
            tensors: the entries, by name.
            name: the name of the weight.

        Returns:
            The packed matrix.

        Raises:
            ValueError: the layout is not by rows, or the sizes do not fit.
        """
        beside = name.removesuffix("weight")
        layout = tensors.get(beside + "weight_format")
        if layout is not None and layout.any():
            raise ValueError(f"weight_format {layout.tolist()} is not 0, the layout by rows")
        scale = tensors[beside + "SCB"].view(-1)
        if not torch.isfinite(scale).all():
            raise ValueError("its scales hold NaN or infinite values")
        return cls(tensors[name], scale, torch.float16)


def quantize_int8(w: Tensor) -> Int8Tensor:
    """Quantize the rows of a matrix to int8 (arXiv:2208.07339, section 2.1).

    Args:
        w: [N, K], fp32, bf16 or fp16, of any strides.

    Returns:
        The packed matrix, in new memory on the device of `w`.

    Raises:
        ValueError: `w` has another dtype, is not a matrix, or has NaN or infinite values.
    """
    if w.dtype not in dispatch.FLOATS or w.dim() != 2:
        raise ValueError(
            f"int8 holds float32, bfloat16 or float16 matrices, not {w.dtype} {tuple(w.shape)}"
        )
    values, scale = reference.quantize(w.detach())
    if not torch.isfinite(scale).all():
        raise ValueError("cannot quantize a tensor that holds NaN or infinite values")
    return Int8Tensor(values, scale, w.dtype)


def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make a matrix in int8 dense.

    Args:
        q: the packed matrix.
        dtype: of the result; the original's if it is None.

    Returns:
        The dense matrix [N, K], in new memory.
    """
    return reference.dequantize(q.values, q.scale[:, None], dtype or q.dtype)


def dequantize_int8_rows(q: Int8Tensor, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the rows of q [N, K] that `rows` int64 [...] picks: [..., K].

    Only these are dequantized. Raises IndexError for a row that is not there.
    """
    values = F.embedding(rows, q.values)
    return reference.dequantize(values, q.scale[rows][..., None], dtype or q.dtype)
