"""Models that other tools quantized: loaded, packed again, trained, saved and merged."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.load import open_model
from lorakit.models.packed_layers import Int8Linear, NF4Linear
from tests.conftest import LOGITS, tiny
from tests.models.damage import edit, fails
from tests.models.wrappers import wrapped

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

IDS = torch.arange(24).view(2, 12)


def fp8(weight, block, power_of_two=False):
    """Return FP8 codes and a scale for each block of a matrix."""
    height, width = block
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    tiles = whole.view(len(whole) // height, height, -1, width)
    scale = tiles.abs().amax((1, 3)) / 448
    if power_of_two:
        scale = scale.log2().ceil().exp2()
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(whole.shape)
    return codes[:rows, :columns].contiguous(), scale


def is_linear(name):
    return "vision" not in name and name.endswith("proj.weight")


def rewrite(path, change, **quantization):
    """Pass each linear weight of a saved model through change(name, weight) -> its tensors."""
    found = load_file(path / "model.safetensors")
    for name in filter(is_linear, list(found)):
        found |= change(name, found.pop(name))
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.fixture(scope="module")
def ministral(tmp_path_factory):
    """Ministral 3 as it is published: FP8, one scale a weight, in the wrapper mistral3."""
    path = tmp_path_factory.mktemp("fp8") / "ministral"
    wrapped("mistral3 around ministral3").save_pretrained(path)

    def change(name, weight):
        codes, scale = fp8(weight, weight.shape)
        layer = name.removesuffix("weight")
        return {
            name: codes,
            f"{layer}weight_scale_inv": scale.reshape(()),
            f"{layer}activation_scale": torch.tensor(0.5),
        }

    rewrite(
        path, change, quant_method="fp8", activation_scheme="static", weight_block_size=None,
        modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )  # fmt: skip
    return path


def test_ministral_as_published(ministral, tmp_path, caplog):
    """Its logits are those of transformers, which makes the same weights dense.

    It is saved dense, and the vision tower as it was.
    """
    theirs = AutoModelForImageTextToText.from_pretrained(
        ministral, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with caplog.at_level(logging.WARNING, "lorakit"):
        model = lk.load_model(ministral, dtype="float32", device="cpu")
    assert "read FP8 (one scale): 14 tensors" in caplog.text
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
    lk.save_model(model, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in {**config, **config["text_config"]}
    before, after = (load_file(p / "model.safetensors") for p in (ministral, tmp_path / "dense"))
    assert after.keys() == {name for name in before if not name.endswith(("_scale", "_scale_inv"))}
    assert all(torch.equal(after[name], before[name]) for name in after if "vision" in name)
    back = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS


@pytest.mark.parametrize(("quantize", "kind"), [("nf4", NF4Linear), ("int8", Int8Linear)])
def test_packing_again_is_packing_the_dense_weights(ministral, tmp_path, quantize, kind):
    lk.save_model(lk.load_model(ministral, dtype="float32"), tmp_path / "dense")
    model, expected = (
        lk.load_model(path, dtype="float32", quantize=quantize, device="cpu")
        for path in (ministral, tmp_path / "dense")
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, kind)
    assert torch.equal(model(IDS), expected(IDS))


def test_training_saving_and_merging(ministral, tmp_path):
    """An adapter that was trained on packed weights is merged into the dense ones."""
    model = lk.load_model(ministral, dtype="float32", quantize="nf4", device="cpu")
    lk.attach(model, lk.LoraConfig(r=4))
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_B.grad.abs().max() > 0
    with torch.no_grad():
        layer.lora_B.normal_()
    lk.save_adapter(model, tmp_path / "adapter")
    merged = lk.load_model(ministral, dtype="float32", device="cpu")
    lk.load_adapter(merged, tmp_path / "adapter")
    expected = merged(IDS)
    lk.merge(merged)
    lk.save_model(merged, tmp_path / "merged")
    again = lk.load_model(tmp_path / "merged", dtype="float32", device="cpu")
    # the update is added to W once, or its product to W x: fp32 in another order
    assert (again(IDS) - expected).abs().max() <= LOGITS


@pytest.mark.parametrize("scales", ["float32", "uint8", "float8_e8m0fnu"])
def test_blocks_are_those_of_transformers(scales):
    """Weights of [6, 8] blocks have the very bits that transformers' dequantizing gives."""
    from lorakit.files.safetensors import LazyTensor
    from lorakit.models.quantized_files.fold import dequantized

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=g)
    codes, scale = fp8(weight, (6, 8), power_of_two=scales != "float32")
    if scales == "uint8":
        scale = (scale.log2() + 127).to(torch.uint8)
    else:
        scale = scale.to(getattr(torch, scales))
    header = {"float32": "F32", "uint8": "U8", "float8_e8m0fnu": "F8_E8M0"}[scales]
    tensors = {
        "w.weight": LazyTensor((24, 40), lambda: codes, None, "F8_E4M3"),
        "w.weight_scale_inv": LazyTensor(tuple(scale.shape), lambda: scale, None, header),
    }
    said = {"quant_method": "fp8", "weight_block_size": [6, 8]}
    found = dequantized(tensors, said, "here")[0]["w.weight"].read()
    for dtype in (torch.float32, torch.bfloat16):
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, dtype)
        assert torch.equal(found.to(dtype), expected)


def gptq(name, weight):
    """Return a weight in GPTQ's layout: 8 bits, one group, zero point 128 stored as 127."""
    scale = (weight.abs().amax(1) / 127).half().float()
    numbers = ((weight / scale[:, None]).round() + 128).long().t()  # [in, out]
    shifts = torch.arange(0, 32, 8)

    def words(four, dim):
        found = (four << shifts.view([-1 if i == dim else 1 for i in range(four.dim())])).sum(dim)
        return torch.where(found >> 31 > 0, found - (1 << 32), found).int()

    layer = name.removesuffix("weight")
    zeros = torch.full((1, len(scale) // 4, 4), 127)
    return {
        f"{layer}qweight": words(numbers.view(-1, 4, numbers.shape[1]), 1),
        f"{layer}qzeros": words(zeros, 2),
        f"{layer}scales": scale[None].half(),
        f"{layer}g_idx": torch.zeros(len(numbers), dtype=torch.int32),
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("gptq") / "llama"
    torch.manual_seed(0)
    tiny("llama").save_pretrained(path)
    rewrite(path, gptq, quant_method="gptq", bits=8, group_size=-1, desc_act=False)
    return path


def test_a_model_of_gptq_is_near_the_one_it_was_made_of(llama, tmp_path, caplog):
    """8 bits a row change a weight by up to 1/254 of the row's largest, and the logits a little."""
    with caplog.at_level(logging.WARNING, "lorakit"):
        model = lk.load_model(llama, dtype="float32", device="cpu")
    said = "read GPTQ (8 bits, a scale per row): 14 tensors"
    assert caplog.text.count(said) == 1
    open_model(llama)  # it reads none of them
    assert caplog.text.count(said) == 1
    torch.manual_seed(0)
    original = tiny("llama").eval()
    for name, weight in original.named_parameters():
        if is_linear(name):
            error = (model.get_parameter(name) - weight).abs().amax(1)
            # half a step, whose length is rounded to fp16 first, and the rounding of fp32
            assert (error <= weight.abs().amax(1) / 254 * (1 + 2**-10)).all()
    lk.save_model(model, tmp_path / "dense")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS


@pytest.mark.parametrize("mark", ["weight_scale_inv", "weight_scale"])
def test_fp8_has_its_scales_under_either_name(mark, tmp_path):
    """AutoFP8, which wrote many of the FP8 files before llm-compressor, calls them weight_scale."""
    tiny("llama").save_pretrained(tmp_path)

    def change(name, weight):
        codes, scale = fp8(weight, weight.shape)
        layer = name.removesuffix("weight")
        return {
            name: codes,
            f"{layer}{mark}": scale.reshape(1),
            f"{layer}input_scale": torch.ones(1),
        }

    rewrite(tmp_path, change, quant_method="fp8", activation_scheme="static")
    model = lk.load_model(tmp_path, dtype="float32", device="cpu")
    found = load_file(tmp_path / "model.safetensors")
    name = f"{UP}weight"
    assert torch.equal(model.get_parameter(name), found[name].float() * found[f"{UP}{mark}"])


def test_biases_of_zeros_that_gptq_writes_for_all_layers_are_left_out(llama, tmp_path):
    """AutoGPTQ wrote one for each linear layer, also of models without biases."""
    found = load_file(llama / "model.safetensors")
    more = {f"{UP}bias": torch.zeros(48, dtype=torch.float16)}
    save_file(found | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    model, expected = (lk.load_model(p, dtype="float32", device="cpu") for p in (tmp_path, llama))
    assert torch.equal(model(IDS), expected(IDS))
    more[f"{UP}bias"][3] = 1
    save_file(found | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fails(tmp_path, "up_proj.bias belongs to no part of the model")


def test_modelopt_says_what_it_did_in_a_file_of_its_own(tmp_path):
    tiny("llama").save_pretrained(tmp_path)

    def change(name, weight):
        codes, scale = fp8(weight, weight.shape)
        return {name: codes, f"{name}_scale": scale.reshape(())}

    rewrite(tmp_path, change, quant_method="modelopt")
    expected = lk.load_model(tmp_path, dtype="float32", device="cpu")(IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(tmp_path, "weight_scale belongs to no part of the model")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert torch.equal(lk.load_model(tmp_path, dtype="float32", device="cpu")(IDS), expected)


def test_8_bit_floats_without_scales_are_no_weights(copy):
    edit(copy, lambda f: f.update({f"{UP}weight": f[f"{UP}weight"].to(torch.float8_e4m3fn)}))
    fails(copy, "up_proj.weight: holds torch.float8_e4m3fn; only weights of 16 bits and more")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    fails(copy, "up_proj.weight holds F8_E4M3, its scales are missing")


UP = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(f"{UP}scales"), "up_proj.weight: .*up_proj.scales is missing"),
        (
            lambda f: f.pop(f"{UP}qweight"),
            "up_proj.(qzeros|scales|g_idx) belongs to no part|missing",
        ),
        (lambda f: f[f"{UP}scales"].fill_(torch.inf), "up_proj.weight: its scales hold NaN"),
        (lambda f: f[f"{UP}g_idx"].fill_(1), "up_proj.weight: a column is in group 1, of 1"),
        (lambda f: f.update({f"{UP}qzeros": f[f"{UP}qzeros"][:, :-1].clone()}), "zero points are"),
        (lambda f: f.update({f"{UP}g_idx": f[f"{UP}g_idx"][:-1].clone()}), "2, 3, 4 and 8 bits"),
        (lambda f: f.update({f"{UP}scales": f[f"{UP}scales"].double()}), "holds F64, not F32"),
        (lambda f: f.update({f"{UP}weight": torch.ones(48, 32)}), "there a second time"),
    ],
)
def test_damage_is_said_in_one_sentence(llama, tmp_path, change, message):
    found = load_file(llama / "model.safetensors")
    change(found)
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    fails(tmp_path, message)


@settings(max_examples=30)  # of a model that is loaded
@given(st.data())
def test_any_damage_to_values_or_config_loads_or_is_refused(llama, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged")
    found = load_file(llama / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(name for name in found if UP in name)))
    values = found[name].view(torch.uint8).flatten()
    at = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=4))
    values[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2))
    found[name] = found[name][: len(found[name]) - cut].clone()
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    key = data.draw(st.sampled_from(["quant_method", "bits", "group_size", "checkpoint_format"]))
    odd = st.none() | st.integers(-9, 9) | st.sampled_from(["gptq_v2", "awq", "fp8", [], {}])
    config["quantization_config"][key] = data.draw(odd)
    (path / "config.json").write_text(json.dumps(config))
    try:
        lk.load_model(path, dtype="float32", device="cpu")
    except lk.LorakitError as error:
        assert "\n" not in str(error)
