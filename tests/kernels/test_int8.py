"""int8 weights against bitsandbytes and against their mathematics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels

matrices = st.builds(
    lambda rows, columns, seed, exponent, dtype: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        .double()
        .mul(2.0**exponent)
        .clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        .to(dtype)
    ),
    st.integers(1, 30),
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.integers(-150, 130),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def test_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed in range(5):
        w = torch.randn(96, 130, generator=torch.Generator().manual_seed(seed)).half()
        values, scale, _ = functional.int8_vectorwise_quant(w.clone())
        ours = kernels.quantize_int8(w)
        assert torch.equal(ours.values, values)
        assert torch.equal(ours.scale, scale)
        expected = functional.int8_vectorwise_dequant(values, scale)
        assert torch.equal(kernels.dequantize_int8(ours, torch.float32), expected)


@settings(max_examples=80)
@given(matrices)
def test_error_is_at_most_half_a_step(w):
    """|x' - x| <= max_j |x_j| / 254 in every row, and x' is finite."""
    back = kernels.dequantize_int8(kernels.quantize_int8(w), torch.float32)
    assert torch.isfinite(back).all()
    bound = w.float().abs().amax(dim=1, keepdim=True) / 254
    # roundings of fp32, relative ones and, for subnormals, absolute ones; below 127 / FLT_MAX
    # the reciprocal is bounded and the error that of rounding to 0
    small = w.float().abs().amax(dim=1, keepdim=True) < 127 / torch.finfo().max
    slack = torch.where(small, 127 / torch.finfo().max, 1e-44)
    assert ((back - w.float()).abs() <= bound * (1 + 1e-4) + slack).all()


@settings(max_examples=40)
@given(matrices, st.integers(0, 2**31))
def test_rows_are_the_rows(w, seed):
    """dequantize_rows(q, i) = dequantize(q)[i]."""
    q = kernels.quantize_int8(w)
    rows = torch.randint(0, len(w), (3, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kernels.dequantize_rows(q, rows), kernels.dequantize_int8(q)[rows])
    with pytest.raises(IndexError):
        kernels.dequantize_rows(q, torch.tensor([len(w)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_floats(dtype):
    largest = torch.finfo(dtype).max
    w = torch.tensor([[largest, -largest, 1.0], [1.0, 2.0, 3.0]], dtype=dtype)
    back = kernels.dequantize_int8(kernels.quantize_int8(w))
    assert torch.isfinite(back).all()
    # the largest and the row's other values: two fp32 roundings and one of the dtype
    assert (back - w).abs().max() <= 2 * torch.finfo(dtype).eps * largest


def test_zero_rows_and_bad_input():
    q = kernels.quantize_int8(torch.zeros(3, 5))
    assert not kernels.dequantize_int8(q).any()
    assert kernels.quantize_int8(torch.zeros(0, 5)).shape == (0, 5)
    with pytest.raises(ValueError, match="not torch.float32 .5,"):
        kernels.quantize_int8(torch.zeros(5))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            kernels.quantize_int8(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="int8 .N, K."):
        kernels.Int8Tensor(q.values, q.scale[:2], torch.float32)
    assert q.bits_per_parameter == 8 + 32 / 5


def test_files():
    q = kernels.quantize_int8(torch.randn(4, 6).half())
    found = q.tensors("a.weight")
    assert sorted(found) == ["a.SCB", "a.weight", "a.weight_format"]
    again = kernels.Int8Tensor.from_tensors(found, "a.weight")
    assert torch.equal(kernels.dequantize_int8(again), kernels.dequantize_int8(q))
    found["a.weight_format"] += 1
    with pytest.raises(ValueError, match="weight_format 1"):
        kernels.Int8Tensor.from_tensors(found, "a.weight")
