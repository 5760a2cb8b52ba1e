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
@pytest.mark.parametrize(
    "options",
    [
        *TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ],
)
def test_tied_models_are_refused_as_they_are(bases, base, options):
    _, theirs, ours = bases(base)
    for model in (ours, theirs):
        before = {name: (type(m), id(m)) for name, m in model.named_modules()}
        with pytest.raises(lk.LorakitError, match="shares its weight"):
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


# ---- a tied head that is adapted by itself, as PEFT does it ----

ALONE = [
    {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    {"target_modules": r".*(v_proj|lm_head)", "rank_pattern": {"lm_head": 2}},
]


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
@pytest.mark.parametrize("options", ALONE)
def test_a_head_alone_loads_as_in_peft(bases, tmp_path, base, options):
    """PEFT adapts the head and leaves the embedding: logits = h (W + s B A)^T."""
    _, theirs, ours = bases(base)
    adapted = peft_attach(theirs, options)
    disturb({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    peft_save(adapted, tmp_path / "in")
    plain = logits_of(ours)
    lk.load_adapter(ours, tmp_path / "in")
    expected = logits_of(ours)
    assert_same(expected, logits_of(adapted))
    lk.save_adapter(ours, tmp_path / "out")
    _, again, _ = bases(base)
    assert_same(logits_of(peft_load(again, tmp_path / "out")), expected)
    lk.detach(ours)
    assert ours.lm_head is None
    assert torch.equal(logits_of(ours), plain)


@pytest.mark.parametrize("base", ["llama tied", "gemma3 tied"])
def test_a_head_alone_is_merged_into_a_head_of_its_own(bases, tmp_path, base):
    """The embedding stays, so the files are those of a model that is not tied."""
    from transformers import AutoModelForCausalLM

    _, _, ours = bases(base)
    lk.attach(ours, lk.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    torch.manual_seed(0)
    disturb(trained(ours))
    expected, embedding = logits_of(ours), ours.model.embed_tokens.weight
    lk.merge(ours)
    assert_same(logits_of(ours), expected)
    lk.save_model(ours, tmp_path / "merged")
    lk.unmerge(ours)
    assert torch.equal(logits_of(ours), expected)
    lk.merge_and_unload(ours)
    assert not ours.config.tie_word_embeddings
    lk.save_model(ours, tmp_path / "unloaded")
    for name in ("merged", "unloaded"):
        written = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(written["model.embed_tokens.weight"], embedding)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert_same(logits_of(again.eval()), expected)
        assert_same(logits_of(lk.load_model(tmp_path / name, dtype="float32")), expected)


def test_one_of_two_adapters_has_the_head(bases, tmp_path):
    _, _, ours = bases("llama tied")
    plain = logits_of(ours)
    lk.attach(ours, lk.LoraConfig(r=2, target_modules=["lm_head"]), name="head")
    disturb(trained(ours))
    lk.attach(ours, lk.LoraConfig(r=2, target_modules=["q_proj"]), name="body")
    assert torch.equal(logits_of(ours), plain)
    lk.merge(ours)  # of "body", which leaves the head tied
    lk.save_model(ours, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    lk.unmerge(ours)
    with pytest.raises(lk.LorakitError, match="another adapter changes it by itself"):
        lk.attach(ours, ours_config({**TIED[0], "ensure_weight_tying": True}), name="both")
    lk.delete_adapter(ours, "head")
    assert ours.lm_head is None
    tied = {"target_modules": ["q_proj"], "trainable_token_indices": [3]}
    lk.attach(ours, ours_config(tied), name="rows")
    with pytest.raises(lk.LorakitError, match="lm_head shares its weight with model.embed_tokens"):
        lk.attach(ours, ours_config({"target_modules": ["lm_head"]}), name="head")
    lk.detach(ours)
    with pytest.raises(lk.LorakitError, match="leave one of them out"):
        lk.attach(ours, ours_config({**tied, "target_modules": ["lm_head"]}))


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
def test_a_head_alone_learns_what_autograd_says(bases, storage):
    """The loss never forms the logits; autograd over the logits is the truth."""
    path, _, _ = bases("llama tied")
    quantize = None if storage is None else {"quant_type": "nf4", "embed_tokens": storage}
    ours = lk.load_model(path, dtype="float32", quantize=quantize)
    plain = logits_of(ours)
    lk.attach(ours, lk.LoraConfig(r=4, target_modules=["lm_head"]))
    assert_same(logits_of(ours), plain)
    disturb(trained(ours))
    ids = torch.arange(24).view(2, 12)
    total, count = ours.loss(ids, ids)
    total.backward()
    found = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    logits = ours(ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    assert count == 22
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same(found[name], parameter.grad)
    expected = logits_of(ours)
    lk.merge(ours)
    assert_same(logits_of(ours), expected)
    lk.merge(ours, base="dense")
