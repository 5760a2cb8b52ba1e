"""Tensors in safetensors files: opened without being read, written whole or not at all.

A safetensors file is a JSON header (names, dtypes, shapes, offsets) and the bytes of the tensors.
Opening one reads the header alone. A tensor's values are mapped from the disk when they are asked
for. The safetensors library checks the header's length, every offset and every size against the
file before a value is read.

Nothing here unpickles. A directory that holds something else than a model's safetensors is refused,
and the error says what it is.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.local import atomic, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_REMAP = 16 << 20  # bytes that are read before a file is mapped again

# What a directory may hold in place of safetensors, as patterns, and what that is. {file} stands
# for what the pattern found, {path} for the directory. The first pattern that finds something wins.
_OTHERS = {
    "adapter_config.json": (
        "an adapter: load the model that it was trained on, then the adapter with load_adapter"
    ),
    "global_step*": (
        "a checkpoint of DeepSpeed ({file}), which is pickled: `python zero_to_fp32.py {path} OUT "
        "--safe_serialization`, with the script that lies beside it, writes safetensors"
    ),
    "*mp_rank_*.pt": (
        "a checkpoint of DeepSpeed ({file}), which is pickled: zero_to_fp32.py, in the directory "
        "above, writes safetensors with --safe_serialization"
    ),
    "pytorch_model_fsdp_*": (
        "a checkpoint of FSDP in pieces: `accelerate merge-weights {path}/{file} OUT` writes "
        "safetensors"
    ),
    "*.distcp": (
        "a checkpoint of FSDP in pieces: `accelerate merge-weights {path} OUT` writes safetensors"
    ),
    "pytorch_model_fsdp.bin": (
        "a checkpoint of FSDP ({file}), and pickled weights are not read: "
        '`save_file(torch.load("{file}", weights_only=True), "model.safetensors")`, with save_file '
        "of safetensors.torch, writes safetensors"
    ),
    "*.bin": (
        "{file}, and pickled weights are not read: "
        '`AutoModelForCausalLM.from_pretrained("{path}").save_pretrained("OUT")` of transformers '
        "writes safetensors"
    ),
    "consolidated*": (
        "{file}, in Meta's or Mistral's own format: load the model's files for transformers"
    ),
    "model-*-of-*.safetensors": "shards without an index: fetch it from where the shards are from",
    "*.gguf": "a GGUF file: name it, {path}/{file}",
    "*.npz": "{file}, weights of an old MLX: convert the model again with mlx_lm.convert",
    "*.pt*": "{file}, and pickled weights are not read: save them as safetensors",
    "*.ckpt": "{file}, and pickled weights are not read: save them as safetensors",
}


class LazyTensor(NamedTuple):
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    """The shape that the file's header says."""
    read: Callable[[], Tensor]
    """Reads the values. They may be a view of the file: copy what you keep."""
    read_at: Callable[[int], Tensor] | None = None
    """Reads those at one index of the first dimension; None: all of them have to be read."""
    dtype: str | None = None
    """The dtype as a safetensors header names it, such as "BF16"; None if no header says it."""
    read_rows: Callable[[Tensor], Tensor] | None = None
    """Reads rows by their numbers, int64 [n], and no others; None where `read` maps the file."""

    def at(self, index: int) -> Tensor:
        """Read the values at one index of the first dimension, and no others where that goes."""
        return self.read()[index] if self.read_at is None else self.read_at(index)


def open_directory(path: Path) -> dict[str, LazyTensor]:
    """Open the weights of a Hugging Face directory, which lie in one file or in several shards.

    Raises LorakitError if a file or a tensor is missing, a file is damaged, or the index of the
    shards names a file outside of the directory.
    """
    if (path / WEIGHTS_FILE).exists():
        return open_safetensors(path / WEIGHTS_FILE)
    if not (path / INDEX_FILE).exists():
        what = other_weights(path)
        but = "" if what is None else f", but {what}"
        raise LorakitError(f"{path}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there{but}")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise LorakitError(f"{path / INDEX_FILE}: weight_map, of names to files, is missing")
    for file in weight_map.values():
        if "\0" in file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise LorakitError(
                f"{path / INDEX_FILE}: weight_map names {file!r}, which does not lie in this "
                "directory; shards must lie beside their index"
            )
    shards = {file: open_safetensors(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise LorakitError(
                f"{path / file}: tensor {name}, which {INDEX_FILE} puts here, is missing"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def other_weights(path: Path) -> str | None:
    """Return what a directory holds in place of a model's safetensors, and what to do about it.

    The result is None if nothing of it is known.
    """
    for pattern, what in _OTHERS.items():
        found = sorted(path.glob(pattern))
        if found:
            return what.format(file=found[0].name, path=path)
    return None


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open one safetensors file.

    Raises LorakitError if it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in list(file.keys())}
            said = {n: (tuple(each.get_shape()), each.get_dtype()) for n, each in headers.items()}
    except FileNotFoundError:
        raise LorakitError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise LorakitError(f"{path}: damaged or cut off ({error})") from None
    mapped = _Mapped(path)
    return {
        name: LazyTensor(shape, partial(mapped.read, name), partial(mapped.read, name), dtype)
        for name, (shape, dtype) in said.items()
    }


class _Mapped:
    """A safetensors file that is mapped into memory while it is read.

    Pages that have been read count as this process's memory until their mapping goes. So the file
    is mapped again after every _REMAP bytes. Mapping it again for every tensor would be slow,
    because each time the header is parsed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: Any = None  # a safe_open, whose library has no types
        self.seen = 0

    def read(self, name: str, at: int | None = None) -> Tensor:
        """Return one tensor, a view of the file that keeps its mapping.

        With `at`, return what it holds at this index of its first dimension.
        """
        tensor: Tensor
        try:
            if self.file is None:
                self.file = safe_open(self.path, framework="pt")
            tensor = self.file.get_tensor(name) if at is None else self.file.get_slice(name)[at]
        except (FileNotFoundError, SafetensorError) as error:
            raise LorakitError(f"{self.path}: tensor {name} is there no more ({error})") from None
        self.seen += tensor.nbytes
        if self.seen >= _REMAP:
            self.file, self.seen = None, 0
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which maps the file for itself."""
        return {"path": self.path, "file": None, "seen": 0}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, atomically.

    Raises OSError if the disk is full.
    """
    with atomic(path) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError, whatever the cause
            raise OSError(f"{path}: {error}") from None
