"""MiSS: one block that is added to every run of columns."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.adapters.methods.common import shaken
from tests.conftest import ROWS


def layer(wide=10, high=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(wide, high))


@pytest.mark.parametrize("r", [1, 4, 5, 10])
@pytest.mark.parametrize("mini_r", [None, 2])
def test_the_block_lies_on_every_run_of_columns(r, mini_r):
    """The weight is built block by block; where r does not divide 10 the last one is cut off."""
    plain = layer()
    form = {} if mini_r is None else {"init_weights": "mini", "mini_r": mini_r}
    module = shaken(lk.attach(layer(), lk.MissConfig(target_modules=["0"], r=r, **form)))
    D = module[0].part.miss_block
    assert D.shape == (r, 6 if mini_r is None else mini_r)
    W = plain[0].weight.detach().clone()
    for row in range(6):
        for column in range(10):
            W[row, column] += D[column % r, row % D.shape[1]].detach()
    x = torch.randn(3, 10)
    # fp32 sums of 10 and r terms, in another order
    torch.testing.assert_close(module(x), x @ W.t() + plain[0].bias, rtol=1e-5, atol=1e-5)
    lk.merge_and_unload(module)
    assert torch.equal(module[0].weight, W)  # each number gets one block's, times one


def test_only_the_block_is_trained_and_layers_of_one_width_share_the_runs():
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6))
    lk.attach(module, lk.MissConfig(target_modules=["0", "1", "2"], r=3))
    parts = [wrapper.part for wrapper in attached(module).values()]
    assert parts[0].runs is parts[1].runs
    assert parts[1].runs is not parts[2].runs
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 3
    assert all(name.endswith("miss_block") for name in trained)


def test_what_a_random_start_was_is_forgotten_once_it_is_in_a_file(tmp_path):
    torch.manual_seed(0)
    config = lk.MissConfig(target_modules=["0"], r=4, init_weights=False)
    module, x = lk.attach(layer(), config), torch.randn(2, 10)
    assert not torch.equal(module(x), layer()(x))
    lk.save_adapter(module, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        "base_model.model.0.miss_block"
    }
    again = lk.load_adapter(layer(), tmp_path)
    assert again[0].part.config.init_weights is True
    assert torch.equal(again(x), module(x))


def test_a_run_goes_on_with_the_same_bytes(tiny_dir, tmp_path):
    tok = lk.load_tokenizer(tiny_dir)

    def run(out, **options):
        model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
        lk.attach(model, lk.MissConfig(r=8, miss_dropout=0.1))
        config = lk.TrainConfig(str(out), max_steps=4, learning_rate=1e-2, save_steps=2, **options)
        lk.train(model, tok, ROWS, config)
        return (out / "adapter_model.safetensors").read_bytes()

    whole = run(tmp_path / "whole")
    run(tmp_path / "a")
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "gone")
    assert run(tmp_path / "a", resume="auto") == whole
