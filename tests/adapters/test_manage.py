"""Select, switch off, delete and detach adapters."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.manage import selected_adapter
from tests.adapters.common import CLOSE, CONFIG, IDS, chain, randomize


def test_detached_dense_layers_are_plain_again(model):
    lk.detach(lk.attach(model, CONFIG))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    lk.quantize(model)  # finds them


def test_disable_adapters(either):
    base = either(IDS)
    adapted = randomize(lk.attach(either, CONFIG))(IDS)
    with lk.disable_adapters(either):
        assert torch.equal(either(IDS), base)
    assert torch.equal(either(IDS), adapted)
    lk.merge(either)
    with lk.disable_adapters(either):
        assert torch.equal(either(IDS), base)


def test_rows_inside_rows():
    module = chain()
    x = torch.randn(2, 8)
    with lk.adapter_rows(module, ["default", None]):
        outer = module(x)
        with lk.adapter_rows(module, [None, "default"]):
            inner = module(x)
        assert torch.equal(module(x), outer)
    with lk.disable_adapters(module):
        base = module(x)
    # one row alone or beside another: the same products in another order
    torch.testing.assert_close(outer, torch.stack([module(x)[0], base[1]]), **CLOSE)
    torch.testing.assert_close(inner, torch.stack([base[0], module(x)[1]]), **CLOSE)


@pytest.mark.parametrize("names", [None, 3, "a"])
def test_rows_that_are_no_list(names):
    module = lk.attach(nn.Sequential(nn.Linear(8, 8)), lk.LoraConfig(r=2), name="a")
    with (
        pytest.raises(lk.LorakitError, match="names must be a list of names and None"),
        lk.adapter_rows(module, names),
    ):
        pass


def test_nothing_is_attached_or_deleted_inside_a_block():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"]), name="a")
    for block in (lk.disable_adapters(module), lk.adapter_rows(module, ["a", None])):
        with block:
            with pytest.raises(lk.LorakitError, match="attach: the adapters are disabled, or dif"):
                lk.attach(module, lk.LoraConfig(r=2), name="b")
            with pytest.raises(lk.LorakitError, match="delete_adapter: the adapters are disabled"):
                lk.delete_adapter(module, "a")
    assert lk.adapter_names(module) == ["a"]


def test_what_is_frozen_stays_frozen_when_another_adapter_is_deleted():
    module = chain()
    lk.attach(module, lk.LoraConfig(r=2), name="b")
    lk.set_adapter(module, "default").requires_grad_(False)
    lk.delete_adapter(module, "b")
    assert not any(p.requires_grad for p in module.parameters())
    assert selected_adapter(module) == "default"
