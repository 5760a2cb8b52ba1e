"""GGUF's blocks against llama.cpp, which writes them, and the gguf package, which reads them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels.ops.gguf_blocks import BLOCK_LAYOUTS
from tests import llama
from tests.instruction_sets import ISAS, on_cpu

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN scales
TYPES = list(BLOCK_LAYOUTS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


N = torch.arange(512)
ROWS = {
    "normal": normal(3, 768),
    "heavy tails": normal(3, 512) / uniform(3, 512).clamp(min=1e-4),
    "zeros": torch.zeros(1, 512),
    "zeros of both signs": torch.copysign(torch.zeros(2, 256), normal(2, 256)),
    "one constant": torch.full((1, 256), 0.37),
    "a negative constant": torch.full((1, 256), -0.37),
    "positive": uniform(2, 768),
    "negative": -uniform(2, 768) - 1,
    "an outlier": torch.where(N == 7, 50.0, 1e-3 * normal(2, 512)),
    "half zeros": normal(2, 512) * (N % 64 < 32),
    "alternating": torch.tensor([1.0, -1.0]).repeat(2, 128),
    "steps": normal(2, 16).repeat_interleave(32, dim=1),
    "large": 65504 * (2 * uniform(2, 512) - 1),
    "sub-blocks of other sizes": normal(2, 512) * 10.0 ** -(N // 32 % 8),
    **{f"1e-{e}": normal(2, 256) * 10.0**-e for e in (7, 12, 15, 20, 30, 35, 38, 39, 42, 45)},
}
IMPORTANCE = {
    "none": None,
    "ones": torch.ones(768),
    "heavy tails": uniform(768) ** 6,
    "half zeros": (torch.arange(768) % 2).float(),
    "blocks of zeros": (torch.arange(768) // 32 % 2).float(),
    "zeros": torch.zeros(768),
    "overflowing": torch.full((768,), 1e38),
}


def backends():
    """The reference, and the C++ for each instruction set, as (name, context)."""
    yield "reference", kernels.use_backend("reference")
    for isa in ISAS:
        yield isa, on_cpu(isa)


def check(x, block_type, importance=None, names=None):
    """Every backend writes the bytes of llama.cpp; the names of the rows are for the message."""
    expected = llama.quantize(x, block_type, importance)
    for name, context in backends():
        with context:
            found = kernels.quantize_blocks(x, block_type, importance)
        wrong = (found != expected).any(dim=1).nonzero().flatten().tolist()
        assert not wrong, (name, [names[i] for i in wrong] if names else wrong)


@pytest.mark.parametrize("columns", [256, 512, 768])
@pytest.mark.parametrize("block_type", TYPES)
def test_bytes_are_those_of_llama_cpp(block_type, columns):
    """The rows of one width are one matrix: what takes time here is to call, and not to compute."""
    of_width = {name: rows for name, rows in ROWS.items() if rows.shape[1] == columns}
    if block_type == "mxfp4":  # llama.cpp wraps the exponents of smaller blocks to large ones
        tiny = torch.finfo(torch.float32).tiny * 4
        of_width = {n: rows for n, rows in of_width.items() if not 0 < rows.abs().max() < tiny}
    names = [name for name, rows in of_width.items() for _ in rows]
    x = torch.cat(list(of_width.values()))
    for v in IMPORTANCE.values():
        check(x, block_type, None if v is None else v[:columns].contiguous(), names)


def test_mxfp4_of_next_to_nothing():
    x = torch.full((1, 32), 1e-42)
    blocks = kernels.quantize_blocks(x, "mxfp4")
    assert not kernels.dequantize_blocks(blocks, "mxfp4").any()


@pytest.mark.parametrize("block_type", TYPES)
def test_values_are_those_of_the_gguf_package(block_type):
    """Any bytes are read: a damaged scale may be NaN or infinite."""
    nbytes = BLOCK_LAYOUTS[block_type].nbytes
    data = torch.randint(0, 256, (40, 2 * nbytes), generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[block_type.upper()]
    expected = torch.from_numpy(gguf.dequantize(data.byte().numpy(), kind))
    found = kernels.dequantize_blocks(data.byte(), block_type)
    assert torch.equal(found.nan_to_num(1e30, 2e30, 3e30), expected.nan_to_num(1e30, 2e30, 3e30))


matrices = st.builds(
    lambda rows, blocks, seed, exponent: normal(rows, 256 * blocks, seed=seed) * 2.0**exponent,
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.integers(-60, 13),
)


@settings(max_examples=20, deadline=None)
@given(matrices, st.sampled_from(TYPES), st.booleans(), st.integers(0, 2**31))
def test_bytes_are_equal_for_random_rows(x, block_type, weighted, seed):
    """quantize(x, v) = ggml_quantize_chunk(x, v) for every shape, scale and importance."""
    check(x, block_type, uniform(x.shape[1], seed=seed) ** 3 if weighted else None)


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]))
def test_the_error_is_at_most_a_step(x, block_type):
    """|x' - x| <= d and its rounding to fp16, where d is the largest value over the codes."""
    blocks = x.view(-1, 32)
    over = {"q8_0": 254, "q4_0": 8, "q5_0": 16, "q4_1": 30, "q5_1": 62}[block_type]
    largest = blocks.abs().amax(dim=1, keepdim=True)
    spread = blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)
    step = (spread if block_type.endswith("_1") else largest) / over
    back = kernels.dequantize_blocks(kernels.quantize_blocks(x, block_type), block_type)
    # d and m in fp16: half a unit of 2^-10 relative, of 2^-24 absolute, d times up to 127
    slack = 2**-10 * largest + 128 * 2.0**-25
    assert ((back.view_as(blocks) - blocks).abs() <= step + slack).all()


def test_relative_errors():
    """The norm of the error over that of normal values: what the formats have, and some."""
    x = normal(16, 1024)
    bounds = {"q8_0": 0.008, "q6_k": 0.02, "q5_k": 0.04, "q4_k": 0.08, "q4_0": 0.12, "iq4_nl": 0.1}
    for block_type, bound in bounds.items():
        back = kernels.dequantize_blocks(kernels.quantize_blocks(x, block_type), block_type)
        assert (back - x).norm() / x.norm() < bound, block_type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_strides(dtype):
    """A matrix has the blocks of its values in fp32, whatever its dtype and strides."""
    x = normal(512, 5).to(dtype).T
    for _, context in backends():
        with context:
            found = kernels.quantize_blocks(x, "q4_k")
            assert torch.equal(found, kernels.quantize_blocks(x.float().contiguous(), "q4_k"))
    dense = kernels.dequantize_blocks(found, "q4_k", dtype)
    assert torch.equal(dense, kernels.dequantize_blocks(found, "q4_k").to(dtype))


def test_empty():
    for shape in ((0, 256), (3, 0)):
        blocks = kernels.quantize_blocks(torch.zeros(shape), "q4_k")
        assert blocks.shape == (shape[0], shape[1] // 256 * 144)
        assert kernels.dequantize_blocks(blocks, "q4_k").shape == shape


def test_bad_input():
    x, v = torch.ones(2, 256), torch.ones(256)
    for bad in (math.nan, math.inf, 1e5):
        with pytest.raises(ValueError, match="scales are in float16"):
            kernels.quantize_blocks(x * bad, "q4_0")
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="NaN, infinite or negative"):
            kernels.quantize_blocks(x, "q4_0", v * bad)
    with pytest.raises(ValueError, match="no multiple of q4_k's block of 256"):
        kernels.quantize_blocks(x[:, :64], "q4_k")
    with pytest.raises(ValueError, match="unknown block type 'q3_k': choose one of q8_0,"):
        kernels.quantize_blocks(x, "q3_k")
    with pytest.raises(ValueError, match="not torch.float64"):
        kernels.quantize_blocks(x.double(), "q4_0")
    with pytest.raises(ValueError, match="float32 .256. there but torch.float64"):
        kernels.quantize_blocks(x, "q4_0", v.double())
    with pytest.raises(ValueError, match="a multiple of 144"):
        kernels.dequantize_blocks(torch.zeros(2, 143, dtype=torch.uint8), "q4_k")
