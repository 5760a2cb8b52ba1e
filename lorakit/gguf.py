"""GGUF files: the header, the tensors as dense values, and the model they describe.

Layout (GGUF 3, little endian): magic, version, counts; key-value pairs; tensor infos (name, dims
innermost first, type, offset); padding; the data of each tensor at its offset. The header is read
here, in one pass over the file's beginning; the `gguf` package, which knows every block format,
turns a tensor's bytes into fp32 values. (Its own reader makes several numpy arrays for each of the
vocabulary's strings: 4 s and 160 MB for a 49,152-token model, against 0.1 s and 15 MB.)

Llama files store the rows of q_proj and k_proj in another order: the two halves of a head are
interleaved, for a rotary embedding that turns neighbours. `_unpermute` restores the halves.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import LorakitError, ModelConfig

# value type -> struct code
SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9

NAMES = {  # GGUF -> Hugging Face, `llama` architecture
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, tuple[tuple[int, ...], Callable]]]:
    """The config, and per Hugging Face tensor name its shape and a function that reads it (fp32).

    Raises LorakitError for a damaged or truncated file, another architecture than llama, a tensor
    type that the gguf package cannot dequantize, or a tensor that lorakit does not know.
    """
    header = read_header(path)
    size = path.stat().st_size
    lengths = {name: _data_length(path, name, info) for name, info in header.tensors.items()}
    for name, info in header.tensors.items():
        if info.offset + lengths[name] > size:
            raise LorakitError(
                f"{path}: the file is cut off: tensor {name} ends at byte "
                f"{info.offset + lengths[name]}, the file at {size}"
            )
    config = _model_config(path, header)
    grouped = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, info in header.tensors.items():
        if name != "rope_freqs.weight":  # the config has read it
            heads = grouped.get(name.split(".")[-2] if "." in name else "")
            read = _reader(path, info, lengths[name], heads)
            tensors[_hf_name(path, name)] = (info.shape, read)
    return config, tensors


def _package():
    try:
        import gguf
    except ImportError:
        raise LorakitError(
            "reading GGUF files needs the gguf package: pip install 'lorakit[gguf]'"
        ) from None
    return gguf


def _data_length(path: Path, name: str, info: TensorInfo) -> int:
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


def _reader(path: Path, info: TensorInfo, length: int, heads: int | None) -> Callable[[], Tensor]:
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
        return tensor if heads is None else _unpermute(tensor, heads)

    return read


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) -> (head, half, pair): weight [heads * D, ...]."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def _hf_name(path: Path, name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    raise LorakitError(f"{path}: tensor {name} belongs to no Llama model")


def _model_config(path: Path, header: Header) -> ModelConfig:
    metadata, tensors = header
    arch = metadata.get("general.architecture")
    if arch != "llama":
        raise LorakitError(f"{path}: architecture {arch!r} is not supported; 'llama' is")
    if metadata.get("llama.expert_count", 0):
        raise LorakitError(f"{path}: mixture-of-experts GGUF files are not supported")

    keys = {
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "head_dim": "llama.attention.key_length",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "llama.context_length",
        "rope_theta": "llama.rope.freq_base",
        "vocab_size": "llama.vocab_size",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    values = {name: metadata[key] for name, key in keys.items() if key in metadata}
    if "vocab_size" not in values and "tokenizer.ggml.tokens" in metadata:
        values["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    values["model_type"] = "llama"
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        factor = metadata.get("llama.rope.scaling.factor", 1.0)
        values["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    if "rope_freqs.weight" in tensors:
        values["rope_scaling"] = _llama3_scaling(path, tensors["rope_freqs.weight"], values)
    config = ModelConfig.from_hf(values, str(path))
    rotated = metadata.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise LorakitError(
            f"{path}: a rotary embedding of {rotated} of {config.head_dim} dimensions "
            "is not supported"
        )
    return config


def _llama3_scaling(path: Path, info: TensorInfo, values: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling is stored as divisors of the frequencies, not as its four parameters.

    Every published model uses 1, 4 and 8192 for the last three; the first is the largest divisor.
    That these four give the stored divisors is checked.
    """
    from .rope import inverse_frequencies

    plain = ModelConfig.from_hf(values, str(path))
    if info.shape != (plain.head_dim // 2,):
        raise LorakitError(
            f"{path}: rope_freqs.weight is {info.shape}, not ({plain.head_dim // 2},)"
        )
    divisors = _reader(path, info, _data_length(path, "rope_freqs.weight", info), None)()
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = ModelConfig.from_hf({**values, "rope_scaling": scaling}, str(path))
    size, cpu = plain.head_dim, torch.device("cpu")
    if not torch.allclose(
        inverse_frequencies(scaled.rope, size, cpu) * divisors,
        inverse_frequencies(plain.rope, size, cpu),
        rtol=1e-4,
    ):
        raise LorakitError(f"{path}: rope_freqs.weight holds a rotary scaling other than Llama 3's")
    return scaling
