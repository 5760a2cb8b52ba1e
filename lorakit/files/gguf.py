"""The GGUF container: the header of a file, its tensors as dense values, and writing a new file.

Layout (GGUF 2 and 3, little endian):

    magic "GGUF", version; the number of tensors, the number of pairs
    pairs: key, value type, value
    tensor infos: name, number of dimensions, dimensions (innermost first), block format, offset
    padding up to the alignment
    the data of each tensor, at its offset from here

The header is read here, in one pass over the file's beginning. The `gguf` package knows every block
format and turns a tensor's bytes into fp32 values. Its own reader of headers makes several numpy
arrays for each string of the vocabulary: 4 s and 160 MB for a model of 49,152 tokens, against 0.1 s
and 15 MB here.

A file from a stranger is not believed. Every length is compared with what is left of the file
before memory is taken for it, arrays do not nest, and a type, version or number of dimensions that
GGUF does not have is refused, with a LorakitError of one sentence. Nothing here unpickles or runs
anything from the file.

Files are written by the package's own writer: all sizes are known before any data is, so the header
goes first, and then one tensor after the other is made and written.
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.config.errors import LorakitError
from lorakit.files.local import atomic

# value type -> struct code
_SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8  # of a tensor; llama.cpp's own limit is 4


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    shape: tuple[int, ...]
    """The sizes, outermost first, as in torch."""
    kind: int
    """The block format, a GGMLQuantizationType of the gguf package."""
    offset: int
    """The place of its first byte, from the start of the file."""


class Header(NamedTuple):
    """What stands before the tensors' data."""

    metadata: dict[str, Any]
    """The values by their keys. Arrays are lists."""
    tensors: dict[str, TensorInfo]
    """The tensors by their names, in the file's order."""
    types: dict[str, tuple[int, int | None]]
    """The value types by the keys, each with the type of an array's items or None."""


class Typed(NamedTuple):
    """A value that is to be written as the type that it has in another file."""

    value: Any
    """The value."""
    kind: int
    """Its value type."""
    of: int | None
    """The value type of an array's items."""


def read_header(path: Path) -> Header:
    """Read the header of a file.

    Raises LorakitError if it is no GGUF file, damaged or cut off.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            return _read_header(_Bytes(file, size))
        except (_Damaged, UnicodeDecodeError, struct.error, OverflowError) as error:
            raise LorakitError(f"{path}: the GGUF header is damaged or cut off ({error})") from None
        except LorakitError as error:
            raise LorakitError(f"{path}: {error}") from None


class _Damaged(Exception):
    """The bytes of a header contradict themselves, or end too soon."""


class _Bytes:
    """The bytes of a header, taken one value after the other."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def check_left(self, count: int) -> None:
        """Raise _Damaged unless the file holds `count` bytes more."""
        at = self.file.tell()
        if count > self.size - at:
            raise _Damaged(f"{count} bytes wanted at {at} of {self.size}")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self.check_left(count)
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        """Return the next number, whose struct code is `code`."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """Return the next string: its length, then UTF-8."""
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return the next value, whose GGUF value type is `kind`, no array."""
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise _Damaged(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int) -> list[Any]:
        """Return the next array of items of type `kind`: their number, then the items."""
        count = self.scalar("Q")
        if kind == _ARRAY:
            raise _Damaged("an array of arrays")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            items: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return items
        self.check_left(count * 8)  # every string takes 8 bytes at least
        return [self.value(kind) for _ in range(count)]


def _read_header(data: _Bytes) -> Header:
    if data.size < 24 or data.take(4) != b"GGUF":
        raise LorakitError("not a GGUF file")
    version = data.scalar("I")
    if version not in (2, 3):
        raise LorakitError(f"GGUF version {version} is not supported; 2 and 3 are")
    tensor_count, pair_count = data.scalar("Q"), data.scalar("Q")
    metadata, types = {}, {}
    for _ in range(pair_count):
        key, kind = data.string(), data.scalar("I")
        of = data.scalar("I") if kind == _ARRAY else None
        metadata[key] = data.value(kind) if of is None else data.array(of)
        types[key] = kind, of
    infos = {}
    for _ in range(tensor_count):
        name, dims = data.string(), data.scalar("I")
        if dims > _MOST_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(data.scalar("Q") for _ in range(dims))[::-1]
        infos[name] = TensorInfo(shape, data.scalar("I"), data.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise LorakitError(f"general.alignment must be a positive number, not {alignment!r}")
    start = -(-data.file.tell() // alignment) * alignment
    tensors = {n: info._replace(offset=start + info.offset) for n, info in infos.items()}
    return Header(metadata, tensors, types)


def _gguf_package() -> Any:
    """Return the gguf package, which is imported only when a GGUF file is in use."""
    try:
        import gguf
    except ImportError:
        raise LorakitError(
            "GGUF files need the gguf package: pip install 'lorakit[gguf]'"
        ) from None
    return gguf


def data_length(path: Path, name: str, info: TensorInfo) -> int:
    """Return how many bytes the data of a tensor takes.

    Raises LorakitError if its block format is unknown, its rows are no whole blocks, or the file
    ends before the data does.
    """
    gguf = _gguf_package()
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
    except (ValueError, KeyError):
        raise LorakitError(f"{path}: tensor {name} has the unknown type {info.kind}") from None
    row = info.shape[-1] if info.shape else 1
    if row % block:
        raise LorakitError(f"{path}: tensor {name}: rows of {row} are no multiple of {block}")
    length: int = math.prod(info.shape) // block * block_bytes
    end, size = info.offset + length, path.stat().st_size
    if end > size:
        raise LorakitError(
            f"{path}: the file is cut off: tensor {name} ends at byte {end}, the file at {size}"
        )
    return length


def fp32_reader(path: Path, info: TensorInfo, length: int) -> Callable[[], Tensor]:
    """Return a function that reads a tensor of `length` bytes and dequantizes it to fp32.

    The function raises LorakitError if the gguf package cannot dequantize the block format.
    """
    _gguf_package()  # missing, it is told before anything is read

    def read() -> Tensor:
        raw = np.fromfile(path, dtype=np.uint8, count=length, offset=info.offset)
        rows = raw.reshape(math.prod(info.shape[:-1]), -1)
        return _dequantized(path, rows, info.kind).view(info.shape)

    return read


def rows_reader(path: Path, info: TensorInfo, length: int) -> Callable[[Tensor], Tensor]:
    """Return a function that reads the rows of a matrix [V, N] by their numbers, int64 [n].

    It maps the file, so that the other rows are not read, and returns fp32 [n, N]. It raises
    LorakitError as the function of `fp32_reader` does.
    """

    def read(numbers: Tensor) -> Tensor:
        shape = info.shape[0], length // info.shape[0]
        blocks = np.memmap(path, np.uint8, "r", info.offset, shape)
        return _dequantized(path, np.asarray(blocks[numbers.numpy()]), info.kind)

    return read


def _dequantized(path: Path, rows: np.ndarray[Any, np.dtype[np.uint8]], number: int) -> Tensor:
    """Return the values of blocks uint8 [rows, bytes] of a format by its number, fp32."""
    gguf = _gguf_package()
    kind = gguf.GGMLQuantizationType(number)
    try:
        dense = gguf.quants.dequantize(rows, kind)
    except NotImplementedError:
        raise LorakitError(f"{path}: tensors of type {kind.name} cannot be dequantized") from None
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))


# ---- writing ------------------------------------------------------------------------------------


class NewTensor(NamedTuple):
    """A tensor that is to be written."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """The sizes, outermost first, as in torch."""
    kind: str
    """The block format, such as "Q4_K"."""
    data: Callable[[], np.ndarray[Any, np.dtype[np.uint8]]]
    """Returns its bytes, uint8 [rows, bytes of a row]."""


def block_sizes(kind: str) -> tuple[int, int]:
    """Return how many values a block of a format holds, and how many bytes it takes."""
    gguf = _gguf_package()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return values, size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[NewTensor]) -> None:
    """Write a file, atomically, one tensor after the other.

    A number of the metadata is stored as uint32, or as float32 if it is a float; the whole numbers
    of a list as int32. Those are the types that llama.cpp asks for. A Typed value has its own.

    Args:
        path: The file.
        metadata: Text, truth values, numbers and lists of one of them, by their keys. One key is
            general.architecture.
        tensors: The tensors, in the order of the file. The values of one are made when those of the
            one before are written.

    Raises:
        LorakitError: The gguf package is missing.
        OSError: The disk is full. A file that was there before is as it was.
    """
    gguf = _gguf_package()
    tensors = list(tensors)
    with atomic(path) as temporary:
        writer = gguf.GGUFWriter(temporary, metadata["general.architecture"])
        try:
            for key, value in metadata.items():
                if key != "general.architecture":
                    writer.add_key_value(key, *_typed(value))
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[tensor.kind]
                block, size = block_sizes(tensor.kind)
                length = math.prod(tensor.shape) // block * size
                writer.add_tensor_info(tensor.name, tensor.shape, np.float32, length, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            bar = tqdm(tensors, f"writing {path.name}", unit="tensor", disable=None, leave=False)
            for tensor in bar:
                data = tensor.data()
                try:
                    writer.write_tensor_data(data)
                except OSError as error:  # numpy's says two numbers
                    raise OSError(
                        f"{path} cannot be written ({error}): is the disk full?"
                    ) from None
        finally:
            writer.close()


def _typed(value: Any) -> Typed:
    """Return a value with the type that it is written as, and that of the items of a list."""
    kinds = _gguf_package().GGUFValueType
    if isinstance(value, Typed):
        of = None if value.of is None else kinds(value.of)
        return Typed(value.value, kinds(value.kind), of)
    scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if not isinstance(value, Sequence) or isinstance(value, str):
        return Typed(value, scalars[type(value)], None)
    return Typed(value, kinds.ARRAY, (scalars | {int: kinds.INT32})[type(value[0])])
