"""A larger vocabulary: old rows stay, new ones are the mean, and transformers reads the result."""

import pytest
import torch

import lorakit as lk
from tests.conftest import tiny

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    path = tmp_path / "base"
    tiny("llama", tie_word_embeddings=request.param).save_pretrained(path)
    return path


def test_old_tokens_compute_as_before_and_new_ones_are_the_mean(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = lk.load_model(base, dtype="float32")
    with torch.no_grad():
        before, size = model(IDS), model.config.vocab_size
        assert lk.resize_embeddings(model, size + 3) is model
        after = model(IDS)
    assert torch.equal(after[..., :size], before)
    # the mean of fp32 logits, summed in another order
    assert (after[..., size:] - before.mean(-1, keepdim=True)).abs().max() < 1e-5
    lk.save_model(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert theirs.config.vocab_size == size + 3
    ids = IDS.clone()
    ids[0, 3] = size + 2
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4  # two implementations in fp32
    assert torch.equal(lk.load_model(tmp_path / "saved", dtype="float32")(ids), model(ids))


def test_packed_matrices_become_dense_with_the_same_values(base, caplog):
    tied = lk.load_model(base).lm_head is None
    quantize = {"quant_type": "nf4", "embed_tokens": "nf4"} | ({} if tied else {"lm_head": "int8"})
    model = lk.load_model(base, dtype="float32", quantize=quantize)
    old = model.model.embed_tokens.dequantize()
    with torch.no_grad():
        before = model(IDS)
        lk.resize_embeddings(model, 99)
        # the packed head multiplies in another order
        assert (model(IDS)[..., :97] - before).abs().max() < 1e-4
    assert torch.equal(model.model.embed_tokens.weight[:97], old)
    assert "becomes dense" in caplog.text


def test_what_cannot_be_resized(base):
    model = lk.load_model(base, dtype="float32")
    weight = model.model.embed_tokens.weight
    for size in (96, -1, 98.0, None):
        with pytest.raises(lk.LorakitError, match="a whole number from 97 on"):
            lk.resize_embeddings(model, size)
    assert lk.resize_embeddings(model, 97).model.embed_tokens.weight is weight
    with pytest.raises(lk.LorakitError, match="a lorakit decoder is wanted"):
        lk.resize_embeddings(torch.nn.Linear(2, 2), 3)
    lk.attach(model)
    with pytest.raises(lk.LorakitError, match="an adapter is attached"):
        lk.resize_embeddings(model, 100)
    assert model.config.vocab_size == 97
