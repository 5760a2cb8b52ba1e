"""New tokens, from the tokenizer to the merged model; the truth is PEFT on a resized model."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from tests.adapters.common import filled, hugging_face
from tests.adapters.parity import assert_same, logits_of
from tests.conftest import tiny, write_tokenizer

NEW = [f"<new{i}>" for i in range(40)]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    path = tmp_path / "base"
    tiny("llama", tie_word_embeddings=request.param, vocab_size=300).save_pretrained(path)
    write_tokenizer(path)
    return path


def grown(base, **options):
    """A model and a tokenizer with the new tokens, and an adapter that trains their rows."""
    model, tok = lk.load_model(base, dtype="float32"), lk.load_tokenizer(base)
    config = lk.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], **options)
    config = lk.add_tokens(model, tok, NEW, config)
    torch.manual_seed(0)
    return filled(lk.attach(model, config)), tok, config


def resized(base, size):
    theirs = hugging_face(base)
    theirs.resize_token_embeddings(size)
    return theirs


def test_new_rows_train_alone_and_load_in_peft(base, tmp_path):
    model, tok, config = grown(base)
    tied = model.lm_head is None
    ids = [tok.backend.token_to_id(text) for text in NEW]
    wanted = {"embed_tokens": ids} if tied else {"embed_tokens": ids, "lm_head": ids}
    assert config.trainable_token_indices == wanted
    assert model.config.vocab_size == max(300, len(tok))
    x = torch.tensor([[1, 5, ids[0], ids[-1], 7, ids[3]]])
    with torch.no_grad():
        expected = model(x)
    lk.save_adapter(model, tmp_path / "a")
    rows = [k for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if "token_ad" in k]
    assert len(rows) == len(wanted)
    theirs = peft.PeftModel.from_pretrained(resized(base, model.config.vocab_size), tmp_path / "a")
    with torch.no_grad():
        assert_same(theirs.eval()(x).logits, expected)
        again = lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")
        assert_same(again(x), expected)
    lk.merge(model)
    lk.save_model(model, tmp_path / "merged")
    with torch.no_grad():
        assert_same(hugging_face(tmp_path / "merged").eval()(x).logits, expected)


def test_gradients_of_rows_of_a_head_are_those_of_autograd(base):
    """The loss never forms the logits; autograd over the logits is the truth."""
    model, tok, _ = grown(base)
    ids = torch.tensor(
        [[1, 5, tok.backend.token_to_id(NEW[0]), 7, tok.backend.token_to_id(NEW[9])]]
    )
    model.loss(ids, ids)[0].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = model(ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    assert any("rows" in name for name in found)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_same(found[name], parameter.grad)


def test_rows_of_a_head_that_peft_trained(tmp_path):
    """PEFT trains rows of embedding and head by a mapping, each its own."""
    path = tmp_path / "base"
    tiny("llama", tie_word_embeddings=False).save_pretrained(path)
    tokens = {"embed_tokens": [3, 90], "lm_head": [4, 5, 96]}
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    theirs = peft.get_peft_model(hugging_face(path), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    filled(theirs).save_pretrained(tmp_path / "a")
    ours = lk.load_adapter(lk.load_model(path, dtype="float32"), tmp_path / "a")
    assert_same(logits_of(ours), logits_of(theirs))
    lk.merge(ours)
    assert_same(logits_of(ours), logits_of(theirs))
    lk.unmerge(ours)
    packed = lk.load_model(path, dtype="float32", quantize={"lm_head": "nf4"})
    lk.load_adapter(packed, tmp_path / "a")
    with torch.no_grad():
        hidden = packed.hidden_states(torch.arange(12)[None])
        rows = packed.lm_head.part.rows
        assert_same(packed.head(hidden)[..., tokens["lm_head"]], hidden @ rows.t())


def test_tokens_that_are_there_keep_their_ids_and_are_trained(base):
    model, tok = lk.load_model(base, dtype="float32"), lk.load_tokenizer(base)
    before, (first,) = len(tok), tok.add_special_tokens(["<more>"])
    config = lk.LoraConfig(trainable_token_indices=[7])
    config = lk.add_tokens(model, tok, ["<more>", "<most>"], config)
    assert config.trainable_token_indices["embed_tokens"] == [7, first, first + 1]
    assert len(tok) == before + 2
    whole = lk.LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    assert lk.add_tokens(model, tok, ["<last>"], whole) == whole


@pytest.mark.parametrize("tokens", ["<x>", ["<x>", "<x>"], [""], [3]])
def test_what_is_no_list_of_tokens(base, tokens):
    model, tok = lk.load_model(base, dtype="float32"), lk.load_tokenizer(base)
    before = len(tok)
    with pytest.raises(lk.LorakitError, match="a list of different texts"):
        lk.add_tokens(model, tok, tokens)
    lk.attach(model)
    with pytest.raises(lk.LorakitError, match="an adapter is attached"):
        lk.add_tokens(model, tok, ["<x>"])
    assert len(tok) == before


def test_a_tied_head_has_the_tokens_of_its_embedding(tmp_path):
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = lk.load_model(tmp_path, dtype="float32")
    tokens = {"embed_tokens": [3, 4], "lm_head": [3, 5]}
    options = {"target_modules": ["q_proj"], "trainable_token_indices": tokens}
    for module in (model, hugging_face(tmp_path)):
        with pytest.raises(lk.LorakitError, match="the head shares its weight with model.embed"):
            lk.attach(module, lk.LoraConfig(**options))
        tokens["lm_head"] = [4, 3]
        lk.attach(module, lk.LoraConfig(**options))
        tokens["lm_head"] = [3, 5]
