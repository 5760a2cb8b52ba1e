"""Initializations that an attached adapter awaits are carried out in one place."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.eva import EvaResult
from lorakit.adapters.loftq import LoftQResult
from lorakit.adapters.manage import attached
from lorakit.adapters.start import start_adapter
from tests.adapters.common import IDS


def never():
    raise AssertionError("this start reads no data")


def batches():
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(300, (2, 12))} for _ in range(4)]


def test_an_adapter_that_awaits_nothing_stays_as_it_is(model):
    lk.attach(model, lk.LoraConfig(r=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert start_adapter(model, never) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lk.detach(model)
    assert start_adapter(model, never) is None


def test_other_methods_await_nothing(model):
    lk.attach(model, lk.IA3Config())
    assert start_adapter(model, never) is None


def test_loftq_reads_the_weights_alone(tiny_dir):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    lk.attach(model, lk.LoraConfig(r=2, init_lora_weights="loftq"))
    result = start_adapter(model, never)
    assert isinstance(result, LoftQResult)
    assert sum(result.after.values()) < sum(result.before.values())
    assert start_adapter(model, never) is None  # once


def test_eva_reads_batches_and_the_mode_stays(model):
    lk.attach(model, lk.LoraConfig(r=2, init_lora_weights="eva"))
    model.train()
    before = model(IDS)
    result = start_adapter(model, batches)
    assert isinstance(result, EvaResult)
    assert str(result).startswith("EVA: ")
    assert model.training
    assert torch.equal(model(IDS), before)
    assert {wrapper.part.r for wrapper in attached(model).values()} >= {1, 2}
    assert start_adapter(model, never) is None


def test_the_mode_stays_if_the_data_fails(model):
    lk.attach(model, lk.LoraConfig(r=2, init_lora_weights="eva"))
    model.train()
    with pytest.raises(AssertionError, match="reads no data"):
        start_adapter(model, never)
    assert model.training


def test_what_was_started_by_hand_is_not_started_again(model):
    lk.attach(model, lk.LoraConfig(r=2, init_lora_weights="eva"))
    lk.eva(model, batches())
    assert start_adapter(model, never) is None


def test_an_embedding_beside_the_layers_awaits_nothing_after_eva():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva"))
    lk.eva(module, [batch["input_ids"] for batch in batches()])
    assert [wrapper.part.awaits for wrapper in attached(module).values()] == [None, None]
    assert start_adapter(module, never) is None


def test_only_the_selected_adapter_is_started(model):
    lk.attach(model, lk.LoraConfig(r=2, init_lora_weights="eva"), name="waiting")
    lk.attach(model, lk.LoraConfig(r=2), name="ready")
    assert start_adapter(model, never) is None
    lk.set_adapter(model, "waiting")
    assert isinstance(start_adapter(model, batches), EvaResult)
