"""NF4: 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314, section 3).

The maths
---------
The tensor is flattened row-major and cut into blocks of `block_size` values; the last block may be
short. A block is scaled by its largest magnitude, absmax, and every value becomes the index of the
nearest of 16 fixed levels, the quantiles of a normal distribution rescaled to [-1, 1] so that 0 and
both ends are exact:

    scaled = x * (1 / absmax)              fp32, a product with the reciprocal
    code   = #{thresholds < scaled}        thresholds are the fp32 midpoints of the levels
    x'     = NF4_LEVELS[code] * absmax     fp32, then one rounding to the wanted dtype

Double quantization stores absmax itself in 8 bits. With offset = mean(absmax), the residue
absmax - offset is quantized in blocks of 256 to the nearest of 256 levels of a signed "dynamic" map
(arXiv:1511.04561: some bits hold a decimal exponent, the rest a linear fraction):

    absmax' = DYNAMIC[absmax_code] * nested_absmax[block // 256] + offset

which costs 8 / block_size + 32 / (256 block_size) bits per parameter instead of 32 / block_size:
0.127 instead of 0.5 at 64.

Memory layout
-------------
    codes          uint8 [ceil(n / 2)]     element 2i in the high nibble of byte i, 2i + 1 low
    absmax         uint8 [blocks], or fp32 [blocks] without double quantization
    nested_absmax  fp32 [ceil(blocks / 256)]
    offset         fp32 []

These are bitsandbytes' bytes, so that its checkpoints need no conversion. The padding nibble of an
odd length is 7, the code of 0. All-zero blocks have absmax 0 and code 7 everywhere.

The trade-off
-------------
`nf4_linear` dequantizes the whole weight, multiplies, and forgets it; backward dequantizes again.
That keeps 4.127 bits per frozen parameter between products at the price of one dequantization per
product, which is small beside the product itself from a few dozen rows on.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from . import reference

# From bitsandbytes (csrc/kernels.cu, dDequantizeNF4); Appendix E of the QLoRA paper prints it too.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# A smaller absmax divides as if it were this, so that 1 / absmax stays finite (bitsandbytes' rule).
ABSMAX_FLOOR = 1e-38


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels, fp32 [16]."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def thresholds(device: torch.device) -> Tensor:
    """Where the nearest level changes, fp32 [15]: midpoints of neighbours, rounded to fp32 once."""
    table = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    return (table[1:] + table[:-1]) / 2


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map, fp32 [256], ascending.

    For decade i = 0..6 the interval [0.1, 1] * 10^(i-6) is cut into 2^i equal parts whose centres,
    with both signs, are levels; 0 and 1 complete the 256.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    values = sorted(positive + [-value for value in positive] + [0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True, repr=False)
class NF4Tensor:
    """A quantized tensor: see the module's memory layout. `shape` and `dtype` are those of the
    original.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def bits_per_parameter(self) -> float:
        """All stored bytes, scales included, over the number of parameters."""
        stored = [self.codes, self.absmax, self.nested_absmax, self.offset]
        return 8 * sum(t.nbytes for t in stored if t is not None) / max(1, math.prod(self.shape))

    def __repr__(self) -> str:
        return (
            f"NF4Tensor(shape={self.shape}, block_size={self.block_size}, dtype={self.dtype}, "
            f"double_quant={self.double_quant}, {self.bits_per_parameter:.3f} bits per parameter)"
        )


def quantize_nf4(w: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Quantize `w` (fp32, bf16 or fp16, any shape, any strides) to NF4.

    Raises ValueError for another dtype, a block size that is not a power of two from 32 to 4096, or
    a tensor with NaN or infinite values; such a tensor has no scale.
    """
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NF4 quantizes float32, bfloat16 or float16 tensors, not {w.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size is {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    flat = w.detach().reshape(-1).contiguous()  # reshape alone may keep the strides
    if dispatch.pick(w.device, "cpu") == "cpu":
        codes, absmax = _quantize_cpu(flat, block_size)
    else:
        codes, absmax = reference.quantize(flat, thresholds(w.device), block_size, ABSMAX_FLOOR)
    if not torch.isfinite(absmax).all():
        raise ValueError("cannot quantize a tensor that holds NaN or infinite values")
    nested, offset = None, None
    if double_quant:
        absmax, nested, offset = reference.quantize_absmax(
            absmax, dynamic_map(w.device), NESTED_BLOCK, ABSMAX_FLOOR
        )
    return NF4Tensor(codes, absmax, nested, offset, tuple(w.shape), block_size, w.dtype)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor of shape `q.shape`, in `dtype` (default: the original's). Fresh memory on
    every call.
    """
    dtype = dtype or q.dtype
    device = q.codes.device
    absmax = q.absmax
    if q.nested_absmax is not None:
        absmax = reference.dequantize_absmax(
            q.absmax, q.nested_absmax, q.offset, dynamic_map(device), NESTED_BLOCK
        )
    if dispatch.pick(device, "cpu") == "cpu":
        return _dequantize_cpu(q, absmax, dtype)
    flat = reference.dequantize(q.codes, absmax, levels(device), math.prod(q.shape), q.block_size)
    return flat.to(dtype).view(q.shape)


def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of a frozen NF4 weight [N, K], plus bias [N]: [..., N] in x's
    dtype.

    Differentiable in x and bias. What is kept for backward is the packed weight, never the dense
    one.
    """
    return _NF4Linear.apply(x, q, bias)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, dequantize_nf4(q, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # [..., N] @ [N, K] -> [..., K]
        grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias


# ---- the compiled kernels -----------------------------------------------------------------------

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_CHUNK = 1 << 22  # values: half precision is widened to fp32 piece by piece, 16 MB at a time


def _quantize_cpu(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    run = dispatch.function(
        "nf4_quantize", _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT
    )
    n = flat.numel()
    bounds = thresholds(flat.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty((n + block_size - 1) // block_size, dtype=torch.float32)
    for start in range(0, n, _CHUNK):  # _CHUNK is a multiple of every block size
        piece = flat[start : start + _CHUNK].float()
        run(
            piece.data_ptr(),
            bounds.data_ptr(),
            codes.data_ptr() + start // 2,
            absmax.data_ptr() + 4 * (start // block_size),
            piece.numel(),
            block_size,
            ABSMAX_FLOOR,
        )
    return codes, absmax


def _dequantize_cpu(q: NF4Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    computed = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    op = "nf4_dequantize_bf16" if computed == torch.bfloat16 else "nf4_dequantize_fp32"
    run = dispatch.function(op, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64)
    out = torch.empty(q.shape, dtype=computed)
    codes, table = q.codes.contiguous(), levels(q.codes.device)
    run(
        codes.data_ptr(),
        table.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        out.numel(),
        q.block_size,
    )
    return out.to(dtype)
