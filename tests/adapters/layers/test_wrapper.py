"""The states of a wrapper, and what moves and computes with it."""

import copy

import pytest
import torch
from torch import nn

import lorakit as lk
from tests.adapters.common import CLOSE, CONFIG, IDS, chain, randomize


def test_rows_of_what_is_called_by_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(input=self.a(x))

    module = Named()
    config = lk.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    lk.attach(module, config)
    x = torch.randn(2, 4)
    module(x)
    with (
        lk.adapter_rows(module, ["default", None]),
        pytest.raises(lk.LorakitError, match="a Linear is called with keywords alone"),
    ):
        module(x)


def test_a_merged_model_moves_as_a_whole(either, tmp_path):
    lk.merge(randomize(lk.attach(either, CONFIG)))
    either.to(torch.bfloat16)
    assert either(IDS).dtype == torch.bfloat16
    lk.merge(either)  # again, from an adapter that .to() has rounded
    lk.save_adapter(either, tmp_path)
    lk.save_model(either, tmp_path)
    assert torch.equal(lk.load_model(tmp_path, dtype="bfloat16")(IDS), either(IDS))


def test_the_three_states_of_a_wrapper():
    """One part is active, or each row has one of its own, or one module computes alone."""
    module = chain()
    layer = module[0]
    assert layer.active is layer.part
    assert layer.only_module() is None
    assert layer.current_module() is layer.original  # what the part is added to
    with lk.adapter_rows(module, ["default", None]):
        assert layer.by_rows
        assert layer.active is None
        assert layer.only_module() is None
    with lk.disable_adapters(module):
        assert layer.active is None
        assert layer.only_module() is layer.original
        with lk.adapter_rows(module, ["default", None]):
            assert not layer.by_rows
            assert layer.only_module() is layer.original
    lk.merge(module)
    assert layer.active is None
    assert layer.only_module() is layer.merged
    assert layer.current_module() is layer.merged
    with lk.disable_adapters(module):
        assert layer.only_module() is layer.original
    lk.unmerge(module)
    layer.select(None)
    assert layer.only_module() is layer.original
    layer.select("default")
    assert layer.active is layer.part


def test_the_active_part_has_one_name():
    """torch would give its parameters a second one, and an optimizer or a file would see both."""
    names = [name for name, _ in chain().named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == 10
    assert not any("active" in name for name in names)


def test_a_copy_computes_with_parts_of_its_own():
    module = chain()
    other, x = copy.deepcopy(module), torch.randn(3, 8)
    before = module(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other[0].part.lora_B.zero_()
        other[2].part.lora_B.zero_()
    with lk.disable_adapters(module):
        base = module(x)
    torch.testing.assert_close(other(x), base, **CLOSE)
    assert torch.equal(module(x), before)
