"""What LoRA computes on a linear layer, and its gradients."""

import copy

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import LoraLinear, lora_layers
from tests.adapters.common import CONFIG, IDS, filled, randomize


def test_forward_is_base_plus_scaled_low_rank(either):
    layer = randomize(lk.attach(either, CONFIG)).model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.base.in_features)
    low = x.double() @ layer.lora_A.double().t() @ layer.lora_B.double().t()
    truth = x.double() @ layer.base.dequantize().double().t() + 2 * low
    assert (layer(x) - truth).abs().max() < 1e-5  # fp32 sums of 32 terms


def test_few_rows_of_a_wide_type_are_as_exact_as_many():
    """The way that calls of a few numbers take must not round an fp64 layer to A's fp32."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8)).double()
    layer = filled(lk.attach(module, lk.LoraConfig(r=2, lora_alpha=8)))[0]
    x = torch.randn(3, 8, dtype=torch.float64)
    truth = x @ (layer.original.weight + 4 * layer.lora_B.double() @ layer.lora_A.double()).t()
    found = layer(x)
    assert found.dtype == torch.float64
    # sums of 8 fp64 products; in fp32 they would be 1e-8 apart
    assert (found - truth - layer.original.bias).abs().max() < 1e-13


def test_dropout_only_while_training(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, lora_dropout=0.5)))
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    torch.manual_seed(0)
    a = model(IDS)
    torch.manual_seed(0)
    assert torch.equal(model(IDS), a)


def test_one_layer_may_drop_nothing(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, lora_dropout=0.5)))
    model.train()
    for block in model.model.layers:
        block.mlp.gate_proj.eval()
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.lora_A.grad.abs().max() > 0


def test_a_trainable_base_gets_its_gradient(model):
    randomize(lk.attach(model, CONFIG))
    layer = model.model.layers[0].mlp.up_proj
    layer.base.linear.weight.requires_grad_(True)
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert layer.base.linear.weight.grad.abs().max() > 0
    assert layer.lora_A.grad.abs().max() > 0


def test_works_on_any_module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(module[0], LoraLinear)
    assert type(module[2]) is nn.Linear
    module(torch.randn(4, 6)).sum().backward()
    assert module[0].lora_B.grad is not None


def test_an_adapted_head_is_in_the_loss(model):
    plain, _ = model.loss(IDS, IDS)
    randomize(lk.attach(model, lk.LoraConfig(r=4, target_modules=["lm_head"])))
    loss, count = model.loss(IDS, IDS)
    assert abs(loss - plain) > 0.1
    truth = nn.functional.cross_entropy(
        model(IDS)[:, :-1].reshape(-1, 300), IDS[:, 1:].reshape(-1), reduction="sum"
    )
    assert abs(loss - truth) < 1e-4 * truth  # fp32 sums of 300 exponentials in another order
    assert count == 22
    loss.backward()
    assert model.lm_head.lora_A.grad.abs().max() > 0


def test_an_adapted_head_under_autocast(model):
    randomize(lk.attach(model, lk.LoraConfig(r=4, target_modules=["lm_head"])))
    exact, _ = model.loss(IDS, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(IDS, IDS)
    loss.backward()
    assert abs(loss - exact) < 0.02 * exact  # a few roundings of bf16


@pytest.mark.parametrize("rows", [4, 2000])  # few numbers take a way of their own
def test_an_activation_in_place_after_an_adapted_layer(rows):
    """It writes over the layer's output; the gradients are those without it, to the bit."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    filled(lk.attach(module, lk.LoraConfig(r=2)))
    in_place = copy.deepcopy(module)
    in_place[1].inplace = True
    x, found = torch.randn(rows, 6), []
    for each in (module, in_place):
        y = each(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(found[0]) == 5
    assert all(grad.abs().max() > 0 for grad in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dora_starts_from_products_of_its_rank(either):
    """The lengths of the rows of W + s B A, without any product of the shape of W."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                made.append(tuple(out.shape))
            return out

    with Watch():
        lk.attach(either, lk.LoraConfig(r=2, use_dora=True, init_lora_weights=False))
    for layer in lora_layers(either).values():
        assert (layer.out_features, layer.in_features) not in made
        part = layer.part
        W = layer.base.dequantize().double() + part.scaling * (
            part.lora_B.double() @ part.lora_A.double()
        )
        # a sum of fp32 squares of some 32 numbers
        assert torch.allclose(part.magnitude.double(), W.norm(dim=1), rtol=1e-5)
