"""Which block format each tensor of a GGUF file gets: llama.cpp's mixes.

A name such as "q4_k_m" stands for a default format and for the tensors that get more bits: the
head, and of some layers the values and the MLP's second matrix. A file by lorakit is the one that
llama-quantize makes.

A row is whole blocks. Where a row is no multiple of 256, the K formats give way to formats of 32
values: Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0. Such a file is larger than its name says, and
`Mix.falls_back` tells. A row that is no multiple of 32 is stored in fp16.

Norms, biases, all other vectors and the routers of experts are fp32 in any file.

Source of the table: llama.cpp's llama-quant.cpp, read, not copied.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from lorakit.config.errors import LorakitError, nearest, one_of
from lorakit.files.gguf import block_sizes
from lorakit.models.config import ModelConfig


class FileType(NamedTuple):
    """What the name of a quantization stands for."""

    number: int
    """The value of general.file_type."""
    default: str
    """The format of a matrix that no rule gives another."""


FILE_TYPES = {
    "f32": FileType(0, "F32"),
    "f16": FileType(1, "F16"),
    "bf16": FileType(32, "BF16"),
    "q8_0": FileType(7, "Q8_0"),
    "q4_0": FileType(2, "Q4_0"),
    "q4_1": FileType(3, "Q4_1"),
    "q5_0": FileType(8, "Q5_0"),
    "q5_1": FileType(9, "Q5_1"),
    "q4_k_s": FileType(14, "Q4_K"),
    "q4_k_m": FileType(15, "Q4_K"),
    "q5_k_s": FileType(16, "Q5_K"),
    "q5_k_m": FileType(17, "Q5_K"),
    "q6_k": FileType(18, "Q6_K"),
    "iq4_nl": FileType(25, "IQ4_NL"),
    "mxfp4_moe": FileType(38, "MXFP4"),
}
_SHORT = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # as llama-quantize takes them
FORMATS = sorted({file_type.default for file_type in FILE_TYPES.values()})
"""The formats that a tensor may have."""
_NEVER = ("_norm.weight", "ssm_conv1d.weight")  # packed
_DENSE = ("F32", "F16", "BF16")
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that are no multiple of 256


class Mix:
    """The formats of one file's tensors.

    Attributes:
        name: The quantization's name, such as "q4_k_m".
        number: The value of general.file_type.
        falls_back: The format that each tensor has instead of its own, for its rows' sake.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        arch: str,
        *,
        measured: bool = False,
        tensor_types: Mapping[str, str] | None = None,
    ):
        lower = name.lower() if isinstance(name, str) else name
        self.name = _SHORT.get(lower, lower)
        if self.name not in FILE_TYPES:
            hint = nearest(self.name, FILE_TYPES)
            raise LorakitError(f"quantization is {name!r}; choose {one_of([*FILE_TYPES])}{hint}")
        self.number, self._default = FILE_TYPES[self.name]
        self._config, self._arch, self._measured = config, arch, measured
        self._own = [_own_type(pattern, kind) for pattern, kind in (tensor_types or {}).items()]
        self._used: set[str] = set()
        self.falls_back: dict[str, str] = {}

    def kind(self, name: str, shape: tuple[int, ...], *, tied: bool) -> str:
        """Return the format of the tensor called `name` in the file, [..., row].

        `tied` says that the model has no other head than its embedding.
        """
        is_matrix = len(shape) > 1 and name.endswith(".weight")
        if not is_matrix or name.endswith(_NEVER) or "ffn_gate_inp" in name:
            return "F32"
        wanted = self._chosen(name)
        if wanted is None:
            dense = self._default in _DENSE
            wanted = self._default if dense else self._mixed(name, shape[-1], tied)
        kind = _fitting(wanted, shape[-1])
        if kind != wanted:
            self.falls_back[name] = kind
        return kind

    def check_all_used(self) -> None:
        """Raise LorakitError if a pattern of tensor_types has fitted no tensor so far."""
        for pattern, _ in self._own:
            if pattern.pattern not in self._used:
                raise LorakitError(
                    f"tensor_types: {pattern.pattern!r} fits no matrix of the file; its names are "
                    "those of llama.cpp, such as blk.0.ffn_down.weight"
                )

    def _chosen(self, name: str) -> str | None:
        """Return the format of the first of the user's patterns that fits, or None."""
        for pattern, kind in self._own:
            if pattern.search(name):
                self._used.add(pattern.pattern)
                return kind
        return None

    def _mixed(self, name: str, row: int, tied: bool) -> str:
        """Return the format that the mix gives a matrix, whether its rows fit or not."""
        _, _, rest = name.partition("blk.")
        layer, _, inner = rest.partition(".")
        stem = (inner or name).removesuffix(".weight")
        if self.name == "mxfp4_moe":  # for the experts alone, which gpt-oss publishes so
            return self._default if "_exps" in stem else "Q8_0"
        if stem == "output" or (stem == "token_embd" and tied):
            return self._of_head(row)
        if stem == "attn_v":
            return self._of_values(int(layer))
        if stem == "attn_qkv":
            return {"q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}.get(self.name, self._default)
        if stem == "attn_k" and self._config.num_experts == 8:
            return "Q8_0"
        if stem.startswith("ffn_down"):
            return self._of_down(int(layer))
        if stem == "attn_output" and self._config.num_experts == 8:
            return "Q5_K" if self.name in ("q4_k_s", "q4_k_m", "iq4_nl") else self._default
        return self._default

    def _of_head(self, row: int) -> str:
        if row % block_sizes(self._default)[0] or self._default == "Q8_0":
            return "Q8_0"
        return "Q6_K"

    def _of_values(self, layer: int) -> str:
        config, kind = self._config, self._default
        groups = config.num_attention_heads // config.num_key_value_heads
        if self.name == "iq4_nl" and groups >= 4:
            kind = "Q5_K"
        elif self.name in ("q4_k_m", "q5_k_m") and self._gets_more(layer):
            kind = "Q6_K"
        elif self.name == "q4_k_s" and layer < 4:
            kind = "Q5_K"
        grouped = self._arch == "qwen2" or (self._arch == "llama" and groups > 1)
        if kind == "Q4_K" and config.num_hidden_layers == 80 and grouped:  # those of 70B
            kind = "Q5_K"
        return "Q8_0" if config.num_experts == 8 else kind

    def _of_down(self, layer: int) -> str:
        early = layer < self._config.num_hidden_layers // 8
        if self.name in ("q4_k_m", "q5_k_m"):
            return "Q6_K" if self._gets_more(layer) else self._default
        if early and (self.name == "q4_k_s" or (self.name == "iq4_nl" and not self._measured)):
            return "Q5_K"
        if early and self._measured:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}.get(self.name, self._default)
        return self._default

    def _gets_more(self, layer: int) -> bool:
        """Return whether a layer is among the first or last eighth, or every third between."""
        n = self._config.num_hidden_layers
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _own_type(pattern: str, kind: str) -> tuple[re.Pattern[str], str]:
    """Return a pattern and a format that the user chose, checked."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise LorakitError(f"tensor_types: {pattern!r} is no regex ({error})") from None
    if not isinstance(kind, str) or kind.upper() not in FORMATS:
        known = [each.lower() for each in FORMATS]
        raise LorakitError(
            f"tensor_types: {pattern}: {kind!r} is no format; choose {one_of(known)}"
        )
    return compiled, kind.upper()


def _fitting(kind: str, row: int) -> str:
    """Return the format that a tensor has in place of `kind` if its rows are no whole blocks."""
    if row % block_sizes(kind)[0] == 0:
        return kind
    narrow = _NARROW.get(kind, "F16")
    return narrow if row % block_sizes(narrow)[0] == 0 else "F16"
