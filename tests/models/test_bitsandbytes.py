"""Models packed by bitsandbytes: read, written, and read by transformers again.

Widths are multiples of the block size: elsewhere bitsandbytes' AVX-512 kernel is wrong.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.packed_layers import Int8Linear, NF4Linear
from tests.conftest import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
# fp32 products in another order, by other libraries: at most 5.1e-5 was seen (Mixtral, up to 6)
TOLERANCE = 1e-4


def four_bits(**options):
    return {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, **options}


FORMATS = {
    "nf4": four_bits(bnb_4bit_quant_type="nf4"),
    "nf4, double": four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": four_bits(bnb_4bit_quant_type="fp4"),
    "fp4, double": four_bits(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    **{
        f"storage {dtype}": four_bits(
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=dtype
        )
        for dtype in ("bfloat16", "float16", "float32")
    },
    "dynamic": four_bits(
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"],
    ),
    "head too": four_bits(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["embed_tokens"]),
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch):
    """A processor with AVX512-BF16 has bitsandbytes' products in bf16 otherwise."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def packed(tmp_path, family="llama", options=FORMATS["nf4, double"], **overrides):
    """A transformers + bitsandbytes model, and where it is saved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, **overrides}
    tiny(family, **sizes).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    model.save_pretrained(tmp_path / "packed")
    return model, tmp_path / "packed"


def reopened(path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def same_logits(theirs, ours, tolerance=TOLERANCE):
    expected = theirs(IDS).logits
    assert expected.abs().max() > 5  # a tolerance that means something
    assert (ours(IDS) - expected).abs().max() < tolerance


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_there_and_back(tmp_path, options):
    """lorakit computes the logits of what transformers saves, and saves the same bytes again.

    The bytes are compared as uint8. transformers loads them again.
    """
    theirs, path = packed(tmp_path, options=options)
    ours = lk.load_model(path, dtype="float32", device="cpu")
    lk.save_model(ours, tmp_path / "again", packed=True)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (path, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].flatten(), tensor.flatten().view(after[name].dtype)), name
    back = reopened(tmp_path / "again")
    if "load_in_8bit" in options:
        # their product quantizes the activations too; the weights are to be the same
        back, theirs = back.dequantize(torch.float32), theirs.dequantize(torch.float32)
    same_logits(theirs, ours)
    same_logits(back, ours)
    kind = Int8Linear if "load_in_8bit" in options else NF4Linear
    assert isinstance(ours.model.layers[0].self_attn.k_proj, kind)
    assert type(ours.model.layers[1].mlp.up_proj) is (
        torch.nn.Linear
        if "model.layers.1.mlp" in options.get("llm_int8_skip_modules", [])
        else kind
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"])
def test_other_families(tmp_path, family):
    """transformers 5 leaves the experts of a mixture dense: they are read as they are."""
    extra = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    theirs, path = packed(tmp_path, family, **extra)
    ours = lk.load_model(path, dtype="float32", device="cpu")
    same_logits(theirs, ours)
    lk.save_model(ours, tmp_path / "again", packed=True)
    same_logits(reopened(tmp_path / "again"), ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "quant",
    [
        {},
        {"block_size": 128, "double_quant": False},
        {"quant_type": "fp4"},
        {"search_scales": True},
        {"quant_type": "int8"},
        {"skip_modules": ["gate", "o_proj"]},
        {"lm_head": "nf4"},
        {"lm_head": "int8"},
        {"embed_tokens": "int8"},
    ],
    ids=str,
)
def test_what_lorakit_quantized(tmp_path, caplog, quant, tied):
    if tied and "lm_head" in quant:
        pytest.skip("a tied head is the embedding")
    torch.manual_seed(0)
    width = quant.get("block_size", 64)  # or their AVX-512 kernel is wrong
    sizes = {"hidden_size": width, "intermediate_size": 128, "tie_word_embeddings": tied}
    tiny("llama", **sizes).save_pretrained(tmp_path / "dense")
    ours = lk.load_model(tmp_path / "dense", dtype="float32", quantize=quant, device="cpu")
    lk.save_model(ours, tmp_path / "packed", packed=True)
    written_dense = "embed_tokens" in quant or quant.get("lm_head") == "int8"
    assert ("written dense" in caplog.text) == written_dense
    theirs = reopened(tmp_path / "packed")
    if quant.get("quant_type") == "int8":
        theirs = theirs.dequantize(torch.float32)
    same_logits(theirs, ours)
    again = lk.load_model(tmp_path / "packed", dtype="float32", device="cpu")
    assert torch.allclose(again(IDS), ours(IDS), rtol=0, atol=1e-5)


def test_packed_experts(tmp_path, caplog):
    """Each expert is saved packed under a name of its own, as transformers 4 wrote it."""
    torch.manual_seed(0)
    tiny("mixtral", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "dense")
    ours = lk.load_model(tmp_path / "dense", dtype="float32", quantize="nf4", device="cpu")
    lk.save_model(ours, tmp_path / "packed", packed=True)
    assert "transformers 5 has none" in caplog.text
    again = lk.load_model(tmp_path / "packed", dtype="float32", device="cpu")
    assert isinstance(again.model.layers[0].block_sparse_moe.experts[1].w1, NF4Linear)
    assert torch.equal(again(IDS), ours(IDS))


def test_training_and_merging_on_a_packed_model(tmp_path):
    _, path = packed(tmp_path)
    model = lk.load_model(path, dtype="float32", device="cpu")
    lk.attach(model, lk.LoraConfig(r=4))
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_B.grad.abs().max() > 0
    with torch.no_grad():
        layer.lora_B.normal_()
    with pytest.raises(lk.LorakitError, match="an adapter is attached"):
        lk.save_model(model, tmp_path / "none", packed=True)
    lk.merge(model)
    expected = model(IDS)
    lk.save_model(model, tmp_path / "merged")
    dense = lk.load_model(tmp_path / "merged", dtype="float32", device="cpu")
    assert torch.allclose(dense(IDS), expected, rtol=0, atol=1e-5)
    with pytest.raises(lk.LorakitError, match="no linear layer is packed"):
        lk.save_model(dense, tmp_path / "none", packed=True)


def test_packed_towers_beside_a_text_model(tmp_path):
    """The text of a packed multimodal model is read; what cannot be written is refused."""
    _, path = packed(tmp_path, "gemma3_text")
    text = json.loads((path / "config.json").read_text())
    found = load_file(path / "model.safetensors")
    named = {f"language_model.{name}": tensor for name, tensor in found.items()}
    tower = {
        name.replace("model.layers.0.self_attn.q_proj", "vision_tower.proj"): tensor.clone()
        for name, tensor in found.items()
        if "layers.0.self_attn.q_proj" in name
    }
    outer = {"model_type": "gemma3", "quantization_config": text.pop("quantization_config")}
    (path / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    save_file(named | tower, path / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(path, dtype="float32", device="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    with pytest.raises(lk.LorakitError, match="towers that are packed"):
        lk.save_model(model, tmp_path / "out")

    dense = {"vision_tower.proj.weight": torch.ones(4, 4)}
    save_file(named | dense, path / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(path, dtype="float32", device="cpu")
    with pytest.raises(lk.LorakitError, match="packed=False only"):
        lk.save_model(model, tmp_path / "out", packed=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(lk.LorakitError, match="while it writes; choose another directory"):
        lk.save_model(model, path)
    lk.save_model(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = lk.load_model(tmp_path / "out", dtype="float32", device="cpu")
    assert (again(IDS) - model(IDS)).abs().max() <= TOLERANCE  # packed products, dense ones


def test_quantize_is_not_applied_to_what_is_quantized(tmp_path, caplog):
    _, path = packed(tmp_path, options=FORMATS["dynamic"])
    with caplog.at_level(logging.WARNING, "lorakit"):
        model = lk.load_model(path, dtype="float32", quantize="nf4", device="cpu")
    assert "is quantized already (nf4); it stays as it is" in caplog.text
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    # what is left can be packed by name
    lk.quantize(model, lk.QuantConfig(embed_tokens="int8", lm_head="int8"))
    assert isinstance(model.lm_head, Int8Linear)


def damaged(path, change):
    file = path / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})
    return path


NAME = "model.layers.0.self_attn.q_proj.weight"
MARK = f"{NAME}.quant_state.bitsandbytes__nf4"


def edit_state(found, **changes):
    state = json.loads(bytes(found[MARK].tolist())) | changes
    found[MARK] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(NAME), "q_proj.weight is missing, its scales are there"),
        (lambda f: f.pop(f"{NAME}.absmax"), "q_proj.weight: .*absmax is missing"),
        (lambda f: f.pop(f"{NAME}.quant_map"), "q_proj.weight: .*quant_map is missing"),
        (lambda f: f.pop(f"{NAME}.nested_absmax"), "q_proj.weight: .*nested_absmax is missing"),
        (lambda f: f[f"{NAME}.quant_map"].mul_(1.01), "quant_map is another code"),
        (lambda f: f.update({f"{NAME}.absmax": f[f"{NAME}.absmax"][:-1].clone()}), "absmax holds"),
        (lambda f: f.update({NAME: f[NAME][:-1].clone()}), "codes holds 2047 values"),
        (lambda f: edit_state(f, shape=[64, 32]), r"q_proj.weight is \(64, 32\), the config asks"),
        (lambda f: edit_state(f, shape=[-64, 64]), "quant_state has shape"),
        (lambda f: edit_state(f, blocksize=48), "quant_state has blocksize 48"),
        (lambda f: edit_state(f, blocksize=64.0), "quant_state has blocksize 64.0"),
        (lambda f: f[f"{NAME}.nested_absmax"].fill_(torch.nan), "scales hold NaN or infinite"),
        (lambda f: edit_state(f, quant_type="fp4"), "quant_state has quant_type 'fp4'"),
        (lambda f: edit_state(f, nested_offset=float("nan")), "quant_state has nested_offset nan"),
        (lambda f: f.update({MARK: torch.zeros(9, dtype=torch.uint8)}), "is no JSON"),
        (lambda f: f.pop(MARK), "tensor .*q_proj.weight"),
    ],
)
def test_what_is_damaged_is_said_in_one_sentence(tmp_path, change, message):
    _, path = packed(tmp_path)
    with pytest.raises(lk.LorakitError, match=message) as error:
        lk.load_model(damaged(path, change))
    assert "\n" not in str(error.value)


def test_int8_with_a_scale_that_is_nan(tmp_path):
    _, path = packed(tmp_path, options=FORMATS["int8"])
    scale = NAME.replace("weight", "SCB")
    with pytest.raises(lk.LorakitError, match=r"q_proj.weight: its scales hold NaN"):
        lk.load_model(damaged(path, lambda found: found[scale].fill_(torch.nan)))


def test_int8_without_scales(tmp_path):
    _, path = packed(tmp_path, options=FORMATS["int8"])

    def change(found):
        for end in ("SCB", "weight_format"):
            del found[NAME.replace("weight", end)]

    with pytest.raises(lk.LorakitError, match=r"q_proj.weight: holds torch.int8"):
        lk.load_model(damaged(path, change))


def test_a_norm_cannot_be_packed(tmp_path):
    _, path = packed(tmp_path, options=four_bits(bnb_4bit_quant_type="nf4"))
    q = lk.kernels.quantize_nf4(torch.ones(64))

    def change(found):
        name = "model.norm.weight"
        del found[name]
        found.update(q.tensors(name))

    with pytest.raises(lk.LorakitError, match=r"model.norm.weight is stored packed, which only"):
        lk.load_model(damaged(path, change))


def test_a_bias_cannot_be_packed(tmp_path):
    _, path = packed(tmp_path, "qwen2")
    name = "model.layers.0.self_attn.q_proj.bias"

    def change(found):
        found.update(lk.kernels.quantize_nf4(found.pop(name)).tensors(name))

    with pytest.raises(lk.LorakitError, match=r"q_proj.bias is stored packed, which only"):
        lk.load_model(damaged(path, change))
