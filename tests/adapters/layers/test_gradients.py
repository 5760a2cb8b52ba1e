"""Gradients of adapted layers, in fp64, against finite differences."""

import pytest
import torch
from torch import nn

import lorakit as lk
from tests.adapters.parity import disturb, trained

LINEAR = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "dora and bias": {"use_dora": True, "bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
}


def check_gradients(function, *tensors):
    """Compare with differences in fp64: inputs change in place, where `function` may find them."""
    assert torch.autograd.gradcheck(lambda *_: function(), tensors)


@pytest.mark.parametrize("path", ["light", "fused", "by autograd"])
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_gradients_of_a_linear_layer(options, path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4))
    lk.attach(module, lk.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options))
    module.double()
    disturb(trained(module))
    layer, x = module[0], torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ways = {
        "light": lambda: layer(x),
        "fused": lambda: layer.compute(layer.part, x),
        "by autograd": lambda: layer.compute_by_autograd(layer.part, x),
    }
    parameters = list(trained(module).values())
    if options.get("use_dora"):  # the length is taken as a constant, as in the paper
        own = [layer.lora_A, layer.lora_B]
        parameters = [p for p in parameters if all(p is not other for other in own)]
        W, A, B = layer.base.dequantize(), *own
        length = (W + 1.5 * B @ A).norm(dim=1).detach()
        bias = layer.base.bias if layer.part.bias is None else layer.part.bias
        truth = x @ (W + 1.5 * B @ A).t() * (layer.part.magnitude / length) + bias
        weights = torch.randn(3, 4, dtype=torch.float64)
        expected = torch.autograd.grad((truth * weights).sum(), own)
        for grad, other in zip(
            torch.autograd.grad((ways[path]() * weights).sum(), own), expected, strict=True
        ):
            assert torch.allclose(grad, other)
    check_gradients(ways[path], x, *parameters)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed"]},
        {"target_modules": ["embed"], "use_dora": True},
        {"target_modules": ["other"], "trainable_token_indices": [3, 1]},
        {"target_modules": ["other"], "modules_to_save": ["embed"]},
    ],
    ids=["embedding", "dora", "rows", "saved"],
)
def test_gradients_of_embeddings_and_tied_heads(options, tied):
    torch.manual_seed(0)
    module = Tied().double()
    module.other = nn.Linear(2, 2)
    if not tied:
        module.head = nn.Linear(5, 7).double()
    config = lk.LoraConfig(r=2, lora_alpha=3, ensure_weight_tying=tied, **options)
    if tied and config.use_dora:
        with pytest.raises(lk.LorakitError, match="use_dora has no meaning"):
            lk.attach(module, config)
        return
    lk.attach(module, config)
    module.double()
    disturb(trained(module))
    ids = torch.tensor([[3, 1, 4], [1, 6, 3]])
    parameters = {n: p for n, p in trained(module).items() if ".other." not in n}
    check_gradients(
        lambda: module(ids),
        *(p for n, p in parameters.items() if not config.use_dora or "mag" in n),
    )
    found = module(ids)
    lk.merge(module)
    assert (module(ids) - found).abs().max() <= 1e-13  # all in fp64
    if tied:
        assert module.head.current_module().weight is module.embed.current_module().weight
