"""Blocks of a QLoRA model where Triton runs: q, k and v, gate and up as one product each."""

import pytest
import torch

pytest.importorskip("triton")
import lorakit as lk
from lorakit.kernels.ops.lora_linear import reference
from lorakit.models.decoder import Decoder
from tests.triton_interpreter import on_triton


def model_of(family, **fields):
    torch.manual_seed(0)
    config = lk.ModelConfig(family, 96, 64, 128, 1, 4, 2, 32, **fields)
    model = lk.quantize(Decoder(config).requires_grad_(False))
    model = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.train()


def loss_and_gradients(model, ids):
    loss, count = model.loss(ids, ids)
    (loss / count).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return loss.detach() / count, found


@pytest.mark.parametrize(
    ("fields", "checkpointing"), [({"qkv_bias": True}, False), ({"qk_norm": "head"}, True)]
)
def test_a_model(fields, checkpointing, monkeypatch):
    """Loss and gradients are those of plain torch, and all layers but o run as one product."""
    model, joined = model_of("llama", **fields), []
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(96, (2, reference.FEW // 2 + 1), generator=torch.Generator().manual_seed(1))
    with lk.kernels.use_backend("reference"):
        expected, truth = loss_and_gradients(model, ids)
    forward = reference.Group._forward_joined

    def note(group, *arguments):
        joined.append(len(group.layers))
        return forward(group, *arguments)

    monkeypatch.setattr(reference.Group, "_forward_joined", note)
    with on_triton():
        loss, found = loss_and_gradients(model, ids)
    again = 2 if checkpointing else 1
    assert sorted(joined) == sorted([3, 2, 1] * again)
    # fp32 sums in another order
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, exact in truth.items():
        assert torch.allclose(found[name], exact, rtol=1e-3, atol=1e-5 * exact.abs().max()), name
