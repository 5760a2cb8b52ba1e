"""What a 4-bit tensor consists of, and how it lies in a file.

In memory an `NF4Tensor` is three or four torch tensors (`__init__.py` has the layout). In a
safetensors file it is what bitsandbytes writes for a weight named X:

    X                 codes, [bytes, 1]; as uint8, or the same bytes under a wider dtype
    X.absmax            uint8 [blocks], or fp32 [blocks] without double quantization
    X.quant_map         fp32 [16], the levels
    X.nested_absmax     fp32 [ceil(blocks / 256)], with double quantization
    X.nested_quant_map  fp32 [256], the dynamic map, with double quantization
    X.quant_state.bitsandbytes__nf4 (or fp4): JSON as uint8, of shape, dtype, block size, offset

A file is checked against all of this before any of it is used: if a scale were missing, a kernel
would read beyond the end of the memory.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...dispatch import DTYPES

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
# bitsandbytes' FP4: a sign, two bits of exponent and one of mantissa, over its largest value, 12.
# Not the order that such bits have elsewhere; code 8 is a second zero.
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_LEVELS = (*_FP4_MAGNITUDES, 0.0, *(-value for value in _FP4_MAGNITUDES[1:]))
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
MARK = ".quant_state.bitsandbytes__"  # a tensor X is in 4 bits if there is an X + MARK + quant_type


@functools.cache
def levels(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 levels by code, fp32 [16]."""
    return torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=device)


@functools.cache
def pairs(quant_type: str, device: torch.device) -> Tensor:
    """Return the two levels of every byte of codes, fp32 [256, 2]."""
    table = levels(quant_type, device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the signed 8-bit dynamic map (arXiv:1511.04561), fp32 [256], ascending.

    For decade i = 0..6 the interval [0.1, 1] * 10^(i-6) is cut into 2^i equal parts whose centres,
    with both signs, are levels; 0 and 1 complete the 256.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    values = sorted(positive + [-value for value in positive] + [0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def largest_scale(dtype: torch.dtype) -> float:
    """Return the largest scale that a tensor of `dtype` may have.

    Rounded to 8 bits, the scale of the largest values could exceed what their dtype holds.
    """
    return min(torch.finfo(d).max for d in (dtype, torch.float32))


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two from 32 to 4096."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size is {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}"
        )


@dataclass(frozen=True, repr=False, eq=False)
class NF4Tensor:
    """A tensor in 4 bits, NF4 or FP4, in the layout of bitsandbytes (arXiv:2305.14314).

    It goes to safetensors files by `tensors` and `from_tensors`; it cannot be pickled. All is
    checked when it is made, so that the kernels need not look again; a part whose values do not lie
    side by side is copied then.

    Attributes:
        codes: uint8 [ceil(n / 2)] for n values in row-major order, two codes a byte, the first one
            in the high nibble.
        absmax: the scale of each block, uint8 [blocks] with double quantization, else fp32
            [blocks].
        nested_absmax: the scales of 256 scales each, fp32 [ceil(blocks / 256)], or None.
        offset: the mean of the scales, fp32 [1], or None; [] is taken too.
        shape: the shape of the original.
        block_size: how many values share a scale.
        dtype: the dtype of the original, fp32, bf16 or fp16.
        quant_type: "nf4" or "fp4".

    Raises:
        ValueError: the tensors do not fit `shape` and `block_size`.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype
    quant_type: str = "nf4"

    def __post_init__(self):
        check_block_size(self.block_size)
        if self.quant_type not in LEVELS or min(self.shape, default=0) < 0:
            raise ValueError(f"quant_type {self.quant_type!r}, shape {self.shape}: no such tensor")
        n = math.prod(self.shape)
        blocks = -(-n // self.block_size)
        scale = torch.float32 if self.nested_absmax is None else torch.uint8
        held = [("codes", self.codes, -(-n // 2), torch.uint8)]
        held.append(("absmax", self.absmax, blocks, scale))
        if self.nested_absmax is not None:
            if self.offset is None:
                raise ValueError("nested_absmax is given without offset")
            nested = -(-blocks // NESTED_BLOCK)
            held.append(("nested_absmax", self.nested_absmax, nested, torch.float32))
            held.append(("offset", self.offset, 1, torch.float32))
            if self.offset.dim() != 1 and self.offset.numel() == 1:
                object.__setattr__(self, "offset", self.offset.view(1))
        for name, tensor, count, dtype in held:
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, codes on {self.device}")
            if tensor.numel() != count or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} holds {tensor.numel()} values of {tensor.dtype}, where shape "
                    f"{self.shape} in blocks of {self.block_size} has {count} of {dtype}"
                )
            if not tensor.is_contiguous():
                object.__setattr__(self, name, tensor.contiguous())

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """The device that the tensors lie on."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """The bytes of all that is stored, scales included."""
        return sum(t.nbytes for t in self._parts().values())

    @property
    def bits_per_parameter(self) -> float:
        """The bits that are stored for each value, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def _parts(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> "NF4Tensor":
        changed: dict[str, Any] = {name: change(part) for name, part in self._parts().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str, *, copy: bool = False) -> "NF4Tensor":
        """Return the tensor on a device; with `copy` always in memory of its own."""
        return self._map(lambda part: part.to(device, copy=copy))

    def __deepcopy__(self, memo: dict) -> "NF4Tensor":
        return self._map(Tensor.clone)

    def __reduce__(self):
        raise TypeError(
            "an NF4Tensor is not pickled: save its tensors(name) to a safetensors file, "
            "from_tensors reads them again"
        )

    def __repr__(self) -> str:
        return (
            f"NF4Tensor(shape={self.shape}, quant_type={self.quant_type!r}, "
            f"block_size={self.block_size}, dtype={self.dtype}, double_quant={self.double_quant}, "
            f"{self.bits_per_parameter:.3f} bits per parameter)"
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the file entries of the tensor `name`, as bitsandbytes writes them."""
        state = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        found = {
            name: self.codes.view(-1, 1),
            f"{name}.absmax": self.absmax,
            f"{name}.quant_map": levels(self.quant_type, self.device).clone(),
        }
        if self.nested_absmax is not None and self.offset is not None:
            found[f"{name}.nested_absmax"] = self.nested_absmax
            found[f"{name}.nested_quant_map"] = dynamic_map(self.device).clone()
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
        text = json.dumps(state).encode()
        found[f"{name}{MARK}{self.quant_type}"] = torch.tensor(
            list(text), dtype=torch.uint8, device=self.device
        )
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> "NF4Tensor":
        """Return the tensor `name` from the entries of a file; the inverse of `tensors`.

        Args:
            tensors: the entries, by name.
            name: the name of the weight.

        Returns:
            The packed tensor.

        Raises:
            ValueError: an entry is missing, has the wrong size, or is of another code than NF4 or
                FP4.
        """
        quant_type, state = read_state(tensors, name)
        codes = _entry(tensors, name).contiguous().view(-1)
        codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
        absmax = _entry(tensors, f"{name}.absmax").view(-1)
        _same(tensors, f"{name}.quant_map", levels(quant_type, absmax.device))
        nested = offset = None
        if "nested_blocksize" in state:
            nested = _entry(tensors, f"{name}.nested_absmax").view(-1)
            _same(tensors, f"{name}.nested_quant_map", dynamic_map(absmax.device))
            mean = [state["nested_offset"]]
            offset = torch.tensor(mean, dtype=torch.float32, device=absmax.device)
        if not torch.isfinite(absmax if nested is None else nested).all():
            raise ValueError("its scales hold NaN or infinite values")
        dtype, shape = DTYPES[state["dtype"]], tuple(state["shape"])
        return cls(codes, absmax, nested, offset, shape, state["blocksize"], dtype, quant_type)


def read_state(tensors: Mapping[str, Tensor], name: str) -> tuple[str, dict]:
    """Return the quant type of tensor `name`, and what its quant_state says, checked."""
    kinds = [kind for kind in LEVELS if f"{name}{MARK}{kind}" in tensors]
    if len(kinds) != 1:
        raise ValueError(f"one of {', '.join(name + MARK + kind for kind in LEVELS)} must be there")
    raw = tensors[f"{name}{MARK}{kinds[0]}"]
    try:
        state = json.loads(bytes(raw.flatten().tolist()))
    except (TypeError, ValueError, RecursionError):  # TypeError: not even whole numbers
        raise ValueError(f"{name}{MARK}{kinds[0]} is no JSON") from None
    if not isinstance(state, dict):
        raise ValueError(f"{name}{MARK}{kinds[0]} is no JSON object")

    def whole(value: object) -> bool:
        return type(value) is int and value >= 0

    shape, offset = state.get("shape"), state.get("nested_offset")
    valid = {
        "quant_type": state.get("quant_type") == kinds[0],
        "blocksize": whole(state.get("blocksize")) and state["blocksize"] in BLOCK_SIZES,
        "dtype": isinstance(state.get("dtype"), str) and state["dtype"] in DTYPES,
        "shape": isinstance(shape, list) and all(map(whole, shape)),
    }
    if "nested_blocksize" in state:
        valid["nested_blocksize"] = state["nested_blocksize"] == NESTED_BLOCK
        valid["nested_dtype"] = state.get("nested_dtype") == "float32"
        valid["nested_offset"] = (
            isinstance(offset, float) and abs(offset) <= torch.finfo(torch.float32).max
        )
    for key, fine in valid.items():
        if not fine:
            raise ValueError(
                f"its quant_state has {key} {state.get(key)!r}, which bitsandbytes does not write"
            )
    return kinds[0], state


def _entry(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _same(tensors: Mapping[str, Tensor], name: str, expected: Tensor) -> None:
    """Raise ValueError unless the table in the file is ours, to a few roundings."""
    found = _entry(tensors, name).view(-1).float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{name} is another code than the one lorakit knows")
