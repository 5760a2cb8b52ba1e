"""No kernel takes a DTensor: its address is 0, from which a kernel would read."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from lorakit import kernels
from lorakit.kernels import LoraWeights, Moment8bit, NF4Tensor, dispatch
from lorakit.models.packed_layers import NF4Linear, quantize

pytestmark = pytest.mark.skipif(dispatch.library() is None, reason="the library is not built")

ADAMW = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
ROWS = torch.randn(6, 64)
MATRIX = torch.randn(64, 64)
HEADS, TABLE = torch.randn(1, 3, 2, 32), torch.randn(1, 3, 16)
PACKED = kernels.quantize_nf4(MATRIX)
PARTS = (PACKED.codes, PACKED.absmax, PACKED.nested_absmax, PACKED.offset)
SHAPES = PACKED.shape, PACKED.block_size, PACKED.dtype


@pytest.fixture(scope="module")
def mesh():
    """Return the mesh of a group of one process, whose tensors can be DTensors."""
    if distributed.is_initialized():  # an earlier test has put weights in host memory
        yield init_device_mesh("cpu", (1,))
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def from_parts(x, *parts):
    return kernels.frozen_linear(x, NF4Tensor(*parts, *SHAPES))


def lora(x, A, B):
    base = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    base = quantize(base)[0]
    assert isinstance(base, NF4Linear)
    return kernels.lora_linear(x, LoraWeights(base, A, B, 1.0))


def adamw(*tensors):
    kernels.adamw_step(*([t] for t in tensors), **ADAMW)


def adamw_8bit(p, g):
    moments = [[Moment8bit.zeros(ROWS.numel(), ROWS.device)] for _ in range(2)]
    kernels.adamw_step_8bit([p], [g], *moments, **ADAMW)


OPS = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), (ROWS, ROWS[0])),
    "add_rms_norm": (lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5), (ROWS, ROWS, ROWS[0])),
    "swiglu": (kernels.swiglu, (ROWS, ROWS)),
    "rope": (kernels.rope, (HEADS, HEADS, TABLE, TABLE)),
    "attention": (kernels.attention, (HEADS, HEADS, HEADS)),
    "causal_conv": (kernels.causal_conv, (torch.randn(1, 5, 8), torch.randn(8, 4))),
    "cross_entropy": (kernels.cross_entropy, (ROWS, torch.arange(6))),
    "linear_cross_entropy": (
        lambda h, w: kernels.linear_cross_entropy(h, w, torch.arange(6)),
        (ROWS, MATRIX),
    ),
    "quantize_nf4": (kernels.quantize_nf4, (MATRIX,)),
    "quantize_int8": (kernels.quantize_int8, (MATRIX,)),
    "dequantize_nf4": (lambda *p: kernels.dequantize_nf4(NF4Tensor(*p, *SHAPES)), PARTS),
    "frozen_linear": (from_parts, (ROWS[:1], *PARTS)),
    "lora_linear": (lora, (ROWS, torch.randn(4, 64), torch.randn(64, 4))),
    "adamw": (adamw, (ROWS, ROWS, torch.zeros(6, 64), torch.zeros(6, 64))),
    "adamw_8bit": (adamw_8bit, (ROWS, ROWS)),
}


@pytest.mark.parametrize("name", OPS)
def test_a_dtensor_is_refused_in_one_sentence(name, mesh):
    """The sentence is torch's own if one of its operations meets the DTensor first."""
    op, tensors = OPS[name]
    for i, tensor in enumerate(tensors):
        given = [*tensors[:i], distribute_tensor(tensor, mesh), *tensors[i + 1 :]]
        with kernels.use_backend("cpu"), pytest.raises((TypeError, RuntimeError), match="DTensor"):
            op(*given)


def test_no_triton_kernel_is_launched_with_a_dtensor(mesh):
    with pytest.raises(TypeError, match="a kernel got a DTensor, .*: gather a DTensor first"):
        dispatch.launch(None, (1,), ROWS, distribute_tensor(ROWS, mesh), 3)


def test_tensors_without_values_have_no_address():
    """They are of no bytes, or of the meta device, where no kernel runs."""
    assert dispatch.address(torch.empty(0, 4)) == 0
    assert dispatch.address(torch.empty(4, device="meta")) == 0
    assert dispatch.address(None) is None
