"""When several layers are computed by one fused kernel."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.models.adapted_layer import fused_weights


@pytest.fixture
def attention(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    return model.model.layers[0].self_attn


def test_adapted_layers_are_fused_in_their_order(attention):
    found = fused_weights(attention.q_proj, attention.k_proj, attention.v_proj)
    assert [w.lora_B.shape[0] for w in found] == [32, 16, 16]
    assert len(fused_weights(attention.v_proj)) == 1


def test_layers_are_called_one_by_one_where_one_of_them_must_be(attention):
    q, k = attention.q_proj, attention.k_proj
    assert fused_weights(q, nn.Linear(32, 16)) is None  # carries no adapter
    hook = k.register_forward_hook(lambda module, args, y: None)
    assert fused_weights(q, k) is None
    assert fused_weights(q) is not None
    hook.remove()
    assert fused_weights(q, k) is not None


def test_merged_layers_are_called(attention, tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.merge(lk.attach(model, lk.LoraConfig(r=2)))
    assert fused_weights(model.model.layers[0].self_attn.q_proj) is None


def test_a_hook_on_one_projection_runs_and_changes_nothing_else(attention):
    """The fused road and the road of single layers compute the same."""
    calls, x = [], torch.randn(1, 5, 32)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    fused = attention._project(x, attention.adapted(), 0, None)
    layers[1].register_forward_hook(lambda module, args, y: calls.append(1))
    for y, expected in zip(attention._project(x, attention.adapted(), 0, None), fused, strict=True):
        # the same sums of 32 products in fp32, in another order
        assert (y - expected).abs().max() <= 1e-5
    assert calls == [1]
