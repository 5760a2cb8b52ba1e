"""Carried out of lorakit/gguf.py."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorakit.config.errors import LorakitError

# value type -> struct code
SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # outermost first
    kind: int  # a GGMLQuantizationType
    offset: int  # from the start of the file


class Header(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Metadata and tensor infos. Raises LorakitError if the file is no GGUF, or ends too soon."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            return _parse(file, size)
        except (_Truncated, UnicodeDecodeError, struct.error, OverflowError) as error:
            raise LorakitError(f"{path}: the GGUF header is damaged or cut off ({error})") from None
        except LorakitError as error:
            raise LorakitError(f"{path}: {error}") from None


class _Truncated(Exception):
    pass


def _parse(file: BinaryIO, size: int) -> Header:
    def take(count: int) -> bytes:
        if count > size - file.tell():
            raise _Truncated(f"{count} bytes wanted at {file.tell()} of {size}")
        return file.read(count)

    def scalar(code: str) -> Any:
        return struct.unpack("<" + code, take(struct.calcsize("<" + code)))[0]

    def string() -> str:
        return take(scalar("Q")).decode("utf-8")

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind in SCALARS:
            return scalar(SCALARS[kind])
        if kind != ARRAY:
            raise _Truncated(f"unknown value type {kind}")
        item, count = scalar("I"), scalar("Q")
        if item == ARRAY:
            raise _Truncated("an array of arrays")
        if item in SCALARS:
            dtype = np.dtype("<" + SCALARS[item])
            return np.frombuffer(take(count * dtype.itemsize), dtype).tolist()
        if count * 8 > size - file.tell():  # every string takes 8 bytes at least
            raise _Truncated(f"an array of {count} items at {file.tell()} of {size}")
        return [value(item) for _ in range(count)]

    if size < 24 or take(4) != b"GGUF":
        raise LorakitError("not a GGUF file")
    version = scalar("I")
    if version not in (2, 3):
        raise LorakitError(f"GGUF version {version} is not supported; 2 and 3 are")
    tensor_count, pair_count = scalar("Q"), scalar("Q")
    metadata = {}
    for _ in range(pair_count):
        key = string()
        metadata[key] = value(scalar("I"))
    infos = {}
    for _ in range(tensor_count):
        name, dims = string(), scalar("I")
        if dims > 8:
            raise _Truncated(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(scalar("Q") for _ in range(dims))[::-1]
        infos[name] = (shape, scalar("I"), scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise LorakitError(f"general.alignment is {alignment!r}")
    start = -(-file.tell() // alignment) * alignment
    tensors = {n: TensorInfo(shape, kind, start + at) for n, (shape, kind, at) in infos.items()}
    return Header(metadata, tensors)


def _package():
    try:
        import gguf
    except ImportError:
        raise LorakitError(
            "reading GGUF files needs the gguf package: pip install 'lorakit[gguf]'"
        ) from None
    return gguf


def data_length(path: Path, name: str, info: TensorInfo) -> int:
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise LorakitError(f"{path}: tensor {name} has the unknown type {info.kind}") from None
    row = info.shape[-1] if info.shape else 1
    if row % block:
        raise LorakitError(f"{path}: tensor {name}: rows of {row} are no multiple of {block}")
    return math.prod(info.shape) // block * block_bytes


def numpy_reader(
    path: Path,
    info: TensorInfo,
    length: int,
    restoration: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], Tensor]:
    gguf = _package()
    kind = gguf.GGMLQuantizationType(info.kind)

    def read() -> Tensor:
        raw = np.fromfile(path, dtype=np.uint8, count=length, offset=info.offset)
        rows = math.prod(info.shape[:-1])
        try:
            dense = gguf.quants.dequantize(raw.reshape(rows, -1), kind)
        except NotImplementedError:
            raise LorakitError(
                f"{path}: tensors of type {kind.name} cannot be dequantized"
            ) from None
        tensor = torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32)).view(info.shape)
        return tensor if restoration is None else restoration(tensor)

    return read
