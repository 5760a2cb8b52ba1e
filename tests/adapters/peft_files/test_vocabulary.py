"""Whole embeddings and larger vocabularies in PEFT's files; the truth is PEFT's own model."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.manage import attached
from tests.adapters.common import edit_config, edit_tensors, filled, hugging_face
from tests.adapters.peft_files.adapters_of_peft import LOGITS, PREFIX, WEIGHTS
from tests.conftest import tiny

EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
IDS = torch.arange(24).view(2, 12)
LAST = torch.tensor([[1, 96, 97, 98, 3]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    path = tmp_path / "base"
    tiny("llama", tie_word_embeddings=request.param).save_pretrained(path)
    return path


def tied(base):
    return lk.load_model(base).lm_head is None


def peft_saves(theirs, path, *, whole="auto", **options):
    """A PEFT adapter of random values, saved; the model itself."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    model = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(0)
    filled(model).save_pretrained(path, save_embedding_layers=whole)
    return model


def resized(base, size=99):
    theirs = hugging_face(base)
    torch.manual_seed(5)
    theirs.resize_token_embeddings(size)
    return theirs


def agrees(ours, theirs, ids):
    with torch.no_grad():
        return (ours(ids) - theirs(ids).logits).abs().max() <= LOGITS


def test_copies_of_what_the_model_has_are_left_out(base, tmp_path):
    theirs = peft_saves(hugging_face(base), tmp_path / "a", whole=True)
    assert {EMBEDDING, HEAD} <= load_file(tmp_path / "a" / WEIGHTS).keys()
    ours = lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")
    assert agrees(ours, theirs, IDS)
    assert not any(isinstance(each, SavedModule) for each in attached(ours).values())


def test_other_weights_take_the_place_of_the_models(base, tmp_path, caplog):
    """The logits are PEFT's, which loads them into the base; here the base stays as it was."""
    other = hugging_face(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
        other.get_output_embeddings().weight.add_(0.1)
    theirs = peft_saves(other, tmp_path / "a", whole=True)
    ours = lk.load_model(base, dtype="float32")
    plain = ours(IDS)
    lk.load_adapter(ours, tmp_path / "a")
    assert "differs from the model's and takes its place" in caplog.text
    assert agrees(ours, theirs, IDS)
    assert agrees(ours, peft.PeftModel.from_pretrained(hugging_face(base), tmp_path / "a"), IDS)
    lk.save_adapter(ours, tmp_path / "b")
    again = lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "b")
    assert torch.equal(again(IDS), ours(IDS))
    lk.detach(ours)
    assert torch.equal(ours(IDS), plain)


def test_a_tied_head_that_differs_is_refused(base, tmp_path):
    if not tied(base):
        pytest.skip("of tied models")
    peft_saves(hugging_face(base), tmp_path / "a", whole=True)

    def change(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING] * 2
        tensors[HEAD] = tensors[HEAD] + 1

    edit_tensors(tmp_path / "a", change)
    with pytest.raises(lk.LorakitError, match="and in this model they are tied"):
        lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")


FORMS = {
    "q_proj": {},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows": {"trainable_token_indices": [97, 98]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_gets_rows_for_the_tokens_of_an_adapter(base, tmp_path, form, caplog):
    options = dict(FORMS[form])
    if tied(base) and form == "whole modules":
        options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    if tied(base) and form == "an embedding":
        options["ensure_weight_tying"] = True
    theirs = peft_saves(resized(base), tmp_path / "a", **options)
    ours = lk.load_model(base, dtype="float32")
    lk.load_adapter(ours, tmp_path / "a")
    assert "the adapter has 99 tokens and the model 97" in caplog.text
    assert agrees(ours, theirs, LAST)
    again = lk.resize_embeddings(lk.load_model(base, dtype="float32"), 99)
    if form in ("q_proj", "whole modules"):
        lk.load_adapter(again, tmp_path / "a")
        assert agrees(again, theirs, LAST)
    else:  # rows that lie under the adapter are of another model
        with pytest.raises(lk.LorakitError, match="load it onto the model as it was"):
            lk.load_adapter(again, tmp_path / "a")


def test_a_refusal_leaves_the_vocabulary_as_it_was(base, tmp_path):
    peft_saves(resized(base), tmp_path / "a")
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(tmp_path / "a", lambda tensors: tensors.pop(key))
    ours = lk.load_model(base, dtype="float32")
    before = dict(ours.named_modules())
    with pytest.raises(lk.LorakitError, match="lora_A.weight is missing"):
        lk.load_adapter(ours, tmp_path / "a")
    assert ours.config.vocab_size == 97
    assert dict(ours.named_modules()) == before


def test_a_model_with_adapters_does_not_grow(base, tmp_path):
    peft_saves(resized(base), tmp_path / "a")
    ours = lk.attach(lk.load_model(base, dtype="float32"), name="first")
    with pytest.raises(lk.LorakitError, match="99 tokens and the model 97: detach the adapters"):
        lk.load_adapter(ours, tmp_path / "a")


def test_tokens_with_a_gap_before_them_are_refused(base, tmp_path):
    """The file would not hold every new row; a huge number must not cost memory."""
    peft_saves(hugging_face(base), tmp_path / "a", trainable_token_indices=[3, 4])
    edit_config(tmp_path / "a", trainable_token_indices=[3, 10**12])
    with pytest.raises(lk.LorakitError, match="different whole numbers from 0 to 96"):
        lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")


def test_two_names_of_a_trained_weight_must_agree(base, tmp_path):
    peft_saves(hugging_face(base), tmp_path / "a", modules_to_save=["norm"])
    first = f"{PREFIX}model.norm.weight"
    second = f"{PREFIX}model.norm.modules_to_save.weight"
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({second: tensors[first].clone()}))
    lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({second: tensors[first] + 1}))
    with pytest.raises(lk.LorakitError, match=r"modules_to_save.weight differs from"):
        lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")
