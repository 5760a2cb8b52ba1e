"""DoRA adapters made into plain LoRA: how good the approximation is, against peft in fp64."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from tests.adapters.common import edit_tensors, hugging_face
from tests.adapters.peft_files.adapters_of_peft import (
    CONFIG,
    IDS,
    LEAVES,
    LOGITS,
    PREFIX,
    WEIGHTS,
    deltas,
    peft_adapter,
    peft_logits,
)
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def dora(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("dora")
    model = peft_adapter(
        hugging_face(tiny_dir), path, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}
    )
    with torch.no_grad():
        logits = model(IDS).logits
    before = {n: p.clone() for n, p in hugging_face(tiny_dir).named_parameters()}
    merged = dict(model.merge_and_unload().named_parameters())
    return path, logits, {n: merged[n] - before[n] for n in before if n.split(".")[-2] in LEAVES}


def test_dora_of_full_rank(dora, tiny_dir, tmp_path):
    path, truth, _ = dora
    report = lk.convert_adapter(path, tmp_path / "out", base_model=tiny_dir, rank=48)
    # the layers are at most 32 wide on one side: nothing is lost but fp32 roundings
    assert report.relative_error < 1e-5
    after = peft_logits(hugging_face(tiny_dir), tmp_path / "out")
    assert (after - truth).abs().max() <= LOGITS
    assert (hugging_face(tiny_dir)(IDS).logits - truth).abs().max() > 0.1


@pytest.mark.parametrize("rank", [None, 1, 12])
def test_dora_is_approximated_as_well_as_can_be(dora, tiny_dir, tmp_path, rank):
    path, _, truth = dora
    report = lk.convert_adapter(path, tmp_path / "out", base_model=tiny_dir, rank=rank)
    kept = rank or 8  # twice the largest
    ours, missed, whole = deltas(tmp_path / "out"), 0.0, 0.0
    assert {f"{name}.weight" for name in ours} == truth.keys()
    for name, error in report.errors.items():
        delta = truth[f"{name}.weight"].double()
        values = torch.linalg.svdvals(delta)
        best = (values[kept:].norm() / values.norm()).item()
        real = ((ours[name][0] - delta).norm() / delta.norm()).item()
        # peft's merged weight less its base is a difference of fp32 numbers: 1e-6 of the delta
        assert error == pytest.approx(real, abs=1e-5)
        # subspace iteration with twice the vectors: within a percent of the optimum
        assert best - 1e-5 <= real <= 1.01 * best + 1e-5
        missed += real**2 * delta.norm().item() ** 2
        whole += delta.norm().item() ** 2
    assert report.relative_error == pytest.approx(math.sqrt(missed / whole), abs=1e-5)
    assert report.r == report.lora_alpha == kept
    assert f"approximated by rank {kept}" in str(report)
    assert str(report).count("\n") >= len(ours)


def test_dora_is_the_same_again(dora, tiny_dir, tmp_path):
    torch.manual_seed(1)
    lk.convert_adapter(dora[0], tmp_path / "a", base_model=tiny_dir)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    lk.convert_adapter(dora[0], tmp_path / "b", base_model=tiny_dir)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn from it


def test_dora_on_a_packed_base(tiny_dir, tmp_path):
    """The magnitudes belong to the weights that were trained on, as they are stored."""
    packed = lk.load_model(tiny_dir, dtype="float32", quantize="nf4", device="cpu")
    lk.save_model(packed, tmp_path / "packed", packed=True)
    base = hugging_face(tiny_dir)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.split(".")[-2] in LEAVES:
                module = packed.get_submodule(name.removesuffix(".weight"))
                parameter.copy_(module.dequantize())
    base.save_pretrained(tmp_path / "dense")
    truth = peft_adapter(base, tmp_path / "in", use_dora=True)(IDS).logits.detach()
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "packed", rank=48)
    after = peft_logits(hugging_face(tmp_path / "dense"), tmp_path / "out")
    assert (after - truth).abs().max() <= LOGITS


@pytest.mark.parametrize("outer", ["model.language_model.", "language_model.model."])
def test_dora_finds_a_text_model_by_its_other_names(dora, tiny_dir, tmp_path, outer):
    """Adapters of Gemma 3 with its vision tower name the layers so."""
    plain = lk.convert_adapter(dora[0], tmp_path / "plain", base_model=tiny_dir)
    shutil.copytree(dora[0], tmp_path / "in")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(f"{PREFIX}model.", PREFIX + outer)] = tensors.pop(name)

    edit_tensors(tmp_path / "in", rename)
    report = lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tiny_dir)
    assert list(report.errors.values()) == list(plain.errors.values())
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert all(name.startswith(f"{PREFIX}{outer}layers.") for name in names)
    written = json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]
    assert sorted(written) == sorted({name.split(".")[-3] for name in names})


def test_dora_of_a_tied_head(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    weight = base.lm_head.weight.detach().clone()
    model = peft_adapter(base, tmp_path / "in", use_dora=True, target_modules=["lm_head"])
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base", rank=32)
    layer = model.base_model.model.lm_head
    m, s = layer.lora_magnitude_vector["default"].weight.double(), layer.scaling["default"]
    adapted = weight + s * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    truth = (m / adapted.double().norm(dim=1))[:, None] * adapted.double() - weight.double()
    # of full rank: only fp32 roundings of a weight of some 1
    assert (deltas(tmp_path / "out")["lm_head"][0] - truth).abs().max() < 1e-5


def test_dora_with_rows_of_zeros(dora, tiny_dir, tmp_path):
    """A pruned row that the adapter does not touch stays zero; peft divides 0 by 0."""
    shutil.copytree(dora[0], tmp_path / "in")
    key = f"{PREFIX}model.layers.0.mlp.up_proj"

    def prune(tensors):
        tensors[f"{key}.lora_B.weight"][3] = 0
        tensors[f"{key}.lora_magnitude_vector"][3] = 0

    edit_tensors(tmp_path / "in", prune)
    model = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    lk.save_model(model, tmp_path / "base")
    lk.convert_adapter(tmp_path / "in", tmp_path / "out", base_model=tmp_path / "base", rank=32)
    assert deltas(tmp_path / "out")["model.layers.0.mlp.up_proj"][0][3].abs().max() < 1e-6


def test_dora_needs_its_base(dora, tiny_dir, tmp_path):
    with pytest.raises(lk.LorakitError, match=r"weights of the base: give base_model \(--base-m"):
        lk.convert_adapter(dora[0], tmp_path / "out")
    tiny_llama(num_hidden_layers=1, vocab_size=300).save_pretrained(tmp_path / "short")
    with pytest.raises(lk.LorakitError, match=r"has \(32, 32\)"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tmp_path / "short")
    tiny_llama(num_hidden_layers=1, num_key_value_heads=2).save_pretrained(tmp_path / "short")
    with pytest.raises(lk.LorakitError, match=r"layer model\.layers\.1\S* is none of"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tmp_path / "short")
    with pytest.raises(lk.LorakitError, match="rank must be a positive"):
        lk.convert_adapter(dora[0], tmp_path / "out", base_model=tiny_dir, rank=0)
    assert not (tmp_path / "out").exists()
