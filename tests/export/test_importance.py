"""Importance matrices: what is measured, what a file holds, and what they are good for."""

import dataclasses

import pytest
import torch

import lorakit as lk
from lorakit.export.importance import Importance
from lorakit.files.gguf import read_header
from lorakit.models.gguf import read_gguf
from lorakit.models.load import open_model
from tests.export.models import write_model

ROWS = [{"text": f"hello the {i} the hello {i * i}"} for i in range(40)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("mixtral") / "model", "mixtral")
    return path, lk.load_tokenizer(path), lk.load_model(path, dtype="float32")


@pytest.fixture(scope="module")
def measured(mixtral):
    _, tok, model = mixtral
    return lk.importance(model, tok, ROWS, tokens=300)


def test_it_is_the_sum_of_squares_of_what_layers_read(mixtral, measured):
    """The inputs are transformers'. Each token is routed to two of the four experts."""
    from transformers import AutoModelForCausalLM

    path, tok, model = mixtral
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen = []
    for layer in theirs.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    examples = lk.encode_rows(ROWS, tok, max_seq_length=64, train_on="all")
    ids = [token for example in examples for token in example.input_ids][:300]
    with torch.no_grad():
        for start in range(0, 300, 64):
            theirs(torch.tensor([ids[start : start + 64]]))
    squares = sum(x[0].double().square().sum(0) for x in seen[::2])
    name = "blk.0.attn_output.weight"
    # fp32 activations of two implementations
    assert torch.allclose(measured.sums[name][0].double(), squares, rtol=1e-4)
    assert measured.counts[name].tolist() == [300]
    assert measured.counts["blk.1.ffn_up_exps.weight"].sum() == 600
    assert measured.sums["blk.1.ffn_down_exps.weight"].shape == (4, 48)
    assert "output.weight" not in measured.sums
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_adapted_layer_reads_the_same(mixtral, measured):
    path, tok, _ = mixtral
    model = lk.attach(lk.load_model(path, dtype="float32"), lk.LoraConfig(r=2))
    found = lk.importance(model, tok, ROWS, tokens=300)
    assert found.sums.keys() == measured.sums.keys()
    for name in found.sums:  # B is zero
        assert torch.allclose(found.sums[name], measured.sums[name], rtol=1e-4), name


def test_a_file_holds_it(measured, tmp_path):
    measured.save(tmp_path / "new" / "imatrix.gguf")
    found = lk.load_importance(tmp_path / "new" / "imatrix.gguf")
    assert found.sums.keys() == measured.sums.keys()
    for name in found.sums:
        assert torch.equal(found.sums[name], measured.sums[name])
        assert torch.equal(found.counts[name], measured.counts[name])
    header = read_header(tmp_path / "new" / "imatrix.gguf")
    assert header.tensors["blk.0.ffn_up_exps.weight.counts"].shape == (4, 1)


def test_an_expert_without_tokens_counts_all_columns_alike(measured):
    name = "blk.0.ffn_up_exps.weight"
    counts = {**measured.counts, name: torch.tensor([0.0, 5.0, 5.0, 5.0])}
    columns = dataclasses.replace(measured, counts=counts).columns(name, (48, 32), 4)
    assert torch.equal(columns[0], torch.ones(32))
    assert torch.equal(columns[1], measured.sums[name][1] / 5)
    assert measured.columns("token_embd.weight", (300, 32), 1) is None


def test_it_makes_the_error_of_the_outputs_smaller(mixtral, measured, tmp_path):
    """That is what llama.cpp's search minimizes: the sum over columns of importance x error."""
    path, _, _ = mixtral

    stored, key = "blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"
    columns = measured.columns(stored, (32, 32), 1)[0]

    def error(imatrix):
        lk.export_gguf(path, tmp_path / "m.gguf", quantization="q4_0", imatrix=imatrix)
        difference = read_gguf(tmp_path / "m.gguf")[1][key].read() - dense
        return (difference.square() * columns).sum().item()

    dense = open_model(path)[1][key].read()
    assert error(measured) < 0.95 * error(None)


def test_what_is_wrong_is_said(mixtral, measured, tmp_path):
    path, tok, model = mixtral
    with pytest.raises(lk.LorakitError, match="tokens must be at least 1"):
        lk.importance(model, tok, ROWS, tokens=0)
    name = "blk.0.attn_q.weight"
    other = Importance({name: torch.ones(1, 31)}, {name: torch.ones(1)})
    with pytest.raises(lk.LorakitError, match="it is of another model"):
        lk.export_gguf(path, tmp_path / "m.gguf", quantization="q8_0", imatrix=other)
    lk.export_gguf(path, tmp_path / "m.gguf", quantization="f32")
    with pytest.raises(lk.LorakitError, match="no importance matrix"):
        lk.load_importance(tmp_path / "m.gguf")
    negative = {name: -sums for name, sums in measured.sums.items()}
    dataclasses.replace(measured, sums=negative).save(tmp_path / "bad.gguf")
    with pytest.raises(lk.LorakitError, match="NaN, infinite or negative"):
        lk.load_importance(tmp_path / "bad.gguf")
