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
    # checkpointed, q, k and v run again, then backward computes gate and up; o and down are over
    assert sorted(joined) == sorted([3, 2, 1] + [3, 2] * checkpointing)
    # fp32 sums in another order
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, exact in truth.items():
        assert torch.allclose(found[name], exact, rtol=1e-3, atol=1e-5 * exact.abs().max()), name


def test_linear_attention(monkeypatch):
    """Its inputs q, k, v and z are one product, whose results lie side by side in memory."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "attention_gate": True}
    torch.manual_seed(0)
    config = lk.ModelConfig(
        "qwen3_5_text", 96, 64, 64, 2, 2, 2, 16, linear_layers=[True, False], **linear
    )
    model = lk.quantize(Decoder(config).requires_grad_(False))
    model = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.zeros(1, reference.FEW + 2, dtype=torch.int64)
    attention, view = model.model.layers[0].linear_attn, model.views(ids)[0]
    x = torch.randn(*ids.shape, 64)

    def output_and_gradients():
        adapted = attention.adapted()
        room = lk.kernels.lora_room(x, adapted)
        wide = torch.cat([x, torch.zeros(1, x.shape[1], room)], dim=2)[..., :64]
        given = wide.detach().requires_grad_()
        y = attention(given, view, None, adapted, room, None)
        trained = [p for p in attention.parameters() if p.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), [given, *trained])]

    with lk.kernels.use_backend("reference"):
        expected = output_and_gradients()
    joined, forward = [], reference.Group._forward_joined

    def note(group, *arguments):
        joined.append(len(group.layers))
        return forward(group, *arguments)

    monkeypatch.setattr(reference.Group, "_forward_joined", note)
    with on_triton():
        found = output_and_gradients()
    assert joined == [2]
    for tensor, exact in zip(found, expected, strict=True):
        # fp32 sums in another order
        assert torch.allclose(tensor, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


def test_queries_without_keys():
    """A block that sees another's keys turns queries alone, and has no k_proj and v_proj."""
    torch.manual_seed(0)
    config = lk.ModelConfig(
        "llama", 96, 32, 48, 2, 4, 2, 16, qk_norm="head", v_norm=True, num_kv_shared_layers=1
    )
    model = lk.quantize(Decoder(config).requires_grad_(False))
    model = lk.attach(model, lk.LoraConfig(r=4, init_lora_weights=False)).train()
    ids = torch.arange(12)[None]
    expected, grads = loss_and_gradients(model, ids)
    with on_triton():
        found, again = loss_and_gradients(model, ids)
    # fp32, in another order of sums, some of which cancel
    assert torch.allclose(found, expected, rtol=1e-5)
    assert all(torch.allclose(again[n], grads[n], rtol=1e-3, atol=1e-6) for n in grads)
    assert all(grad.abs().max() > 0 for grad in grads.values())
