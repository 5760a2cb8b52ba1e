"""Tensors in files: safetensors, opened without being read, written whole or not at all.

A tensor that bitsandbytes packed lies in a file as several. They are told by what lies beside them,
not by a name or the config: "dynamic" checkpoints pack some layers and leave others in 16 bits.
`fold_packed` makes one of each such group.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.files.local import atomic, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REMAP = 16 << 20  # bytes


class LazyTensor(NamedTuple):
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor | kernels.Packed]
    packed: QuantConfig | None = None  # how it is stored, if packed

    def read_dense(self) -> Tensor:
        """Return the values of a tensor that is not packed."""
        values = self.read()
        assert isinstance(values, Tensor), "a packed tensor was read as a dense one"
        return values


def open_directory(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face directory, in one file or sharded. Raises LorakitError if
    something is missing or damaged.
    """
    if (path / WEIGHTS_FILE).exists():
        return open_safetensors(path / WEIGHTS_FILE)
    if not (path / INDEX_FILE).exists():
        raise LorakitError(
            f"{path}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there "
            "(pickled weights are not read)"
        )
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise LorakitError(f"{path / INDEX_FILE}: weight_map, of names to files, is missing")
    shards = {file: open_safetensors(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise LorakitError(
                f"{path / file}: tensor {name}, which {INDEX_FILE} puts here, is missing"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file. Raises LorakitError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except FileNotFoundError:
        raise LorakitError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise LorakitError(f"{path}: damaged or cut off ({error})") from None
    mapped = _Mapped(path)
    return {name: LazyTensor(shape, partial(mapped.read, name)) for name, shape in shapes.items()}


class _Mapped:
    """A safetensors file that is mapped while it is read. The pages that have been read count as
    this process's memory until the mapping goes, so it is made anew after every REMAP bytes; not
    for every tensor, because the header is parsed each time.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.seen = path, None, 0

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the file, which keeps its mapping."""
        try:
            if self.file is None:
                self.file = safe_open(self.path, framework="pt")
            tensor = self.file.get_tensor(name)
        except (FileNotFoundError, SafetensorError) as error:
            raise LorakitError(f"{self.path}: tensor {name} is there no more ({error})") from None
        self.seen += tensor.nbytes
        if self.seen >= REMAP:
            self.file, self.seen = None, 0
        return tensor

    def __getstate__(self) -> dict:
        return {"path": self.path, "file": None, "seen": 0}  # a copy maps for itself


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, atomically. Raises OSError, as of a full disk."""
    with atomic(path) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError, whatever the cause
            raise OSError(f"{path}: {error}") from None
