"""NF4 against bitsandbytes, against its own mathematics, and the compiled kernels against torch."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import kernels
from lorakit.kernels import dispatch, nf4

CPU = torch.device("cpu")
HAS_LIBRARY = dispatch.library() is not None
HALF_WIDEST_GAP = max(b - a for a, b in zip(nf4.NF4_LEVELS, nf4.NF4_LEVELS[1:], strict=False)) / 2

tensors = st.builds(
    lambda n, seed, exponent, zeros: (
        torch.randn(n, generator=torch.Generator().manual_seed(seed))
        .mul(2.0**exponent)
        .masked_fill(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < zeros, 0.0)
    ),
    st.integers(1, 5000),
    st.integers(0, 2**31),
    st.integers(-60, 60),
    st.sampled_from([0.0, 0.5, 1.0]),
)
block_sizes = st.sampled_from(nf4.BLOCK_SIZES)


def test_published_constants():
    # the thresholds and the checksum are bitsandbytes' own
    published = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
        -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    assert torch.equal(nf4.thresholds(CPU), torch.tensor(published))
    digest = hashlib.sha256(nf4.dynamic_map(CPU).numpy().tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096,), (64, 192), (96, 4096), (3, 5, 4096)])
def test_equals_bitsandbytes(shape, dtype, block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    if math.prod(shape) % block_size:
        pytest.skip("bitsandbytes divides in a short last block, where the format multiplies")
    torch.manual_seed(len(shape) + block_size)
    w = torch.randn(shape).to(dtype)

    theirs, state = functional.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    ours = kernels.quantize_nf4(w, block_size=block_size, double_quant=False)
    assert torch.equal(ours.codes, theirs.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    if shape[-1] % block_size == 0:  # elsewhere its AVX-512 kernel reads the wrong scales
        expected = functional.dequantize_4bit(theirs, state)
        assert torch.equal(kernels.dequantize_nf4(ours), expected.view(shape))


def test_double_quantization_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    _, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = kernels.quantize_nf4(w)
    # the offset is a mean: summation order may differ in the last bits
    assert abs(ours.offset - state.offset) < 1e-6
    assert torch.allclose(ours.nested_absmax, state.state2.absmax, rtol=1e-5)
    # bitsandbytes' CPU code finds the level by a table of 65,536 bins: at most one beside it
    difference = (ours.absmax.int() - state.absmax.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@settings(max_examples=60)
@given(tensors, block_sizes)
def test_error_is_at_most_half_the_widest_gap_times_absmax(w, block_size):
    """|x' - x| <= absmax * max_i (level[i+1] - level[i]) / 2, per block."""
    q = kernels.quantize_nf4(w, block_size=block_size, double_quant=False)
    back = kernels.dequantize_nf4(q)
    bound = q.absmax.repeat_interleave(block_size)[: len(w)] * HALF_WIDEST_GAP
    # two fp32 roundings, of x / absmax and of level * absmax, may add 2^-23 of absmax
    assert ((back - w).abs() <= bound * (1 + 2**-20)).all()


@settings(max_examples=60)
@given(tensors, block_sizes)
def test_quantizing_the_dequantized_tensor_changes_no_code(w, block_size):
    """quantize(dequantize(quantize(w))) = quantize(w), scales included, if they are fp32."""
    q = kernels.quantize_nf4(w, block_size=block_size, double_quant=False)
    again = kernels.quantize_nf4(
        kernels.dequantize_nf4(q), block_size=block_size, double_quant=False
    )
    # a block whose largest value is negative keeps it: the level -1 is exact; so is +1
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.absmax, q.absmax)


@settings(max_examples=40)
@given(tensors, block_sizes)
def test_double_quantization_moves_absmax_by_at_most_a_level_gap(w, block_size):
    """|absmax' - absmax| <= nested_absmax * (widest gap of the dynamic map) / 2."""
    single = kernels.quantize_nf4(w, block_size=block_size, double_quant=False)
    double = kernels.quantize_nf4(w, block_size=block_size)
    assert torch.equal(single.codes, double.codes)
    values = nf4.reference.dequantize_absmax(
        double.absmax, double.nested_absmax, double.offset, nf4.dynamic_map(CPU), nf4.NESTED_BLOCK
    )
    gap = nf4.dynamic_map(CPU).diff().max() / 2
    bound = double.nested_absmax.repeat_interleave(256)[: len(values)] * gap
    slack = 1e-6 * single.absmax.max()  # fp32 sums with the offset
    assert ((values - single.absmax).abs() <= bound + slack).all()


@pytest.mark.skipif(not HAS_LIBRARY, reason="the CPU library was not built")
@settings(max_examples=80)
@given(tensors, block_sizes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_cpu_kernels_equal_the_reference_bit_for_bit(w, block_size, dtype):
    w = w.clamp(-60000, 60000).to(dtype)
    with kernels.use_backend("cpu"):
        ours = kernels.quantize_nf4(w, block_size=block_size)
    with kernels.use_backend("reference"):
        truth = kernels.quantize_nf4(w, block_size=block_size)
    assert torch.equal(ours.codes, truth.codes)
    assert torch.equal(ours.absmax, truth.absmax)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        with kernels.use_backend("cpu"):
            ours_dense = kernels.dequantize_nf4(truth, out)
        with kernels.use_backend("reference"):
            assert torch.equal(ours_dense, kernels.dequantize_nf4(truth, out))


@pytest.mark.skipif(not HAS_LIBRARY, reason="the CPU library was not built")
def test_every_instruction_set_gives_the_same_bits():
    torch.manual_seed(0)
    w = torch.randn(100_003)
    truth = kernels.quantize_nf4(w, block_size=64, double_quant=False)
    table = nf4.levels(CPU)
    for isa in {"scalar", dispatch.library().lk_best_isa().decode()}:
        for op, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            pointer, count = nf4._POINTER, nf4._INT64
            signature = (pointer, pointer, pointer, pointer, count, count)
            run = dispatch.function(f"nf4_dequantize_{op}", *signature, isa_name=isa)
            out = torch.full((len(w) + 64,), 7.0, dtype=dtype)  # a guard zone behind the output
            run(
                truth.codes.data_ptr(),
                table.data_ptr(),
                truth.absmax.data_ptr(),
                out.data_ptr(),
                len(w),
                64,
            )
            with kernels.use_backend("reference"):
                assert torch.equal(out[: len(w)], kernels.dequantize_nf4(truth, dtype)), (isa, op)
            assert (out[len(w) :] == 7).all()


def test_shapes_strides_and_empty():
    torch.manual_seed(0)
    dense = torch.randn(3, 4, 5, 7)
    strided = [torch.randn(64, 48).t(), torch.randn(256)[::2], dense[:, :1], dense[..., 3]]
    expanded = torch.tensor([1.5]).expand(4096)
    for w in (dense, torch.randn(1), torch.randn(0, 5), expanded, *strided):
        q = kernels.quantize_nf4(w, block_size=32, double_quant=False)
        back = kernels.dequantize_nf4(q)
        assert back.shape == w.shape
        same = kernels.quantize_nf4(w.contiguous(), block_size=32, double_quant=False)
        assert torch.equal(q.codes, same.codes)


def test_zero_blocks_stay_zero():
    q = kernels.quantize_nf4(torch.zeros(130), double_quant=False)
    assert (q.codes == 0x77).all()
    assert (kernels.dequantize_nf4(q) == 0).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_per_parameter(double_quant):
    q = kernels.quantize_nf4(torch.randn(1024, 1024), double_quant=double_quant)
    scales = 8 / 64 + 32 / (64 * 256) if double_quant else 32 / 64
    assert q.bits_per_parameter == pytest.approx(4 + scales, abs=1e-4)  # + one offset
    assert "1024" in repr(q)
    assert "bits per parameter" in repr(q)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="block_size is 48"):
        kernels.quantize_nf4(torch.randn(64), block_size=48)
    with pytest.raises(ValueError, match="not torch.int64"):
        kernels.quantize_nf4(torch.ones(64, dtype=torch.int64))
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.randn(200)
        w[77] = bad
        for backend in ("reference", "cpu") if HAS_LIBRARY else ("reference",):
            with kernels.use_backend(backend), pytest.raises(ValueError, match="NaN or infinite"):
                kernels.quantize_nf4(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_linear_is_the_dense_product(dtype):
    torch.manual_seed(0)
    q = kernels.quantize_nf4(torch.randn(24, 40).to(dtype))
    weight = kernels.dequantize_nf4(q, dtype)
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 24, dtype=dtype)

    y = kernels.nf4_linear(x, q, bias)
    truth = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(y, truth)  # the same product of the same numbers
    ours = torch.autograd.grad(y, (x, bias), grad)
    theirs = torch.autograd.grad(truth, (x, bias), grad)
    # sums in another order: a few roundings of the dtype
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_nf4_linear_keeps_no_dense_weight():
    saved = []
    q = kernels.quantize_nf4(torch.randn(64, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.nf4_linear(x, q)
    assert sum(t.numel() for t in saved) == 0


def test_use_backend():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), kernels.use_backend("cuda"):
        pass
    with pytest.raises(RuntimeError, match="triton"), kernels.use_backend("triton"):
        pass


def test_without_the_library_every_op_runs_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "LIBRARY", "missing.so")
    dispatch.library.cache_clear()
    try:
        for _ in range(3):
            q = kernels.quantize_nf4(torch.randn(64))
            kernels.dequantize_nf4(q)
        assert len(caplog.messages) == 1
        assert "reference" in caplog.messages[0]
        with pytest.raises(RuntimeError, match="not built"), kernels.use_backend("cpu"):
            pass
    finally:
        dispatch.library.cache_clear()
