"""A model as a GGUF file, which llama.cpp, Ollama and LM Studio run.

    files or a Decoder  ->  one dense tensor  ->  stored order and offset  ->  blocks  ->  file
        (weights.py)                         (models/gguf_names.py)         (kernels)

All names, shapes and formats are known before a value is read, so the header is written first and
the tensors follow, one at a time. Memory holds one tensor and its blocks. The file appears under
its name when it is whole.

Rows are quantized some at a time, as fp32. The bytes are those of llama.cpp's own quantization, and
the formats those of its mixes (models/gguf_mix.py).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.export.importance import Importance, load_importance
from lorakit.export.metadata import check_said, model_metadata, rotary_tensors
from lorakit.export.vocabulary import (
    copied_tokenizer,
    tokenizer_metadata,
)
from lorakit.export.weights import DenseModel, dense_model
from lorakit.files.gguf import NewTensor, Typed, block_sizes, read_header, write_gguf
from lorakit.files.hub import fetch_adapter, name_of
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.gguf_linear import parted
from lorakit.models.gguf_mix import Mix
from lorakit.models.gguf_names import Dialect, dialect_of, storage, stored_name, stored_shape
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import adapted_tokenizer, brings

_PART = 1 << 24  # values that are quantized at a time, 64 MB of fp32
# What general keys say of a file and its blocks, not of the model in it.
_OF_THE_FILE = {
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.type",
}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was written; it prints as a table."""

    path: Path
    """The file."""
    quantization: str
    """The name of its quantization, such as "q4_k_m"."""
    size: int
    """The size of the file in bytes."""
    formats: dict[str, tuple[int, int]]
    """How many tensors, and how many parameters, have each block format."""
    falls_back: dict[str, str]
    """The format of each tensor whose rows do not fit that of the mix."""

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameters for _, parameters in self.formats.values())

    def __str__(self) -> str:
        total = self.parameters
        bits = 8 * self.size / total
        lines = [
            f"{self.path}: {self.quantization}, {total / 1e6:,.1f} M parameters in "
            f"{self.size / 1e6:,.1f} MB, {bits:.2f} bits each"
        ]
        for kind, (tensors, parameters) in sorted(self.formats.items(), key=lambda it: -it[1][1]):
            of = f"{tensors:>5} {'tensor' if tensors == 1 else 'tensors':<7}"
            lines.append(f"  {kind:<6} {of} {100 * parameters / total:>6.1f} %")
        if self.falls_back:
            count = len(self.falls_back)
            are, their = ("tensor is", "its") if count == 1 else ("tensors are", "their")
            instead = ", ".join(sorted(set(self.falls_back.values())))
            lines.append(
                f"  {count} {are} {instead} and not what {self.quantization} means: {their} rows "
                "are no multiple of its blocks"
            )
        return "\n".join(lines)


def export_gguf(
    model: Decoder | str | Path,
    file: str | Path,
    *,
    quantization: str = "q4_k_m",
    adapter: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    imatrix: Importance | str | Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    name: str | None = None,
    context_length: int | None = None,
) -> GgufFile:
    """Write a model as a GGUF file, for llama.cpp, Ollama or LM Studio.

    Args:
        model: A directory, .gguf file or Hub id, which is read one tensor at a time; or a model in
            memory, with the adapter that is selected in it, if one is.
        file: The file to write. Its directory is made if it is missing.
        quantization: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_s, q4_k_m, q5_k_s, q5_k_m,
            q6_k, iq4_nl or mxfp4_moe. All but the first four mix formats, as llama.cpp does.
        adapter: The directory, .gguf file or Hub id of an adapter to merge into the weights of a
            model in files, in fp32.
        tokenizer: The tokenizer. None takes the adapter's, or else that of the model's files.
        imatrix: What `importance` returned, or a file of it or of llama.cpp's llama-imatrix.
        tensor_types: Regexes of names in the file, such as "ffn_down" -> the block format of the
            matrices that they fit, such as "q8_0". The first that fits decides.
        name: What the file calls the model. None takes the name that a .gguf file has for it, or
            that of its directory.
        context_length: The number of positions that the file states, at most the model's. A model
            whose sliding window llama.cpp would ignore can be written with that window.

    Returns:
        What was written, which prints as a table.

    Raises:
        LorakitError: The model, the adapter or the tokenizer cannot be read, GGUF or llama.cpp has
            no place for something of it, a value is not finite, or an argument is wrong.
        OSError: The disk is full. A file that was there before is as it was.
    """
    file = checked_file(file)
    adapter = None if adapter is None else fetch_adapter(adapter)
    importance = imatrix if isinstance(imatrix, Importance | None) else load_importance(imatrix)
    dense = dense_model(model, adapter)
    dense = dense._replace(tensors=parted(dense.tensors, dense.config))
    arch, dialect = dialect_of(dense.config)
    tied = "lm_head.weight" not in dense.tensors
    check_said(dense.config, arch, dialect, tied, context_length)
    measured = importance is not None
    mix = Mix(quantization, dense.config, arch, measured=measured, tensor_types=tensor_types)
    metadata = {
        **_general(model, dense, name),
        "general.architecture": arch,
        "general.file_type": mix.number,
        **model_metadata(dense.config, arch, dialect, context_length),
        **_tokenizer_metadata(dense, adapter, tokenizer),
    }
    tensors = list(_planned(dense, dialect, mix, importance, tied))
    mix.check_all_used()
    write_gguf(file, metadata, tensors)
    return GgufFile(file, mix.name, file.stat().st_size, count_formats(tensors), mix.falls_back)


def checked_file(file: str | Path) -> Path:
    """Return the path of a file to write, whose directory is there now."""
    file = as_path(file)
    if file.is_dir():
        raise LorakitError(f"{file} is a directory: name a file, such as {file}/model.gguf")
    if file.suffix != ".gguf":  # by which programs know it; and no weights are overwritten
        raise LorakitError(f"{file} does not end in .gguf: name a file, such as {file}/model.gguf")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(f"{file.parent} cannot be made ({error.strerror})") from None
    return file


def count_formats(tensors: Iterable[NewTensor]) -> dict[str, tuple[int, int]]:
    """Return how many tensors, and how many parameters, have each block format."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        count, parameters = found.get(tensor.kind, (0, 0))
        found[tensor.kind] = count + 1, parameters + math.prod(tensor.shape)
    return found


def _name(model: Decoder | str | Path, dense: DenseModel) -> str:
    """Return what a file calls a model that the caller did not name."""
    if isinstance(model, Decoder):
        return "model" if dense.path is None else dense.path.name.removesuffix(".gguf")
    return name_of(model)


def _general(model: Decoder | str | Path, dense: DenseModel, name: str | None) -> dict[str, Any]:
    """Return the general keys: the name, and what a .gguf file says of license and origin."""
    said: dict[str, Any] = {}
    if dense.path is not None and dense.path.suffix == ".gguf":
        header = read_header(dense.path)
        said = {
            key: Typed(value, *header.types[key])
            for key, value in header.metadata.items()
            if key.startswith("general.") and key not in _OF_THE_FILE and value != []
        }
    own = said.pop("general.name", None)
    return {
        "general.type": "model",
        "general.name": name or own or _name(model, dense),
        "general.quantization_version": 2,
        **said,
    }


def _tokenizer_metadata(
    dense: DenseModel, adapter: str | Path | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the keys that describe the tokenizer: the one given, the adapter's or the model's."""
    if tokenizer is not None:
        return tokenizer_metadata(tokenizer, dense.config)
    if dense.path is None:
        raise LorakitError("export: the model was not loaded from a file; give its tokenizer")
    tok = adapted_tokenizer(dense.path, adapter)
    if dense.path.suffix == ".gguf" and not brings(adapter, "tokenizer.json"):
        found = copied_tokenizer(dense.path, tok)
        if len(found["tokenizer.ggml.tokens"].value) == dense.config.vocab_size:
            return found
    return tokenizer_metadata(tok, dense.config)


# ---- tensors ------------------------------------------------------------------------------------


def _planned(
    dense: DenseModel, dialect: Dialect, mix: Mix, importance: Importance | None, tied: bool
) -> Iterator[NewTensor]:
    """Yield the tensors of the file; their data are made when they are asked for."""
    for stored, divisors in rotary_tensors(dense.config).items():
        yield NewTensor(stored, tuple(divisors.shape), "F32", partial(_vector, stored, divisors))
    members: dict[str, dict[int | None, str]] = {}
    for published in dense.tensors:
        stored, expert = stored_name(published, dialect)
        members.setdefault(stored, {})[expert] = published
    for stored, of in members.items():
        names = [of[expert] for expert in sorted(of, key=lambda e: -1 if e is None else e)]
        shape = stored_shape(names[0], dense.tensors[names[0]].shape)
        whole = shape if None in of else (len(of), *shape)
        kind = mix.kind(stored, whole, tied=tied)
        columns = None if importance is None else importance.columns(stored, shape, len(names))
        yield NewTensor(
            stored, whole, kind, partial(_data, dense, dialect, stored, names, kind, columns)
        )


def _data(
    dense: DenseModel,
    dialect: Dialect,
    stored: str,
    names: list[str],
    kind: str,
    columns: Tensor | None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of the tensor `stored`, made of the published tensors `names`.

    They are one tensor, or the same matrix of each expert. `columns` [experts or 1, in] says how
    much each column matters.
    """
    shape = dense.tensors[names[0]].shape
    rows, row = math.prod(shape[:-1]), shape[-1]
    values, size = block_sizes(kind)
    found = np.empty((len(names) * rows, row // values * size), np.uint8)
    for number, published in enumerate(names):
        weight = dense.tensors[published].read()
        change = storage(published, dialect, dense.config)
        weight = (weight if change is None else change(weight)).reshape(rows, row)
        matters = None if columns is None else columns[number]
        step = max(1, _PART // row)
        for start in range(0, rows, step):
            part = weight[start : start + step].float()
            at = number * rows + start
            found[at : at + len(part)] = _blocks(stored, part, kind, matters)
    return found


def _blocks(
    stored: str, part: Tensor, kind: str, matters: Tensor | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of some rows fp32 [n, row] of the tensor `stored`, uint8 [n, bytes]."""
    if kind not in _DTYPES:
        try:
            found = kernels.quantize_blocks(part, kind.lower(), matters)
        except ValueError as error:
            raise LorakitError(f"export: {stored}: {error}") from None
        return found.numpy()
    dense = part.to(_DTYPES[kind]).contiguous()
    if not dense.isfinite().all():
        why = "values beyond fp16; choose bf16" if part.isfinite().all() else "NaN or infinity"
        raise LorakitError(f"export: {stored} holds {why}")
    return dense.view(torch.uint8).numpy()


def _vector(stored: str, vector: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return _blocks(stored, vector[None], "F32", None)
