"""Embeddings and heads of one weight: refused, or adapted together."""

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.tied_weights import heads_of_embedding
from tests.adapters.parity import (
    assert_same,
    disturb,
    logits_of,
    ours_config,
    peft_attach,
    peft_load,
    peft_save,
    trained,
)

TIED = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
@pytest.mark.parametrize("options", [*TIED, {"target_modules": ["lm_head", "q_proj"]}])
def test_tied_models_are_refused_as_they_are(bases, base, options):
    _, theirs, ours = bases(base)
    for model in (ours, theirs):
        before = {name: (type(m), id(m)) for name, m in model.named_modules()}
        # a lorakit decoder with a tied head has no head of its own
        with pytest.raises(lk.LorakitError, match="shares its weight|'lm_head' matches no layer"):
            lk.attach(model, ours_config(options))
        assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
        assert all(p.requires_grad for p in model.parameters())


def test_layers_that_compute_their_weight_share_none():
    """weight_norm takes `weight` out of a layer's parameters: two without one are not tied."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7)})
    layers = dict(model.named_modules())
    for layer in model.values():
        torch.nn.utils.parametrizations.weight_norm(layer)
    assert heads_of_embedding(model, layers, model["embed"]) is None
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7)})
    tied["head"].weight = tied["embed"].weight
    assert heads_of_embedding(tied, dict(tied.named_modules()), tied["embed"]) == ["head"]


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
@pytest.mark.parametrize(
    "options", [*TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}]
)
def test_tied_models_stay_tied(bases, tmp_path, base, options):
    _, theirs, ours = bases(base)
    options = {**options, "ensure_weight_tying": True}
    for model in (ours, theirs):
        torch.manual_seed(0)
        lk.attach(model, ours_config(options))
        disturb(trained(model))
    expected = logits_of(ours)
    lk.merge(ours)
    lk.save_model(ours, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in written
    assert torch.equal(
        written["model.embed_tokens.weight"], ours.model.embed_tokens.current_module().weight
    )
    lk.merge_and_unload(theirs)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, written["model.embed_tokens.weight"])
    assert_same(logits_of(theirs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": r".*(lm_head|embed_tokens|q_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "init_lora_weights": False, "use_rslora": True},
    ],
)
def test_peft_puts_an_adapter_of_a_tied_head_on_the_embedding(bases, tmp_path, options):
    """And so its files are read."""
    _, theirs, ours = bases("llama tied")
    adapted = peft_attach(theirs, {**options, "ensure_weight_tying": True})
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, tmp_path)
    lk.load_adapter(ours, tmp_path)
    assert_same(logits_of(ours), logits_of(adapted))


@pytest.mark.parametrize(
    "options",
    [{"alpha_pattern": {"embed_tokens": 12}, "rank_pattern": {"embed_tokens": 2}}]
    + [{"init_lora_weights": "pissa", "use_rslora": rslora} for rslora in (False, True)],
)
def test_a_tied_embedding_with_a_rank_of_its_own(bases, tmp_path, options):
    _, theirs, ours = bases("llama tied")
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, **options}
    _, _, other = bases("llama tied")
    disturb(trained(lk.attach(ours, ours_config(options))))
    lk.save_adapter(ours, tmp_path)
    lk.load_adapter(other, tmp_path)
    assert_same(logits_of(other), logits_of(ours))
    assert_same(logits_of(peft_load(theirs, tmp_path)), logits_of(ours))
