"""What attach changes, what it leaves, and what it refuses."""

import copy

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.manage import attached
from tests.adapters.common import CLOSE, CONFIG, IDS, filled


def test_attach_changes_no_output_and_freezes_the_rest(either):
    before = either(IDS)
    lk.attach(either, CONFIG)
    assert torch.equal(either(IDS), before)
    trainable = {n.rpartition(".")[2] for n, p in either.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    assert len(lora_layers(either)) == 14
    assert "lm_head" not in lora_layers(either)
    for layer in lora_layers(either).values():
        assert layer.lora_A.abs().max() <= layer.base.in_features**-0.5
        assert layer.lora_A.std() > 0
        assert layer.lora_A.dtype == torch.float32


@pytest.mark.parametrize("place", ["0", "2"])
def test_a_layer_in_two_places_is_adapted_in_both(place):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    filled(lk.attach(module, lk.LoraConfig(r=2, lora_alpha=8, target_modules=[place])))
    assert module[0] is module[2]
    W = layer.weight + 4 * module[0].lora_B @ module[0].lora_A
    x = torch.randn(3, 8)
    truth = torch.relu(x @ W.t() + layer.bias) @ W.t() + layer.bias
    torch.testing.assert_close(module(x), truth, **CLOSE)
    lk.detach(module)
    assert module[0] is layer
    assert module[2] is layer


def test_refusals(model):
    for action in (lk.merge, lk.unmerge, lk.detach):
        with pytest.raises(lk.LorakitError, match="no adapter is attached"):
            action(model)
    lk.attach(model, CONFIG)
    with pytest.raises(lk.LorakitError, match="attached already"):
        lk.attach(model, CONFIG)

    class Odd(nn.Linear):
        pass

    with pytest.raises(lk.LorakitError, match="is a Odd"):
        lk.attach(nn.Sequential(Odd(3, 3)), CONFIG)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "training", 3])
def test_names_that_no_adapter_can_have(model, name):
    with pytest.raises(lk.LorakitError, match="is no name for an adapter"):
        lk.attach(model, CONFIG, name=name)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_arguments_of_other_libraries():
    with pytest.raises(lk.LorakitError, match="a module of torch is wanted, not None"):
        lk.attach(None, lk.LoraConfig())
    with pytest.raises(
        lk.LorakitError, match="peft.*LoraConfig is not the config of a lorakit adapter"
    ):
        lk.attach(nn.Linear(8, 8), peft.LoraConfig())
    with pytest.raises(lk.LorakitError, match="init_lora_weights is .* N a whole number up to 10"):
        lk.LoraConfig(init_lora_weights="pissa_niter_99999999999")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["shared"]},
        {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 5]}},
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
    ],
    ids=["LoRA", "rows", "whole"],
)
def test_one_weight_of_several_embeddings(t5, options):
    """Only the named one would change, so it is refused."""
    config = lk.LoraConfig(r=2, ensure_weight_tying=True, **options)
    with pytest.raises(lk.LorakitError, match="is another embedding with the same weight"):
        lk.attach(copy.deepcopy(t5), config)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["0", "1"]},
        {"target_modules": ["1"], "modules_to_save": ["0"]},
    ],
)
def test_rows_of_what_is_adapted_already(options):
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    config = lk.LoraConfig(r=2, trainable_token_indices=[3], **options)
    with pytest.raises(lk.LorakitError, match="0 is among target_modules or modules_to_save too"):
        lk.attach(module, config)
    assert not lk.adapter_names(module)


def test_modules_that_are_trained_whole_do_not_lie_in_each_other():
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    config = lk.LoraConfig(target_modules=["0"], modules_to_save=["1", "1.0"])
    with pytest.raises(lk.LorakitError, match=r"1\.0 lies in another one that is named"):
        lk.attach(module, config)
    assert not lk.adapter_names(module)


def test_what_holds_another_adapter_is_not_copied():
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    lk.attach(module, lk.LoraConfig(target_modules=["1.0"]), name="a")
    config = lk.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    with pytest.raises(lk.LorakitError, match="1 holds layers of another adapter; detach that"):
        lk.attach(module, config, name="b")
    assert lk.adapter_names(module) == ["a"]


@pytest.mark.parametrize(
    "config",
    [lk.LoraConfig(r=2), lk.IA3Config(target_modules="all-linear", feedforward_modules=[])],
)
def test_layers_in_what_another_adapter_trains_whole(config):
    module = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "q": nn.Linear(8, 8)}
    )
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["q"], modules_to_save=["mlp"]), name="a")
    with pytest.raises(lk.LorakitError, match=r"mlp\.0 lies in a module that another adapter"):
        lk.attach(module, config, name="b")
    assert lk.adapter_names(module) == ["a"]
    lk.attach(module, lk.LoraConfig(r=2, exclude_modules=["0", "1"]), name="b")
    assert [n for n, each in attached(module).items() if "b" in each.adapters] == ["q"]


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["1"]}], ids=["biases", "whole"]
)
def test_what_another_adapter_trains_as_it_is_is_not_left_out(options):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"], **options), name="a")
    for target in ("all-linear", ["1"], ".*1"):
        with pytest.raises(lk.LorakitError, match="1 is a .* of another adapter"):
            lk.attach(module, lk.LoraConfig(r=2, target_modules=target), name="b")
    assert lk.adapter_names(module) == ["a"]


def test_lists_of_modules_are_not_called():
    module = nn.ModuleDict({"q": nn.Linear(8, 8), "mlp": nn.ModuleList([nn.Linear(8, 8)])})
    with pytest.raises(lk.LorakitError, match="mlp only holds modules, and is not called"):
        lk.attach(module, lk.LoraConfig(target_modules=["q"], modules_to_save=["mlp"]))
