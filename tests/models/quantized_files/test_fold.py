"""Checkpoints that other tools quantized, against the tools that write them and transformers.

integers.safetensors and floats.safetensors were written by the tools themselves, for random
matrices of [32, 32] and groups of 16: AutoGPTQ 0.7.1 (QuantLinear.pack of qlinear_cuda.py),
GPTQModel 7.7.0 (PackableQuantLinear.pack_original and convert_gptq_v2_to_v1_format_module, with
zero points of 0 among them), AutoAWQ 0.2.9 (WQLinear_GEMM.from_linear), compressed-tensors 0.20.1
(`compress` of each format) and ModelOpt 0.47.0 (NVFP4QTensor.quantize). The metadata hold, for each
weight, its quantization_config and a SHA-256 of the dense weight that the tool itself makes of it
(forward of the identity, _dequantize_from_codes, dequantize_gemm, `decompress`, `dequantize`).

lorakit's products of a scale and a few bits are exact in fp32, so rounding them once to the tool's
16 bits has to give its very bits. Adding zero makes -0 and 0 one.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lorakit as lk
from lorakit.files.safetensors import open_safetensors
from lorakit.models.quantized_files.fold import check_method, dequantized

FILES = [Path(__file__).parent / f"{name}.safetensors" for name in ("integers", "floats")]
CASES = {}
for file in FILES:
    with safe_open(file, "pt") as opened:
        CASES |= {
            name: (file, json.loads(said)) for name, said in sorted(opened.metadata().items())
        }


def parts(case):
    return {n: t for n, t in open_safetensors(CASES[case][0]).items() if n.startswith(f"{case}.")}


@pytest.mark.parametrize("case", CASES)
def test_the_tool_that_wrote_a_weight_reads_the_same_bits(case):
    said = CASES[case][1]
    check_method(said["quantization_config"], "here")
    found, _ = dequantized(parts(case), said["quantization_config"], "here")
    assert list(found) == [f"{case}.weight"]
    dense = found[f"{case}.weight"].read()
    assert dense.dtype == torch.float32
    assert list(dense.shape) == said["shape"] == list(found[f"{case}.weight"].shape)
    rounded = dense.to(getattr(torch, said["dtype"])).contiguous() + 0.0
    digest = hashlib.sha256(rounded.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest.startswith(said["sha256"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "already quantized .quantization_config., which is not supported"),
        ([], "already quantized .quantization_config."),
        ({"quant_method": "hqq"}, "already quantized .hqq."),
        ({"quant_method": ["fp8"]}, "already quantized"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "gptq, checkpoint_format 'marlin'",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "awq, version 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "compressed-tensors, format 'marlin-24'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": {"format": "mxfp6-pack-quantized"}},
            },
            "format 'mxfp6-pack-quantized'",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "format 'sparse-bitmask'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "format 'transform_config'",
        ),
    ],
)
def test_what_is_not_read_is_named(said, message):
    with pytest.raises(lk.LorakitError, match=message) as caught:
        check_method(said, "here")
    assert "\n" not in str(caught.value)


def changed(found, name, **fields):
    return {**found, name: found[name]._replace(**fields)}


@pytest.mark.parametrize("case", CASES)
def test_a_part_that_is_missing_or_of_another_shape_or_dtype_is_named(case):
    """Optional parts are g_idx, which tells of groups out of order, and zero points."""
    said, whole = CASES[case][1]["quantization_config"], parts(case)
    optional = ("g_idx", "weight_zero_point", "weight_global_scale")
    for name in whole:
        less = {other: tensor for other, tensor in whole.items() if other != name}
        if not name.endswith(optional):
            refused(less, said, case)
        for wrong in ({"shape": (*whole[name].shape, 3)}, {"dtype": "F64"}):
            refused(changed(whole, name, **wrong), said, case)


def refused(tensors, said, case):
    """Fold tensors, which has to fail in one sentence or leave an odd tensor to the loader."""
    try:
        found, _ = dequantized(tensors, said, "here")
    except lk.LorakitError as error:
        assert "\n" not in str(error)
        assert case in str(error)
    else:
        weight = found.get(f"{case}.weight")
        assert weight is None or weight.dtype == "I8"


@pytest.mark.parametrize("case", ["gptqmodel3v1", "gptqmodel4v2"])
def test_groups_are_equal_where_no_tensor_says_them(case):
    said, whole = CASES[case][1]["quantization_config"], parts(case)
    expected = dequantized(whole, said, "here")[0][f"{case}.weight"].read()
    del whole[f"{case}.g_idx"]
    assert torch.equal(dequantized(whole, said, "here")[0][f"{case}.weight"].read(), expected)
    with pytest.raises(lk.LorakitError, match="g_idx is missing, and None bits do not fit"):
        dequantized(whole, said | {"bits": None}, "here")
