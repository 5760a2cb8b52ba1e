"""The mixes: which block format each tensor gets, against published files."""

from collections import Counter

import gguf
import pytest

import lorakit as lk
from lorakit.cli.export import TYPES
from lorakit.files.gguf import block_sizes, read_header
from lorakit.models.gguf import read_gguf
from lorakit.models.gguf_mix import FILE_TYPES, Mix

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}


def config(**sizes):
    common = {"model_type": "llama", "vocab_size": 128256, "head_dim": 128}
    heads = {"num_attention_heads": sizes["hidden_size"] // 128, "num_key_value_heads": 8}
    return lk.ModelConfig(**{**common, **heads, **sizes})


def kinds(mix, sizes):
    """How many tensors of an untied Llama have each format."""
    h, m, kv = sizes["hidden_size"], sizes["intermediate_size"], 1024
    layer = {"attn_norm": (h,), "attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h)}
    layer |= {"attn_output": (h, h), "ffn_norm": (h,), "ffn_gate": (m, h), "ffn_up": (m, h)}
    layer |= {"ffn_down": (h, m)}
    shapes = {"token_embd": (128256, h), "output_norm": (h,), "output": (128256, h)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return Counter(mix.kind(f"{name}.weight", shape, tied=False) for name, shape in shapes.items())


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [  # as llama.cpp prints them when it loads the published files
        ("q4_k_m", LLAMA_8B, {"F32": 65, "Q4_K": 193, "Q6_K": 33}),
        ("q5_k_m", LLAMA_8B, {"F32": 65, "Q5_K": 193, "Q6_K": 33}),
        ("q4_k_s", LLAMA_8B, {"F32": 65, "Q4_K": 217, "Q5_K": 8, "Q6_K": 1}),
        ("q6_k", LLAMA_8B, {"F32": 65, "Q6_K": 226}),
        ("q8_0", LLAMA_8B, {"F32": 65, "Q8_0": 226}),
        ("q4_0", LLAMA_8B, {"F32": 65, "Q4_0": 225, "Q6_K": 1}),
        ("q4_k_m", LLAMA_70B, {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}),
    ],
)
def test_the_counts_are_those_of_published_llamas(name, sizes, expected):
    assert kinds(Mix(name, config(**sizes), "llama"), sizes) == expected


def test_the_formats_are_those_of_the_published_smollm2(smollm2):
    """It is tied, and its rows of 576 are no multiple of 256."""
    header, (model, _) = read_header(smollm2), read_gguf(smollm2)
    mix = Mix("q4_1", model, "llama")
    assert mix.number == header.metadata["general.file_type"]
    for name, info in header.tensors.items():
        kind = gguf.GGMLQuantizationType[mix.kind(name, info.shape, tied=True)]
        assert kind == info.kind, name


def test_the_counts_are_those_of_the_published_phi_3_mini():
    """Its queries, keys and values are one matrix, its gate and up another."""
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
    of_phi = {"model_type": "phi3", "head_dim": 96, "num_attention_heads": 32}
    mix = Mix("q4_k_m", config(**sizes, **of_phi, num_key_value_heads=32), "phi3")
    layer = {"attn_norm": (3072,), "attn_qkv": (9216, 3072), "attn_output": (3072, 3072)}
    layer |= {"ffn_norm": (3072,), "ffn_up": (16384, 3072), "ffn_down": (3072, 8192)}
    shapes = {"token_embd": (32064, 3072), "output_norm": (3072,), "output": (32064, 3072)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    found = Counter(mix.kind(f"{name}.weight", it, tied=False) for name, it in shapes.items())
    assert found == {"F32": 65, "Q4_K": 81, "Q5_K": 32, "Q6_K": 17}  # as llama.cpp prints them


def test_rows_that_do_not_fit_fall_back():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3}
    mix = Mix("q4_k_m", config(**sizes), "llama")
    assert mix.kind("blk.5.attn_q.weight", (576, 576), tied=True) == "Q5_0"
    assert mix.kind("blk.0.attn_v.weight", (192, 576), tied=True) == "Q8_0"  # for Q6_K
    assert mix.kind("token_embd.weight", (49152, 576), tied=True) == "Q8_0"
    assert mix.kind("blk.5.ffn_down.weight", (576, 1536), tied=True) == "Q6_K"
    assert mix.kind("blk.6.ffn_down.weight", (576, 1536), tied=True) == "Q4_K"
    assert mix.kind("blk.5.attn_output.weight", (576, 100), tied=True) == "F16"
    assert sorted(mix.falls_back) == [
        "blk.0.attn_v.weight",
        "blk.5.attn_output.weight",
        "blk.5.attn_q.weight",
    ]


def test_an_importance_matrix_changes_the_first_layers():
    for name, plain, measured in [("q4_0", "Q4_0", "Q4_1"), ("iq4_nl", "Q5_K", "IQ4_NL")]:
        for has, kind in [(False, plain), (True, measured)]:
            mix = Mix(name, config(**LLAMA_8B), "llama", measured=has)
            assert mix.kind("blk.3.ffn_down.weight", (4096, 14336), tied=False) == kind


def test_the_first_pattern_that_fits_decides():
    own = {r"blk\.0\.": "q6_k", "ffn_down": "q8_0"}
    mix = Mix("q4_k_m", config(**LLAMA_8B), "llama", tensor_types=own)
    assert mix.kind("blk.0.ffn_down.weight", (4096, 14336), tied=False) == "Q6_K"
    assert mix.kind("blk.1.ffn_down.weight", (4096, 14336), tied=False) == "Q8_0"
    assert mix.kind("blk.1.ffn_norm.weight", (4096,), tied=False) == "F32"
    mix.check_all_used()


def test_numbers_of_file_types_are_llama_cpps():
    for name, (number, default) in FILE_TYPES.items():
        mostly = "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"
        assert gguf.LlamaFileType[mostly] == number
        assert block_sizes(default)


def test_the_command_line_has_all_types():
    assert list(FILE_TYPES) == TYPES
