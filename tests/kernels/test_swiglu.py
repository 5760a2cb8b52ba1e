"""The gated activations against fp64:
|op - fp64| <= 2 |torch in the same dtype - fp64| + one rounding.
"""

import pytest
import torch

from lorakit import kernels
from tests.exact import value_and_grads, within_budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(7, 33).to(dtype) for _ in range(3))
    ours = value_and_grads(kernels.swiglu, (gate, up), grad)

    def by_torch(gate, up):
        return gate * torch.sigmoid(gate) * up

    same = value_and_grads(by_torch, (gate, up), grad)
    wide = value_and_grads(by_torch, (gate.double(), up.double()), grad.double())
    for triple in zip(ours, same, wide, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_oai(dtype):
    """The values reach beyond the bounds of gate and up; autograd gives the slopes of the truth."""
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 33).mul(6).to(dtype) for _ in range(2))
    grad = torch.randn(7, 33).to(dtype)
    ours = value_and_grads(lambda *x: kernels.gated(*x, "swiglu_oai"), (gate, up), grad)

    def by_torch(gate, up):
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    same = value_and_grads(by_torch, (gate, up), grad)
    wide = value_and_grads(by_torch, (gate.double(), up.double()), grad.double())
    for triple in zip(ours, same, wide, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu(dtype, approximate):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(7, 33).to(dtype) for _ in range(3))
    ours = value_and_grads(
        lambda gate, up: kernels.geglu(gate, up, approximate=approximate), (gate, up), grad
    )

    def spelled_out(gate, up):
        if approximate == "none":
            return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up

    same = value_and_grads(spelled_out, (gate, up), grad)
    wide = value_and_grads(spelled_out, (gate.double(), up.double()), grad.double())
    for triple in zip(ours, same, wide, strict=True):
        within_budget(*triple)
