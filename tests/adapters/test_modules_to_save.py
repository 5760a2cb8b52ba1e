"""Modules that are trained whole: which ones modules_to_save names, and which are refused."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.whole_modules import SavedModule


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    return nn.ModuleDict({"body": inner, "norm": nn.LayerNorm(4), "list": nn.ModuleList([inner])})


def attach(*entries, **options):
    options = {"r": 2, "target_modules": ["body.0"], **options}
    return lk.attach(net(), lk.LoraConfig(modules_to_save=list(entries), **options))


def test_an_entry_is_a_name_or_its_end_after_a_dot():
    module = attach("norm", "body.1")
    assert isinstance(module["norm"], SavedModule)
    assert isinstance(module["body"][1], SavedModule)
    part = module["norm"].part
    assert part is not module["norm"].base
    assert all(p.requires_grad for p in part.parameters())
    assert not any(p.requires_grad for p in module["norm"].base.parameters())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["nrm"], "'nrm' matches no module .did you mean 'norm'"),
        (["list"], "list only holds modules, and is not called"),
        (
            ["body", "body.1"],
            "body.1 lies in another one that is named .body.: that one",
        ),
    ],
)
def test_what_cannot_be_saved(entries, message):
    with pytest.raises(lk.LorakitError, match=message):
        attach(*entries, target_modules=["0"])


def test_only_lora_saves_an_embedding_with_its_head():
    module = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    module["head"].weight = module["embed"].weight
    module["other"] = nn.Linear(4, 4)
    options = {"target_modules": ["other"], "modules_to_save": ["embed"]}
    with pytest.raises(lk.LorakitError, match="embed shares its weight with another module; only"):
        lk.attach(module, lk.IA3Config(**options))
    with pytest.raises(lk.LorakitError, match="with ensure_weight_tying=true both are adapted"):
        lk.attach(module, lk.LoraConfig(**options))
    lk.attach(module, lk.LoraConfig(ensure_weight_tying=True, **options))
    assert isinstance(module["embed"], SavedModule)
