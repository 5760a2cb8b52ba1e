"""GGUF's blocks against llama.cpp, which writes them, and the gguf package, which reads them."""

import pytest
import torch

from lorakit import kernels
from lorakit.kernels.ops.gguf_blocks import BLOCK_LAYOUTS
from tests import llama

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
}


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_are_those_of_llama_cpp(block_type, rows):
    x = ROWS[rows]
    for name, v in IMPORTANCE.items():
        v = None if v is None else v[: x.shape[1]].contiguous()
        expected = llama.quantize(x, block_type, v)
        assert torch.equal(kernels.quantize_blocks(x, block_type, v), expected), name


@pytest.mark.parametrize("block_type", TYPES)
def test_values_are_those_of_the_gguf_package(block_type):
    """Any bytes are read: a damaged scale may be NaN or infinite."""
    nbytes = BLOCK_LAYOUTS[block_type].nbytes
    data = torch.randint(0, 256, (40, 2 * nbytes), generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[block_type.upper()]
    expected = torch.from_numpy(gguf.dequantize(data.byte().numpy(), kind))
    found = kernels.dequantize_blocks(data.byte(), block_type)
    assert torch.equal(found.nan_to_num(1e30, 2e30, 3e30), expected.nan_to_num(1e30, 2e30, 3e30))
