"""Long rows in tiles: MLPs whose own weights train, and experts, against all rows at once."""

import pytest
import torch

import lorakit as lk
from lorakit.models import dense_tiles, mlp
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_hooks
from lorakit.models.recompute import run_recomputed

CONFIG = lk.ModelConfig("llama", 64, 32, 80, 2, 4, 2, 8)
MOE = {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
MOE |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MOE |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def gradients(model, packed=False):
    ids = torch.arange(100)[None] % 64
    bounds = torch.tensor([0, 37, 100]) if packed else None
    loss, _ = model.loss(ids, ids, cu_seqlens=bounds)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.fixture
def small_tiles(monkeypatch):
    """A call of it makes tiles of so many rows."""

    def choose(rows):
        monkeypatch.setattr(dense_tiles, "ROWS", rows)
        monkeypatch.setattr(mlp, "ROWS", rows)

    return choose


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("rows", [99, 32, 7])
def test_full_training_in_tiles(rows, freeze, small_tiles):
    """Another order of the sums over rows moves fp64 by 1e-12 of the largest at most."""
    torch.manual_seed(0)
    model = Decoder(CONFIG).double().train()
    model.gradient_checkpointing = True
    if freeze:
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    whole, expected = gradients(model)
    small_tiles(rows)
    loss, found = gradients(model)
    assert (loss - whole).abs() <= 1e-12 * whole.abs()
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert (grad - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


def test_gradients_of_bfloat16_are_added_in_fp32(small_tiles):
    """Tiles of one row add nothing to the rounding of one sum: 1 % of the whole, not 20."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16, False), torch.nn.Linear(8, 16, False)]
    layers += [torch.nn.Linear(16, 8, False)]
    x = torch.randn(2000, 8)
    exact = [each.weight.detach().clone().bfloat16().float() for each in layers]
    for each in layers:
        each.bfloat16()
    small_tiles(1)
    y = dense_tiles.tiled_mlp(x.bfloat16(), layers, "silu")
    y.float().square().sum().backward()
    wide = [w.requires_grad_() for w in exact]
    gate, up, down = (x.bfloat16().float() @ wide[0].T, x.bfloat16().float() @ wide[1].T, wide[2])
    ((torch.nn.functional.silu(gate) * up) @ down.T).square().sum().backward()
    for each, w in zip(layers, wide, strict=True):
        assert (each.weight.grad.float() - w.grad).norm() <= 0.01 * w.grad.norm()


def test_no_more_than_a_tile_is_kept(small_tiles):
    """The second run of a block keeps its input alone of the MLP, and computes none of it."""
    layers = [torch.nn.Linear(8, 64), torch.nn.Linear(8, 64), torch.nn.Linear(64, 8)]
    small_tiles(16)
    x = torch.randn(100, 8, requires_grad=True)
    saved = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = dense_tiles.tiled_mlp(x, layers, "silu")
    weights = {p.data_ptr() for each in layers for p in each.parameters()}
    assert [t.shape for t in saved if t.data_ptr() not in weights] == [(100, 8)]
    again = run_recomputed(lambda x: dense_tiles.tiled_mlp(x, layers, "silu"), x)
    [first], [second] = (torch.autograd.grad(each.sum(), [x]) for each in (y, again))
    assert torch.equal(first, second)


def test_what_takes_tiles(small_tiles):
    small_tiles(10)
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    assert dense_tiles.takes_tiles(torch.ones(11, 8), layers)
    assert not dense_tiles.takes_tiles(torch.ones(10, 8), layers)
    layers[1].register_forward_hook(lambda *_: None)
    assert has_hooks(layers[1])
    assert not dense_tiles.takes_tiles(torch.ones(11, 8), layers)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_experts_in_tiles(lora, packed, small_tiles):
    """Adapters on experts, and experts that train themselves: 1e-12 in fp64, as above."""
    torch.manual_seed(0)
    model = Decoder(lk.ModelConfig.from_hf(MOE)).double().train()
    if lora:
        targets = ["gate_proj", "up_proj", "down_proj"]
        lk.attach(model, lk.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        model.double()
    model.gradient_checkpointing = True
    whole, expected = gradients(model, packed)
    small_tiles(32)
    loss, found = gradients(model, packed)
    assert (loss - whole).abs() <= 1e-12 * whole.abs()
    for name, grad in expected.items():
        assert (grad - found[name]).abs().max() <= 1e-12 * grad.abs().max(), name
