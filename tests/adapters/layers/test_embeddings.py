"""Adapters on embeddings and on tied heads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit as lk
from tests.adapters.common import CLOSE, SHORT_IDS, filled
from tests.conftest import tiny


class Scaled(nn.Embedding):
    """An embedding that scales its rows, as Gemma's does."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("padding_idx", [0, 8])
def test_padding_learns_nothing_and_all_else_does(kind, padding_idx):
    """The padding token alone: not what lies in its place among the trained rows."""
    ids = torch.tensor([[0, 3, 5, 8]])
    others = [i for i in ids[0].tolist() if i != padding_idx]

    torch.manual_seed(0)
    module = nn.Sequential(kind(9, 4, padding_idx=padding_idx))
    filled(lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"])))
    module(ids).sum().backward()
    grad = module[0].lora_A.grad
    assert not grad[:, padding_idx].any()
    assert grad[:, others].all()

    module = nn.Sequential(kind(9, 4, padding_idx=padding_idx))
    module.append(nn.Linear(4, 4))
    config = lk.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3, 5, 0, 8]})
    lk.attach(module, config)
    module(ids).sum().backward()
    [rows] = [p.rows for p in module[0].adapters.values()]
    zero = rows.grad.abs().sum(1) == 0
    assert zero.tolist() == [i == padding_idx for i in (3, 5, 0, 8)]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "rows"])
def test_the_weight_of_an_adapted_embedding(kind):
    """Code that uses it as a head finds it adapted, with the gradients of both uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return F.linear(self.out(self.emb(ids)), self.emb.weight)

    torch.manual_seed(0)
    module = Tied()
    plain = copy.deepcopy(module)
    options = {"target_modules": ["emb"], "use_dora": kind == "DoRA"}
    if kind == "rows":
        options = {"target_modules": ["out"], "trainable_token_indices": {"emb": [3, 5]}}
    filled(lk.attach(module, lk.LoraConfig(r=2, lora_alpha=8, **options)))
    weight = lk.merge_and_unload(copy.deepcopy(module)).emb.weight
    torch.testing.assert_close(module.emb.weight, weight, **CLOSE)
    with torch.no_grad():
        plain.emb.weight.copy_(weight)
    if kind != "rows":
        torch.testing.assert_close(module(SHORT_IDS % 9), plain(SHORT_IDS % 9), **CLOSE)
    module(SHORT_IDS % 9).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    if kind == "LoRA":  # dL/dA = s (dL/dW B)^T, of a W that is used twice
        plain(SHORT_IDS % 9).square().sum().backward()
        # sums of 4 x 9 products of gradients up to 100, in another order
        truth = 4 * (plain.emb.weight.grad @ module.emb.lora_B).t()
        torch.testing.assert_close(module.emb.lora_A.grad, truth, rtol=1e-4, atol=1e-3)


def test_autocast_leaves_an_adapted_embedding_as_precise_as_it_is():
    module = nn.Sequential(nn.Embedding(9, 4))
    filled(lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"])))
    truth = module(SHORT_IDS % 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(SHORT_IDS % 9), truth)


@pytest.mark.parametrize("rows", [False, True])
def test_a_base_that_trains_under_a_tied_head(rows):
    """The head's part of its gradient would be missing."""
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    if rows:
        options |= {"target_modules": ["q_proj"], "trainable_token_indices": [3]}
    model = lk.attach(tiny("llama", tie_word_embeddings=True), lk.LoraConfig(r=2, **options))
    model(SHORT_IDS)
    model.requires_grad_(True)
    with pytest.raises(lk.LorakitError, match="a head is tied to it: .* freeze it"):
        model(SHORT_IDS)
