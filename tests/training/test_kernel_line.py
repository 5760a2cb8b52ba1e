"""The line that names the kernels of a run: on each backend, and on GPUs that are not here."""

from unittest import mock

import pytest
import torch

import lorakit as lk
from lorakit.kernels import dispatch
from lorakit.training.kernel_line import kernel_line
from tests.meta_gpu import MetaGPU


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


def test_on_a_cpu(tiny, monkeypatch):
    with lk.kernels.use_backend("reference"):
        assert kernel_line(tiny, 64, True) == "kernels: reference, by use_backend"
    monkeypatch.setattr(dispatch, "library", lambda: None)
    expected = "kernels: reference, the library of CPU kernels was not built"
    assert kernel_line(tiny, 64, False) == expected


@pytest.mark.skipif(dispatch.library() is None, reason="needs the library of CPU kernels")
def test_with_the_library(tiny):
    assert kernel_line(tiny, 64, True) == f"kernels: cpu {dispatch.isa()}"
    with mock.patch.object(lk.kernels.ops.attention.cpu, "fits", return_value=False):
        assert kernel_line(tiny, 64, True).endswith(
            "; attention 8: reference, no kernel for heads of 8 in float32"
        )


@pytest.mark.parametrize(
    ("capability", "tokens", "packed", "after"),
    [
        ((9, 0), 2048, False, "; attention 128: flash"),
        ((9, 0), 8192, False, ""),  # long rows are faster by lorakit's own kernel
        ((9, 0), 2048, True, ""),
        ((7, 5), 2048, True, "; attention 128: reference, no kernel for sm_75"),
    ],
)
def test_on_a_gpu(capability, tokens, packed, after):
    with MetaGPU(capability) as gpu:
        model = gpu.decoder(2)
        assert model.dtype == torch.bfloat16
        assert kernel_line(model, tokens, packed) == "kernels: triton" + after


def test_windows_and_experts_on_a_gpu():
    """Rows within the window are whole; experts run one by one before Ampere."""
    fields = {"sliding_window": 256, "sliding_layers": [True, False]}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    with MetaGPU() as gpu:
        model = gpu.decoder(2, **fields, **experts, moe_layers=[True, False])
        assert kernel_line(model, 128, False) == "kernels: triton; attention 128: flash"
        assert kernel_line(model, 512, False) == "kernels: triton; attention 128: flash"
        with mock.patch.object(dispatch, "capability", return_value=(7, 5)):
            assert kernel_line(model, 512, True) == (
                "kernels: triton; attention 128: reference, no kernel for sm_75; "
                "experts: one by one, no kernel for sm_75"
            )


def test_heads_of_each_kind_and_linear_attention():
    """Gemma 4's full layers have wider heads; Qwen 3.5's linear layers have ops of their own."""
    fields = {"sliding_window": 256, "sliding_layers": [True, False], "global_head_dim": 512}
    with MetaGPU() as gpu:
        model = gpu.decoder(2, **fields)
        assert kernel_line(model, 128, False) == "kernels: triton; attention 128: flash"
        with mock.patch.object(dispatch, "capability", return_value=(7, 5)):
            assert kernel_line(model, 512, True) == (
                "kernels: triton; attention 128: reference, no kernel for sm_75; "
                "attention 512: reference, no kernel for sm_75"
            )
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    with MetaGPU() as gpu:
        model = gpu.decoder(2, linear_layers=[True, False], linear_value_head_dim=8, **linear)
        assert kernel_line(model, 2048, True) == "kernels: triton"
        with mock.patch.object(dispatch, "capability", return_value=(7, 5)):
            assert kernel_line(model, 2048, True) == (
                "kernels: triton; attention 128: reference, no kernel for sm_75; "
                "delta_net: reference, no kernel for sm_75"
            )
        model.float()
        assert kernel_line(model, 2048, True) == (
            "kernels: triton; delta_net: reference, no kernel for heads of 8 in float32"
        )


def test_without_triton(tiny, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    device = mock.patch.object(type(tiny), "device", torch.device("cuda"))
    asked = mock.patch("lorakit.training.kernel_line._attention", return_value=[])
    with device, asked:
        expected = "kernels: reference, the package triton is not installed"
        assert kernel_line(tiny, 64, False) == expected
