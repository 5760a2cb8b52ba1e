"""NF4 and FP4 against bitsandbytes, against their own mathematics, and the backends against each
other.
"""

import copy
import dataclasses
import gc
import hashlib
import json
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lorakit import kernels
from lorakit.kernels import dispatch
from lorakit.kernels.ops import nf4
from lorakit.kernels.ops.nf4.tensor import BLOCK_SIZES
from tests.instruction_sets import ISAS, on_cpu

CPU = torch.device("cpu")
HAS_LIBRARY = dispatch.library() is not None
QUANTIZE = {"nf4": kernels.quantize_nf4, "fp4": kernels.quantize_fp4}
HALF_WIDEST_GAP = {
    kind: max(b - a for a, b in pairwise(sorted(levels))) / 2 for kind, levels in nf4.LEVELS.items()
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where the reciprocal of every absmax, and what is made of it, is a normal number
NORMAL = (-80, 80)


def normal(n, seed, exponent, zeros, dtype=torch.float32):
    """Normal values times 2^exponent, within the finite range of `dtype`; some zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator, dtype=torch.float64) * 2.0**exponent
    w[torch.rand(n, generator=generator) < zeros] = 0
    largest = torch.finfo(dtype).max
    return w.clamp(-largest, largest).to(dtype)


def tensors(exponents=NORMAL, dtypes=(torch.float32,)):
    return st.builds(
        normal,
        st.integers(1, 5000),
        st.integers(0, 2**31),
        st.integers(*exponents),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from(dtypes),
    )


block_sizes = st.sampled_from(BLOCK_SIZES)
kinds = st.sampled_from(["nf4", "fp4"])


def same(a: kernels.NF4Tensor, b: kernels.NF4Tensor) -> bool:
    parts = [(a.codes, b.codes), (a.absmax, b.absmax)]
    if a.double_quant:
        parts += [(a.nested_absmax, b.nested_absmax), (a.offset, b.offset)]
    facts = [(q.shape, q.block_size, q.dtype, q.quant_type, q.double_quant) for q in (a, b)]
    return facts[0] == facts[1] and all(torch.equal(x, y) for x, y in parts)


# ---- the constants ------------------------------------------------------------------------------


def test_published_constants():
    # the thresholds and the checksum are bitsandbytes' own
    published = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
        -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    assert torch.equal(nf4.thresholds("nf4", CPU), torch.tensor(published))
    digest = hashlib.sha256(nf4.dynamic_map(CPU).numpy().tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.get_4bit_type(kind, device="cpu")
    assert torch.equal(nf4.levels(kind, CPU), expected)


# ---- bitsandbytes -------------------------------------------------------------------------------


def dequantize_in_torch(packed, state):
    """bitsandbytes' plain-torch dequantization: its AVX-512 kernel reads the scales of other blocks
    where the row length is no multiple of the block size.
    """
    ops = pytest.importorskip("bitsandbytes.backends.default.ops")
    compute = ops._dequantize_4bit_compute.__wrapped__  # without torch.compile around it
    absmax = state.absmax
    if state.nested:
        nested = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * nested + state.offset
    return compute(packed.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096,), (64, 192), (96, 4096), (3, 5, 4096), (2, 2, 32, 64)])
def test_equals_bitsandbytes(shape, dtype, block_size, kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed in range(3):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        packed, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=kind)
        ours = QUANTIZE[kind](w, block_size=block_size, double_quant=False)
        # a short last block bitsandbytes divides by its absmax, where all others, and its CUDA
        # kernel all of them, are multiplied by the reciprocal
        whole = w.numel() // block_size * block_size
        assert torch.equal(ours.codes[: whole // 2], packed.view(-1)[: whole // 2])
        assert torch.equal(ours.absmax, state.absmax)
        theirs = kernels.NF4Tensor(
            packed.view(-1), state.absmax, None, None, shape, block_size, dtype, kind
        )
        expected = dequantize_in_torch(packed, state)
        assert torch.equal(kernels.dequantize_nf4(theirs), expected.view(shape))


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"),
    [(64, 96, 64), (64, 160, 64), (64, 192, 128), (16, 4800, 128), (32, 1536, 1024), (33, 66, 64)],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_that_are_no_multiple_of_the_block_size(rows, columns, block_size, kind):
    """The AVX-512 kernel of bitsandbytes is off there by a relative error of 0.22 to 0.28 (NF4)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=kind)
    ours = QUANTIZE[kind](w, block_size=block_size, double_quant=False)
    dense = kernels.dequantize_nf4(ours)
    whole = w.numel() // block_size * block_size
    expected = dequantize_in_torch(packed, state)
    assert torch.equal(dense.view(-1)[:whole], expected.view(-1)[:whole])
    # what the table of docs/quantization.md has for normal values, and a tenth more
    bound = {"nf4": 0.115, "fp4": 0.16}[kind]
    assert (dense - w).norm() / w.norm() < bound


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_double_quantization_equals_bitsandbytes(kind, block_size, differences):
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed in range(4):
        w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
        packed, state = functional.quantize_4bit(
            w, blocksize=block_size, quant_type=kind, compress_statistics=True
        )
        ours = QUANTIZE[kind](w, block_size=block_size)
        assert torch.equal(ours.codes, packed.view(-1))
        # the offset is a mean: the order of summation may differ in the last bits
        assert abs(ours.offset - state.offset) < 1e-6
        assert torch.allclose(ours.nested_absmax, state.state2.absmax, rtol=1e-5)
        # bitsandbytes' CPU code finds the level by a table of 65,536 bins over [-1, 1]: the one
        # beside the nearest, or around 0, where a bin holds several, one of its bin
        difference = (ours.absmax.int() - state.absmax.int()).abs()
        table = nf4.dynamic_map(CPU)
        apart = (table[ours.absmax.int()] - table[state.absmax.int()]).abs()
        assert ((difference <= 1) | (apart <= 2 / 65536)).all()
        share = (difference > 0).float().mean().item()
        assert share < 0.01
        differences("bitsandbytes", "scale codes that differ (share)", share)
        # with its codes and scales our reading is its reading
        theirs = kernels.NF4Tensor(
            packed.view(-1), state.absmax, state.state2.absmax, state.offset, tuple(w.shape),
            block_size, w.dtype, kind,
        )  # fmt: skip
        assert torch.equal(kernels.dequantize_nf4(theirs), dequantize_in_torch(packed, state))


def test_rows_that_are_packed_in_parts_get_the_same_bits(monkeypatch):
    """A scale belongs to its block, and the blocks of scales are cut after all parts are there."""
    w = torch.randn(70, 512)
    whole = nf4.quantize_nf4(w)
    monkeypatch.setattr(nf4, "PART", 16 * 512)
    assert [len(part) for part in nf4._parts(w, 64, torch.device("meta"))] == [16] * 4 + [6]
    assert len(nf4._parts(w, 64, w.device)) == 1
    monkeypatch.setattr(nf4, "_parts", lambda w, block_size, device: w.split(16))
    found = nf4.quantize_nf4(w)
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


def test_scale_codes_are_the_nearest():
    """|map[code] - x| = min_i |map[i] - x|, x the scaled residue, in fp64."""
    absmax = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.1
    table, offset = nf4.dynamic_map(CPU), nf4.reference.mean_absmax(absmax)
    options = offset, nf4.middles(CPU), nf4.ABSMAX_FLOOR
    codes, nested = nf4.reference.quantize_absmax(absmax, *options)
    residue = (absmax - offset).double()
    scaled = residue / nested.double().repeat_interleave(256)[:2000]
    distance = (scaled[:, None] - table.double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # the product with the fp32 reciprocal may be off by two roundings where two levels are as near
    assert (chosen <= distance.min(dim=1).values + 2**-22).all()


# ---- the mathematics ----------------------------------------------------------------------------


@settings(max_examples=60)
@given(tensors(), block_sizes, kinds)
def test_error_is_at_most_half_the_widest_gap_times_absmax(w, block_size, kind):
    """|x' - x| <= absmax * max_i (level[i+1] - level[i]) / 2, per block."""
    q = QUANTIZE[kind](w, block_size=block_size, double_quant=False)
    back = kernels.dequantize_nf4(q)
    bound = q.absmax.repeat_interleave(block_size)[: len(w)] * HALF_WIDEST_GAP[kind]
    # two fp32 roundings, of x / absmax and of level * absmax, may add 2^-23 of absmax
    assert ((back - w).abs() <= bound * (1 + 2**-20)).all()


@settings(max_examples=60)
@given(tensors(), block_sizes, kinds)
def test_quantizing_the_dequantized_tensor_changes_nothing(w, block_size, kind):
    """quantize(dequantize(q)) = q for q = quantize(w) in fp32: codes and scales (of FP4, which has
    two zeros, scales and values).
    """
    q = QUANTIZE[kind](w, block_size=block_size, double_quant=False)
    dense = kernels.dequantize_nf4(q)
    again = QUANTIZE[kind](dense, block_size=block_size, double_quant=False)
    # a block whose largest value is negative keeps it: the level -1 is exact; so is +1
    assert torch.equal(again.absmax, q.absmax)
    assert torch.equal(kernels.dequantize_nf4(again), dense)
    if kind == "nf4":
        assert torch.equal(again.codes, q.codes)


@settings(max_examples=60)
@given(tensors((-40, 40)), block_sizes, kinds, st.integers(-40, 40), st.booleans())
def test_scaling_by_a_power_of_two_commutes(w, block_size, kind, k, search):
    """quantize(2^k w) has the codes of quantize(w) and 2^k times its scales."""
    options = {"block_size": block_size, "double_quant": False, "search_scales": search}
    q, scaled = QUANTIZE[kind](w, **options), QUANTIZE[kind](w * 2.0**k, **options)
    assert torch.equal(scaled.codes, q.codes)
    assert torch.equal(scaled.absmax, q.absmax * 2.0**k)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(0, 2**31), block_sizes, kinds, st.booleans())
def test_permuting_blocks_commutes(count, seed, block_size, kind, search):
    """quantize(P w) = P quantize(w) for a permutation P of whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(count, block_size, generator=generator)
    order = torch.randperm(count, generator=generator)
    options = {"block_size": block_size, "double_quant": False, "search_scales": search}
    q, permuted = QUANTIZE[kind](w, **options), QUANTIZE[kind](w[order], **options)
    assert torch.equal(permuted.codes.view(count, -1), q.codes.view(count, -1)[order])
    assert torch.equal(permuted.absmax, q.absmax[order])


@settings(max_examples=60)
@given(tensors((-120, 130), DTYPES), block_sizes, kinds)
def test_the_absmax_element_is_exact(w, block_size, kind):
    """x' = x where |x| = absmax, without double quantization and from 1e-38 on, below which absmax
    divides as if it were that.
    """
    q = QUANTIZE[kind](w, block_size=block_size, double_quant=False)
    back = kernels.dequantize_nf4(q)
    absmax = q.absmax.repeat_interleave(block_size)[: len(w)]
    largest = (w.abs() == absmax) & (absmax >= nf4.ABSMAX_FLOOR)
    assert torch.equal(back[largest], w[largest])


@settings(max_examples=100)
@given(
    tensors((-150, 130), DTYPES),
    block_sizes,
    kinds,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["reference", "cpu"] if HAS_LIBRARY else ["reference"]),
)
def test_finite_in_finite_out(w, block_size, kind, double_quant, search, backend):
    """|x| < inf implies |x'| < inf, from the subnormals to the largest floats."""
    options = {"double_quant": double_quant, "search_scales": search}
    with kernels.use_backend(backend):
        q = QUANTIZE[kind](w, block_size=block_size, **options)
        assert torch.isfinite(kernels.dequantize_nf4(q)).all()
    scales = q.nested_absmax if double_quant else q.absmax
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
def test_the_largest_floats_in_some_blocks(dtype, search):
    largest = torch.finfo(dtype).max
    w = torch.randn(512, 64).to(dtype)
    w[::3, 5], w[1::3, 7] = largest, -largest
    q = kernels.quantize_nf4(w, search_scales=search)
    assert torch.isfinite(q.offset)
    assert torch.isfinite(kernels.dequantize_nf4(q)).all()


@settings(max_examples=40)
@given(tensors(), block_sizes)
def test_double_quantization_moves_absmax_by_at_most_a_level_gap(w, block_size):
    """|absmax' - absmax| <= nested_absmax * (widest gap of the dynamic map) / 2."""
    single = kernels.quantize_nf4(w, block_size=block_size, double_quant=False)
    double = kernels.quantize_nf4(w, block_size=block_size)
    assert torch.equal(single.codes, double.codes)
    values = nf4.block_scales(double)
    gap = nf4.dynamic_map(CPU).diff().max() / 2
    bound = double.nested_absmax.repeat_interleave(256)[: len(values)] * gap
    slack = 1e-6 * single.absmax.max()  # fp32 sums with the offset
    assert ((values - single.absmax).abs() <= bound + slack).all()


@settings(max_examples=40)
@given(tensors(), block_sizes, kinds)
def test_searched_scales_lower_the_squared_error_of_every_block(w, block_size, kind):
    """sum (x' - x)^2 over a block with the searched scale <= the same with absmax."""
    errors = []
    for search in (True, False):
        q = QUANTIZE[kind](w, block_size=block_size, double_quant=False, search_scales=search)
        off = (kernels.dequantize_nf4(q).double() - w.double()).square()
        padded = torch.nn.functional.pad(off, (0, -len(w) % block_size))
        errors.append(padded.view(-1, block_size).sum(1))
    # the search sums in fp32, in units of absmax: 1e-6 of the block's largest possible error
    absmax = kernels.quantize_nf4(w, block_size=block_size, double_quant=False).absmax.double()
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-6 * absmax.square()).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_searched_scales_on_normal_values(kind, double_quant):
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = {}
    for search in (True, False):
        q = QUANTIZE[kind](w, double_quant=double_quant, search_scales=search)
        error[search] = (kernels.dequantize_nf4(q) - w).norm().item()
    # measured: 0.925 of the error with NF4, 0.87 with FP4 (docs/quantization.md has real weights)
    assert error[True] < 0.94 * error[False]


# ---- backends -----------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_LIBRARY, reason="the CPU library was not built")
@settings(max_examples=100)
@given(tensors((-150, 130), DTYPES), block_sizes, kinds, st.booleans(), st.booleans())
def test_cpu_kernels_equal_the_reference_bit_for_bit(w, block_size, kind, double_quant, search):
    options = {"block_size": block_size, "double_quant": double_quant, "search_scales": search}
    with kernels.use_backend("cpu"):
        ours = QUANTIZE[kind](w, **options)
    with kernels.use_backend("reference"):
        truth = QUANTIZE[kind](w, **options)
    assert same(ours, truth)
    for out in DTYPES:
        with kernels.use_backend("cpu"):
            dense = kernels.dequantize_nf4(truth, out)
        with kernels.use_backend("reference"):
            assert torch.equal(dense, kernels.dequantize_nf4(truth, out))


isas = st.sampled_from(ISAS or ["none"])
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the CPU library was not built")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("search", [False, True])
def test_every_instruction_set_gives_the_same_bits(isa, search):
    w = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    with kernels.use_backend("reference"):
        truth = kernels.quantize_fp4(w, search_scales=search)
    with on_cpu(isa):
        assert same(kernels.quantize_fp4(w, search_scales=search), truth)
    for dtype in DTYPES:
        with kernels.use_backend("reference"):
            expected = kernels.dequantize_nf4(truth, dtype)
        with on_cpu(isa):
            assert torch.equal(kernels.dequantize_nf4(truth, dtype), expected)


def around(x):
    """x and the two numbers on either side of each."""
    found = [x]
    for end in (-math.inf, math.inf):
        y = x
        for _ in range(2):
            y = y.nextafter(torch.full_like(y, end))
            found.append(y)
    return torch.cat(found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_around_every_threshold(isa, kind, dtype):
    """The largest value of each block is 1; the blocks are so many that all ways to encode meet."""
    numbers = around(nf4.thresholds(kind, CPU).to(dtype))
    numbers = torch.cat([numbers, -numbers]).clamp(-1, 1)
    for block_size in (32, 64):
        blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % (block_size - 1)))
        w = torch.nn.functional.pad(blocks.view(-1, block_size - 1), (1, 0), value=1.0)
        w = torch.cat([w.view(-1), w.view(-1)[: block_size // 2 + 5]])
        with on_cpu(isa):
            ours = QUANTIZE[kind](w, block_size=block_size)
        with kernels.use_backend("reference"):
            assert same(ours, QUANTIZE[kind](w, block_size=block_size))


@pytest.mark.parametrize("isa", ISAS)
def test_scale_codes_around_every_middle(isa):
    """Residues go over all middles and levels of the dynamic map; the largest of a group is 1."""
    numbers = around(torch.cat([nf4.middles(CPU), nf4.dynamic_map(CPU)])).clamp(-1, 1)
    groups = torch.nn.functional.pad(numbers, (0, -len(numbers) % 255)).view(-1, 255)
    residues = torch.nn.functional.pad(groups, (1, 0), value=1.0).view(-1)[:-70]
    options = torch.zeros(()), nf4.middles(CPU), nf4.ABSMAX_FLOOR
    with on_cpu(isa):
        codes, nested = nf4.cpu.quantize_absmax(residues, *options)
    truth, scales = nf4.reference.quantize_absmax(residues, *options)
    assert torch.equal(codes, truth)
    assert torch.equal(nested, scales)
    assert len(codes.unique()) == 256  # every code was asked for


@needs_library
@settings(max_examples=100)
@given(isas, st.integers(1, 2000), st.integers(0, 2**31), st.integers(-150, 127))
def test_double_quantization_equals_the_reference_bit_for_bit(isa, n, seed, exponent):
    """It does for any scales, from subnormals to the largest, also where their sum overflows."""
    absmax = normal(n, seed, exponent, 0.1).abs()
    offset = nf4.reference.mean_absmax(absmax)
    options = offset, nf4.middles(CPU), nf4.ABSMAX_FLOOR
    with on_cpu(isa):
        ours = nf4.cpu.quantize_absmax(absmax, *options)
    for a, b in zip(ours, nf4.reference.quantize_absmax(absmax, *options), strict=True):
        assert torch.equal(a, b)


@needs_library
@settings(max_examples=100)
@given(
    isas, st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**31), st.integers(-150, 127),
    st.sampled_from([32, 64, 1024]), kinds, st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_dequantizing_equals_the_reference_bit_for_bit(
    isa, rows, columns, seed, exponent, block_size, kind, double_quant, dtype
):
    """The whole and its panels, between guard zones; codes and scales that no quantizing makes."""
    generator = torch.Generator().manual_seed(seed)
    n, guard = rows * columns, 64
    blocks = -(-n // block_size)

    def codes(count):
        return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)

    scales = codes(blocks), normal(-(-blocks // 256), seed, exponent, 0.1), torch.tensor(0.25)
    scales = scales if double_quant else (normal(blocks, seed, exponent, 0.1), None, None)
    q = kernels.NF4Tensor(codes(-(-n // 2)), *scales, (rows, columns), block_size, dtype, kind)
    for out in DTYPES:
        with kernels.use_backend("reference"):
            expected = kernels.dequantize_nf4(q, out)
        step = math.lcm(block_size, columns) // columns
        with on_cpu(isa):
            assert torch.equal(kernels.dequantize_nf4(q, out), expected)
            for at, part in nf4.dequantize_nf4_panels(q, step, out):
                assert torch.equal(part, expected[at])
            if out not in dispatch.CPU_DTYPES:
                continue
            memory = torch.full((n + guard,), 7.0, dtype=out)
            arguments = nf4.cpu.Dequantize(*nf4.cpu._arguments(q), memory.data_ptr(), 0, n)
            dispatch.run("nf4_dequantize", out, arguments)
        assert torch.equal(memory[:n], expected.view(-1))
        assert (memory[n:] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097, 100_003])
def test_the_kernels_write_their_outputs_and_nothing_else(isa, n):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n))
    bounds, codes_by_level = nf4.thresholds("nf4", CPU), nf4.order("nf4", CPU)
    pointer, count, number = dispatch.POINTER, dispatch.INT64, dispatch.FLOAT
    blocks, guard = -(-n // 64), 64
    for op, x in (("bf16", w.bfloat16()), ("fp32", w)):
        codes = torch.full((-(-n // 2) + guard,), 0xAA, dtype=torch.uint8)
        scales = torch.full((blocks + guard,), 7.0)
        scale_codes = torch.full((blocks + guard,), 0xAA, dtype=torch.uint8)
        nested = torch.full((-(-blocks // 256) + guard,), 7.0)
        with kernels.use_backend("reference"):
            truth = kernels.quantize_nf4(x)
        with on_cpu(isa):
            run = dispatch.function(f"nf4_quantize_{op}", *[pointer] * 5, count, count, number)
            buffers = [t.data_ptr() for t in (x, bounds, codes_by_level, codes, scales)]
            run(*buffers, n, 64, nf4.ABSMAX_FLOOR)
            types = *[pointer] * 4, count, number, number
            run = dispatch.function("nf4_quantize_scales", *types)
            buffers = [t.data_ptr() for t in (scales, nf4.middles(CPU), scale_codes, nested)]
            run(*buffers, blocks, truth.offset.item(), nf4.ABSMAX_FLOOR)
        for buffer, written, untouched in (
            (codes, truth.codes, 0xAA),
            (scale_codes, truth.absmax, 0xAA),
            (nested, truth.nested_absmax, 7),
        ):
            assert torch.equal(buffer[:-guard], written)
            assert (buffer[-guard:] == untouched).all()
        assert (scales[-guard:] == 7).all()


# ---- shapes, and the tensor ---------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
def test_shapes_strides_and_empty(search):
    torch.manual_seed(0)
    dense = torch.randn(3, 4, 5, 7)
    strided = [torch.randn(64, 48).t(), torch.randn(256)[::2], dense[:, :1], dense[..., 3]]
    expanded = torch.tensor([1.5]).expand(4096)
    for w in (dense, torch.randn(1), torch.randn(0, 5), expanded, *strided):
        options = {"block_size": 32, "double_quant": False, "search_scales": search}
        q = kernels.quantize_nf4(w, **options)
        back = kernels.dequantize_nf4(q)
        assert back.shape == w.shape
        assert same(q, kernels.quantize_nf4(w.contiguous(), **options))


def test_zero_blocks_stay_zero():
    for kind, code in (("nf4", 0x77), ("fp4", 0)):
        for search in (False, True):
            q = QUANTIZE[kind](torch.zeros(131), double_quant=False, search_scales=search)
            assert (q.codes == code).all()
            assert (kernels.dequantize_nf4(q) == 0).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_per_parameter(double_quant):
    q = kernels.quantize_nf4(torch.randn(1024, 1024), double_quant=double_quant)
    # 4 bits, 8 of absmax per 64, 32 of its scale per 64 * 256, or 32 per 64; and one offset in all
    assert q.bits_per_parameter == pytest.approx(4.127 if double_quant else 4.5, abs=1e-4)
    assert repr(q) == (
        "NF4Tensor(shape=(1024, 1024), quant_type='nf4', block_size=64, dtype=torch.float32, "
        f"double_quant={double_quant}, {'4.127' if double_quant else '4.500'} bits per parameter)"
    )


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="block_size is 48"):
        kernels.quantize_nf4(torch.randn(64), block_size=48)
    with pytest.raises(ValueError, match="not torch.int64"):
        kernels.quantize_fp4(torch.ones(64, dtype=torch.int64))
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.randn(200)
        w[77] = bad
        for backend in ("reference", "cpu") if HAS_LIBRARY else ("reference",):
            with kernels.use_backend(backend), pytest.raises(ValueError, match="NaN or infinite"):
                kernels.quantize_nf4(w)


def test_moving_and_copying():
    q = kernels.quantize_nf4(torch.randn(100, 7))
    assert q.to("meta").codes.is_meta
    assert q.to("meta").offset.is_meta
    assert q.to("cpu").codes is q.codes
    for other in (q.to("cpu", copy=True), copy.deepcopy(q)):
        assert same(other, q)
        assert other.codes.data_ptr() != q.codes.data_ptr()
    with pytest.raises(TypeError, match="safetensors"):
        pickle.dumps(q)


@settings(max_examples=60)
@given(tensors(dtypes=DTYPES), block_sizes, kinds, st.booleans())
def test_through_a_safetensors_file_and_back(w, block_size, kind, double_quant):
    """from_tensors(load(save(tensors(q)))) = q."""
    q = QUANTIZE[kind](w, block_size=block_size, double_quant=double_quant)
    found = load(save(q.tensors("a.weight")))
    assert same(kernels.NF4Tensor.from_tensors(found, "a.weight"), q)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(data):
    """Whatever is done to the entries of a file: ValueError, or a tensor of the stated size."""
    q = kernels.quantize_nf4(torch.randn(100, 3), block_size=32)
    found = q.tensors("w")
    name = data.draw(st.sampled_from(sorted(found)))
    change = data.draw(st.sampled_from(["drop", "shorten", "lengthen", "retype", "json", "bytes"]))
    mark = "w.quant_state.bitsandbytes__nf4"
    if change == "drop":
        del found[name]
    elif change == "shorten":
        found[name] = found[name].view(-1)[:-1]
    elif change == "lengthen":
        found[name] = torch.cat([found[name].view(-1), found[name].view(-1)])
    elif change == "retype":
        found[name] = found[name].to(data.draw(st.sampled_from([torch.int8, torch.float16])))
    elif change == "json":
        state = json.loads(bytes(found[mark].tolist()))
        value = data.draw(
            st.none()
            | st.integers()
            | st.floats()
            | st.sampled_from([32.0, True])
            | st.text()
            | st.lists(st.integers(-9, 999))
        )
        state[data.draw(st.sampled_from(sorted(state)))] = value
        found[mark] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    else:
        found[mark] = torch.tensor(list(data.draw(st.binary(max_size=200))), dtype=torch.uint8)
    try:
        read = kernels.NF4Tensor.from_tensors(found, "w")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert kernels.dequantize_nf4(read).shape == read.shape


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 6, 33, 64, 96, 128, 192]),
    st.integers(0, 2**31),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    kinds,
)
def test_rows_are_the_rows(count, columns, seed, block_size, double_quant, kind):
    """dequantize_rows(q, i) = dequantize(q)[i]."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(count, columns, generator=generator)
    q = QUANTIZE[kind](w, block_size=block_size, double_quant=double_quant)
    rows = torch.randint(0, count, (2, 5), generator=generator)
    assert torch.equal(kernels.dequantize_rows(q, rows), kernels.dequantize_nf4(q)[rows])
    for outside in (-1, count):
        with pytest.raises(IndexError):
            kernels.dequantize_rows(q, torch.tensor([outside]))


# ---- the product --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_linear_is_the_dense_product(dtype):
    torch.manual_seed(0)
    q = kernels.quantize_nf4(torch.randn(24, 40).to(dtype))
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 24, dtype=dtype)

    y = kernels.frozen_linear(x, q, bias)
    wide = dispatch.product_dtype(x)  # fp32 where the processor has no products of 16 bits
    weight = kernels.dequantize_nf4(q, wide)
    truth = torch.nn.functional.linear(x.to(wide), weight, bias.to(wide)).to(dtype)
    ours = y, *torch.autograd.grad(y, (x, bias), grad)
    theirs = truth, *torch.autograd.grad(truth, (x, bias), grad)
    # sums in another order: a few roundings of the dtype
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_frozen_linear_keeps_no_dense_weight():
    q = kernels.quantize_nf4(torch.randn(37, 64))
    x = torch.randn(2, 64, requires_grad=True)
    y = kernels.frozen_linear(x, q)
    gc.collect()  # whatever autograd keeps, Python's objects hold it
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == 37 * 64]
    assert not [t for t in alive if t.is_floating_point()]
    assert y.grad_fn is not None


def test_another_default_device_or_dtype():
    """The defaults that a user sets for new tensors do not reach the kernels' buffers."""
    w = torch.randn(200)
    truth = kernels.quantize_nf4(w, search_scales=True)
    with torch.device("meta"):
        q = kernels.quantize_nf4(w, search_scales=True)
        assert same(q, truth)
        assert torch.equal(kernels.dequantize_nf4(q), kernels.dequantize_nf4(truth))
        assert not any(t.is_meta for t in q.tensors("w").values())
    for dtype in (torch.float64, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert same(kernels.quantize_nf4(w, search_scales=True), truth)
            again = kernels.NF4Tensor.from_tensors(truth.tensors("w"), "w")
            assert same(again, truth)
        finally:
            torch.set_default_dtype(before)


def test_parts_that_do_not_fit_are_refused():
    q = kernels.quantize_nf4(torch.randn(100), double_quant=False)
    for wrong, message in (
        ({"absmax": q.absmax.to("meta")}, "absmax is on meta, codes on cpu"),
        ({"absmax": q.absmax[:1]}, "absmax holds 1 values"),
        ({"codes": q.codes.char()}, "codes holds 50 values of torch.int8"),
        ({"block_size": 0}, "block_size is 0: choose one of 32"),
        ({"block_size": 64.0}, "block_size is 64.0: choose"),
        ({"quant_type": "int8"}, "quant_type 'int8'"),
        ({"shape": (-10, -10)}, r"shape \(-10, -10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(q, **wrong)
