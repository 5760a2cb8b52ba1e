"""Select, switch off, delete and detach adapters."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.manage import selected_adapter
from lorakit.models.decoder import Decoder
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


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_rows_with_norms_of_their_own(targets):
    """Norms that read two tensors and return two, norms of heads, and the last one."""
    torch.manual_seed(0)
    fields = lk.ModelConfig("qwen3", 61, 32, 48, 2, 4, 2, 8, qk_norm="head")
    model = Decoder(fields).requires_grad_(False)
    norms = ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"]
    for name in ("a", "b"):
        config = lk.LoraConfig(r=2, target_modules=targets, modules_to_save=norms)
        lk.attach(model, config, name=name)
    with torch.no_grad():
        for p in model.parameters():  # of both adapters too
            p.add_(torch.randn_like(p), alpha=0.1)
    names, ids = ["b", None, "a", "b"], torch.arange(48).view(4, 12)
    with lk.adapter_rows(model, names):
        found = model(ids)
    for row, name in enumerate(names):
        if name is None:
            with lk.disable_adapters(model):
                alone = model(ids[row : row + 1])
        else:
            alone = lk.set_adapter(model, name)(ids[row : row + 1])
        # the same products of other numbers of rows, in another order
        torch.testing.assert_close(found[row], alone[0], **CLOSE)


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
