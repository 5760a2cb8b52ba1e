"""Packed weights are the same on the GPU and on the CPU, and so are the values they stand for."""

import pytest
import torch

import lorakit as lk
from lorakit import kernels
from lorakit.kernels.ops.nf4.tensor import BLOCK_SIZES
from tests.gpu.operations import DTYPES, random, same_bits

CPU = torch.device("cpu")


def on_cpu(f):
    with kernels.use_backend("reference"):
        return f()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantize", [kernels.quantize_nf4, kernels.quantize_fp4])
def test_values(quantize, double_quant, block_size, device, size):
    """Bit for bit, in every dtype, of whole blocks and of a last one that is short."""
    for shape in size([(1024, 4096), (77, 1003)], [(2, 512), (3, 341)]):
        w = random(CPU, *shape)
        q = on_cpu(lambda w=w: quantize(w, block_size=block_size, double_quant=double_quant))
        there = q.to(device)
        for dtype in DTYPES:
            expected = on_cpu(lambda q=q, d=dtype: kernels.dequantize_nf4(q, d))
            assert same_bits(kernels.dequantize_nf4(there, dtype).to(CPU), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_packed_bytes(block_size, dtype, device, size):
    """Codes and scales bit for bit; what double quantization makes of the scales nearly so.

    Its offset is the mean of the scales, a sum that torch takes in another order on each device:
    a few fp32 roundings apart, it moves every residue by as much, and a code of a residue that lies
    on the edge between two levels by one.
    """
    w = random(CPU, *size((4096, 4096), (8, 512))).to(dtype)
    for fp4 in (False, True):
        pack = kernels.quantize_fp4 if fp4 else kernels.quantize_nf4
        plain = {"block_size": block_size, "double_quant": False}
        expected = on_cpu(lambda pack=pack, plain=plain: pack(w, **plain))
        found = pack(w.to(device), **plain)
        assert same_bits(found.codes.to(CPU), expected.codes)
        assert same_bits(found.absmax.to(CPU), expected.absmax)
    expected = on_cpu(lambda: kernels.quantize_nf4(w, block_size=block_size))
    found = kernels.quantize_nf4(w.to(device), block_size=block_size).to(CPU)
    assert same_bits(found.codes, expected.codes)
    assert torch.allclose(found.offset, expected.offset, rtol=1e-6, atol=0)
    # rtol of the scales, whose difference from the offset cancels
    assert (found.nested_absmax - expected.nested_absmax).abs().max() <= 1e-6 * found.offset
    apart = (found.absmax.int() - expected.absmax.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 1e-3


def test_rows(device, size):
    V, K = size((32000, 4096), (9, 128))
    q = on_cpu(lambda: kernels.quantize_nf4(random(CPU, V, K)))
    rows = torch.randint(V, (3, 50))
    for dtype in DTYPES:
        expected = on_cpu(lambda d=dtype: kernels.dequantize_rows(q, rows, d))
        found = kernels.dequantize_rows(q.to(device), rows.to(device), dtype)
        assert same_bits(found.to(CPU), expected)


def test_int8(device, size):
    w = random(CPU, *size((4096, 4096), (5, 64)))
    q = on_cpu(lambda: kernels.quantize_int8(w))
    there = kernels.quantize_int8(w.to(device))
    assert same_bits(there.values.to(CPU), q.values)
    assert same_bits(there.scale.to(CPU), q.scale)
    for dtype in DTYPES:
        expected = on_cpu(lambda d=dtype: kernels.dequantize_int8(q, d))
        assert same_bits(kernels.dequantize_int8(there, dtype).to(CPU), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_model_is_packed_alike(double_quant, tiny_dir, device):
    """Loaded onto the GPU, where it is packed, and onto the CPU."""
    quantize = {"quant_type": "nf4", "double_quant": double_quant}
    there = lk.load_model(tiny_dir, dtype="bfloat16", quantize=quantize, device=device)
    here = on_cpu(
        lambda: lk.load_model(tiny_dir, dtype="bfloat16", quantize=quantize, device="cpu")
    )
    expected = dict(here.named_parameters())
    found = dict(there.named_parameters())
    assert found.keys() == expected.keys()
    assert any(p.dtype == torch.uint8 for p in found.values())
    for name, p in found.items():
        assert p.device == device
        if double_quant and name.endswith(("absmax", "offset")):
            continue  # as in test_packed_bytes
        assert same_bits(p.detach().to(CPU), expected[name].detach()), name
