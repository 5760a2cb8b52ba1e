"""The second embedding, which stays in its file, and the models that have one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.models.per_layer import host_tables
from tests.conftest import FAMILY_VARIANTS, GEMMA4_LARGE, GEMMA4_SMALL, tiny

NAME = "model.embed_tokens_per_layer.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny Gemma 4 as its small models are, saved by transformers."""
    path = tmp_path_factory.mktemp("small")
    tiny("gemma4_text", **GEMMA4_SMALL).save_pretrained(path)
    return path


def file_at(address):
    """The file that is mapped at an address of this process, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return path[0] if path else ""
    return ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_stays_in_its_file(small, dtype):
    """Also of another dtype than the model's: rows are converted when they are looked up."""
    model = lk.load_model(small, dtype=dtype, quantize={"embed_tokens": "nf4"}, device="cpu")
    weight = model.model.embed_tokens_per_layer.weight
    assert file_at(weight.data_ptr()) == str(small / "model.safetensors")
    assert (weight.dtype, weight.requires_grad) == (torch.float32, False)
    assert torch.equal(weight, load_file(small / "model.safetensors")[NAME])
    assert NAME not in dict(model.named_parameters())
    assert list(host_tables(model)) == [NAME]
    ids = torch.tensor([[3, 96, 3]])
    rows = model.model.embed_tokens_per_layer(ids, model.dtype)
    assert torch.equal(rows, weight[ids].to(model.dtype))
    assert model(ids).dtype == model.dtype


def test_it_goes_with_no_move_of_the_model(small):
    model = lk.load_model(small, dtype="float32", device="cpu")
    weight = model.model.embed_tokens_per_layer.weight
    model.to(torch.bfloat16).requires_grad_(True)
    assert model.model.embed_tokens_per_layer.weight is weight
    assert weight.dtype == torch.float32
    assert not weight.requires_grad


def test_it_is_written_back(small, tmp_path):
    """It is read from its file, and keeps the dtype that it has there."""
    model = lk.load_model(small, dtype="bfloat16", quantize="nf4", device="cpu")
    for path in (tmp_path / "a", tmp_path / "b"):
        lk.save_model(model, path, packed=path.name == "b")
        written = load_file(path / "model.safetensors")[NAME]
        assert torch.equal(written, load_file(small / "model.safetensors")[NAME])
        again = lk.load_model(path, dtype="bfloat16", device="cpu")
        # dense products run in another order than packed ones, in bf16
        assert (again(torch.arange(9)[None]) - model(torch.arange(9)[None])).abs().max() < 0.1


def test_a_model_without_a_file_has_a_table_of_its_own():
    config = lk.ModelConfig.from_hf(
        {**tiny("gemma4_text", **GEMMA4_SMALL).config.to_dict(), "vocab_size_per_layer_input": 99}
    )
    model = Decoder(config)
    assert host_tables(model)[NAME].weight.shape == (99, 6 * 8)
    assert model(torch.arange(9)[None]).isfinite().all()


def test_what_a_model_with_a_table_refuses(small):
    model = lk.load_model(small, dtype="float32", device="cpu")
    with pytest.raises(lk.LorakitError, match="second embedding .* gets no new rows"):
        lk.resize_embeddings(model, 100)
    for config in (lk.PromptTuningConfig, lk.PromptEncoderConfig):
        with pytest.raises(lk.LorakitError, match="second embedding .* has nothing for them"):
            lk.attach(model, config(num_virtual_tokens=2))
    with pytest.raises(lk.LorakitError, match="one size for every layer.*; use LoRA$"):
        lk.attach(model, lk.PrefixTuningConfig(num_virtual_tokens=2))


def test_a_model_without_a_table_takes_the_prompt_that_its_refusal_names():
    model = Decoder(lk.ModelConfig.from_hf(tiny("gemma4_text", **GEMMA4_LARGE).config.to_dict()))
    with pytest.raises(lk.LorakitError, match="; use LoRA or prompt tuning$"):
        lk.attach(model, lk.PrefixTuningConfig(num_virtual_tokens=2))
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=2))
    assert model(torch.arange(9)[None]).isfinite().all()


def test_a_table_of_another_size_is_refused(small, tmp_path):
    tensors = load_file(small / "model.safetensors")
    tensors[NAME] = tensors[NAME][:, 1:].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    with pytest.raises(lk.LorakitError, match="embed_tokens_per_layer.weight is .97, 47., the con"):
        lk.load_model(tmp_path)


def test_tensors_of_layers_that_see_others_keys_are_passed_over(small, tmp_path):
    """Some published files hold them; nothing computes with them. Others are no part of it."""
    tensors = load_file(small / "model.safetensors")
    expected = lk.load_model(small, dtype="float32", device="cpu")(torch.arange(9)[None])
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    beside = {
        f"model.layers.5.self_attn.{name}.weight": torch.randn(2, 2)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    save_file(tensors | beside, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(model(torch.arange(9)[None]), expected)
    more = {"model.layers.5.self_attn.p_proj.weight": torch.randn(2, 2)}
    save_file(tensors | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lk.LorakitError, match="p_proj.weight belongs to no part of the model"):
        lk.load_model(tmp_path)


def step(model, **how):
    ids = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    loss, _ = model.loss(ids, ids, **how)
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gemma4_text small", "gemma4_text large"])
@pytest.mark.parametrize("how", [{}, {"cu_seqlens": torch.tensor([0, 9, 24])}], ids=["", "packed"])
def test_gradient_checkpointing_changes_nothing(tmp_path, name, how):
    """Not in the layers whose keys others see either: their gradients are sums over layers."""
    family, options = FAMILY_VARIANTS[name]
    tiny(family, **options).save_pretrained(tmp_path)
    for trains in (None, lk.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)):
        model = lk.load_model(tmp_path, dtype="float32", device="cpu")
        if trains is not None:
            lk.attach(model, trains)
        expected, grads = step(model, **how)
        model.gradient_checkpointing = True
        found, again = step(model, **how)
        assert torch.equal(expected, found)
        assert grads.keys() == again.keys()
        assert all(torch.equal(grads[each], again[each]) for each in grads)


def test_lora_reaches_each_layer_that_there_is(small):
    """A layer that sees others' keys has q_proj and o_proj alone."""
    model = lk.load_model(small, dtype="float32", device="cpu")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters()} - {""}
    kinds = {(int(name.split(".")[2]), name.split(".")[4]) for name in adapted}
    every = {(layer, kind) for layer in range(6) for kind in ("q_proj", "o_proj")}
    assert kinds == every | {(layer, kind) for layer in range(3) for kind in ("k_proj", "v_proj")}
    _, grads = step(model)
    assert all(grads[name].abs().max() > 0 for name in grads if "lora_B" in name)
