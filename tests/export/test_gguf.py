"""Models as GGUF files: llama.cpp computes from them what lorakit does."""

import re
from pathlib import Path

import gguf
import pytest
import torch

import lorakit as lk
from lorakit.files.gguf import Typed, read_header
from lorakit.models.gguf import read_gguf
from lorakit.models.load import open_model
from tests.conftest import FAMILY_VARIANTS, tiny
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import write_again, write_model
from tests.models.test_gguf import MINISTRAL, VARIANTS

IDS = [1, *range(4, 30)]  # longer than any window
WRITTEN = list(VARIANTS)


def compare(file, model, variant):
    """Compare the logits at every position, and the likeliest tokens."""
    # fp32 sums in another order; llama.cpp's GELU is a table of fp16 values
    tolerance = 1e-2 if "gemma" in variant else 5e-5
    with LlamaCpp(file) as theirs:
        found = theirs.logits(IDS)
    ours = model(torch.tensor([IDS]))[0]
    assert (found - ours).abs().max() <= tolerance
    assert torch.equal(found.argmax(-1), ours.argmax(-1))


@pytest.mark.parametrize("variant", WRITTEN)
def test_logits_are_llama_cpp(tmp_path, variant):
    model = write_model(tmp_path / "model", variant)
    written = lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    assert set(written.formats) == {"F32"}
    ours = lk.load_model(model, dtype="float32")
    compare(tmp_path / "m.gguf", ours, variant)


@pytest.mark.parametrize(
    "variant",
    [
        *("llama biases", "mixtral", "qwen2_moe", "phi3 longrope", "ministral3", "gemma3"),
        *("gpt_oss", "gemma4 small", "gemma4 large", "gemma4 experts"),
    ],
)
def test_the_file_reads_back_as_the_model(tmp_path, variant):
    """The values are the published ones, those of norms up to the rounding of an added one."""
    model = write_model(tmp_path / "model", variant)
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    config, found = read_gguf(tmp_path / "m.gguf")
    _, expected, _ = open_model(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        offset = "gemma3" in variant and name.endswith("norm.weight")
        assert torch.allclose(found[name].read(), weight.read(), rtol=0, atol=1e-7 * offset), name
    assert config.eos_token_ids == [2]
    again = lk.export_gguf(
        tmp_path / "m.gguf", tmp_path / "again.gguf", quantization="f32", name="model"
    )
    if "gemma3" not in variant:  # there an added one is taken away and added again
        assert Path(again.path).read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_a_model_in_memory_has_its_second_embedding(tmp_path):
    directory = write_model(tmp_path / "model", "gemma4 small")
    model, tok = lk.load_model(directory, dtype="float32"), lk.load_tokenizer(directory)
    lk.export_gguf(directory, tmp_path / "a.gguf", quantization="f32", name="m")
    lk.export_gguf(model, tmp_path / "b.gguf", quantization="f32", name="m", tokenizer=tok)
    (_, a), (_, b) = (read_gguf(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].read(), b[name].read()) for name in a)


def test_an_adapter_is_merged_in_fp32(tmp_path):
    """The file is that of the model in memory, and computes as it does unmerged."""
    directory = write_model(tmp_path / "model", "llama biases")
    model = lk.load_model(directory, dtype="float32")
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    lk.save_adapter(model, tmp_path / "adapter")
    before = model(torch.tensor([IDS]))
    lk.export_gguf(model, tmp_path / "memory.gguf", quantization="f32", name="model")
    assert torch.equal(model(torch.tensor([IDS])), before)
    file = tmp_path / "files.gguf"
    lk.export_gguf(directory, file, quantization="f32", adapter=tmp_path / "adapter")
    assert file.read_bytes() == (tmp_path / "memory.gguf").read_bytes()
    compare(file, model, "llama")
    lk.merge(model)
    lk.export_gguf(model, tmp_path / "merged.gguf", quantization="f32", name="model")
    assert (tmp_path / "merged.gguf").read_bytes() == file.read_bytes()


def test_a_bf16_model_is_merged_in_fp32(tmp_path):
    """An update that bf16 would round away is in the file."""
    directory = write_model(tmp_path / "model", "llama")
    lk.save_model(lk.load_model(directory, dtype="bfloat16"), tmp_path / "half")
    model = lk.load_model(tmp_path / "half", dtype="float32")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 1e-4)
    lk.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "m.gguf"
    lk.export_gguf(tmp_path / "half", file, quantization="f32", adapter=tmp_path / "adapter")
    name = "model.layers.0.self_attn.v_proj"
    lk.merge(model)
    merged = model.get_submodule(name).current_module().weight
    assert torch.equal(read_gguf(file)[1][f"{name}.weight"].read(), merged)


@pytest.mark.parametrize(
    "trained",
    [{"modules_to_save": ["lm_head", "norm"], "lora_bias": True}, {"bias": "all"}],
    ids=["modules", "biases"],
)
def test_what_was_trained_whole_in_fp32_is_written_so(tmp_path, trained):
    """The base in the files is bf16, which would round it."""
    directory = write_model(tmp_path / "model", "qwen2")
    lk.save_model(lk.load_model(directory, dtype="bfloat16"), tmp_path / "half")
    model = lk.load_model(tmp_path / "half", dtype="float32")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **trained))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    lk.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "m.gguf"
    lk.export_gguf(tmp_path / "half", file, quantization="f32", adapter=tmp_path / "adapter")
    found = read_gguf(file)[1]
    lk.merge_and_unload(model)
    for name, parameter in model.state_dict().items():
        assert torch.equal(found[name].read(), parameter), name


def test_what_a_file_says_of_its_model_is_said_again(tmp_path):
    """Name, license and origin stay; what is of the file's own blocks does not."""
    kinds = gguf.GGUFValueType
    said = {
        "general.name": Typed("A Name", kinds.STRING, None),
        "general.license": Typed("apache-2.0", kinds.STRING, None),
        "general.languages": Typed(["en", "de"], kinds.ARRAY, kinds.STRING),
        "general.base_model.count": Typed(1, kinds.UINT32, None),
        "general.sampling.temp": Typed(0.5, kinds.FLOAT32, None),
    }
    plain, source = tmp_path / "plain.gguf", tmp_path / "source.gguf"
    lk.export_gguf(write_model(tmp_path / "model", "llama"), plain, quantization="f32")
    write_again(plain, source, said | {"general.quantized_by": "somebody"})
    lk.export_gguf(source, tmp_path / "again.gguf", quantization="f16")
    found = read_header(tmp_path / "again.gguf")
    for key, (value, kind, of) in said.items():
        assert (found.metadata[key], found.types[key]) == (value, (kind, of)), key
    assert found.metadata["general.file_type"] == 1
    assert "general.quantized_by" not in found.metadata
    lk.export_gguf(source, tmp_path / "own.gguf", quantization="f16", name="Mine")
    assert read_header(tmp_path / "own.gguf").metadata["general.name"] == "Mine"


def test_a_packed_model_is_merged_into_what_it_computes_with(tmp_path):
    directory = write_model(tmp_path / "model", "qwen2", hidden_size=64, num_attention_heads=4)
    model = lk.load_model(directory, dtype="float32", quantize="nf4")
    lk.attach(model, lk.LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    compare(tmp_path / "m.gguf", model, "qwen2")
    lk.merge_and_unload(model)
    found = read_gguf(tmp_path / "m.gguf")[1]
    for name, parameter in model.state_dict().items():
        assert torch.equal(found[name].read(), parameter), name


def test_a_bias_without_a_place_is_refused(tmp_path):
    directory = write_model(tmp_path / "model", "llama")
    model = lk.load_model(directory, dtype="float32")
    lk.attach(model, lk.LoraConfig(r=2, lora_bias=True))
    with pytest.raises(lk.LorakitError, match="q_proj has no bias to add the adapter's lora_bias"):
        lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    lk.detach(model)
    lk.attach(model, lk.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(lk.LorakitError, match="learned prompt"):
        lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    assert not list(tmp_path.glob("*m.gguf*"))


def test_gemma2_without_windows_says_so(tmp_path):
    """llama.cpp takes 4096 if a file names no window."""
    full = ["full_attention"] * 2
    sizes = {"num_hidden_layers": 2, "layer_types": full, "max_position_embeddings": 8192}
    directory = write_model(tmp_path / "model", "gemma2", **sizes)
    lk.export_gguf(directory, tmp_path / "m.gguf", quantization="f32")
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert metadata["gemma2.attention.sliding_window"] == 8192


SLIDING = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0}
OTHER_THETA = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
}
REFUSED = [
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
    (
        "llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}},
        "attention_factor",
    ),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen2", SLIDING, "sliding window of 8 (context_length=8"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=true"),
    ("qwen3_5", {"linear_value_head_dim": 12}, "linear_value_head_dim that is not"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0]}, "no_rope_layers"),
    ("phi3", {"sliding_window": 8}, "sliding window of 8 (context_length=8"),
    (
        "ministral3",
        {"rope_parameters": MINISTRAL | {"mscale_all_dim": 0.5}},
        "mscale and mscale_all_dim",
    ),
    ("olmo3", {"rope_parameters": OTHER_THETA}, "rotary embedding of the sliding layers"),
    ("gemma", {"tie_word_embeddings": False}, "an output head of its own"),
    ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar 20"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
    ("gemma3", {"final_logit_softcapping": 3.0}, "final_logit_softcapping 3.0"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "these layer_types"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias"),
    (
        "gemma4 large",
        {"rope_parameters": OTHER_THETA},
        "rotary embedding of the full layers",
    ),
]


@pytest.mark.parametrize(
    ("variant", "settings", "said"), REFUSED, ids=[f"{r[0]} {r[2]}" for r in REFUSED]
)
def test_what_a_file_cannot_say_is_refused_by_its_name(tmp_path, variant, settings, said):
    model = write_model(tmp_path / "model", variant, **settings)
    with pytest.raises(lk.LorakitError, match=re.escape(said)):
        lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    assert not list(tmp_path.glob("*m.gguf*"))


@pytest.mark.parametrize("name", ["ministral", "cwm"])
def test_a_family_that_is_not_written_as_gguf_is_refused_by_its_name(tmp_path, name):
    family, options = FAMILY_VARIANTS[name]
    tiny(family, **options).save_pretrained(tmp_path)
    with pytest.raises(lk.LorakitError, match=f"model_type '{family}' are not written as GGUF"):
        lk.export_gguf(tmp_path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_window_is_written_as_the_context(tmp_path):
    model = write_model(tmp_path / "model", "qwen2", **SLIDING)
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32", context_length=8)
    assert read_header(tmp_path / "m.gguf").metadata["qwen2.context_length"] == 8


def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    file = tmp_path / "m.gguf"
    for options, said in [
        ({"quantization": "q4km"}, "did you mean 'q4_k_m'"),
        ({"tensor_types": {"ffn_dwn": "q8_0"}}, "'ffn_dwn' fits no matrix"),
        ({"tensor_types": {"ffn_down": "q3"}}, "'q3' is no format"),
        ({"tensor_types": {"(": "q8_0"}}, "is no regex"),
        ({"context_length": 65}, "between 1 and the model's 64"),
        ({"adapter": tmp_path / "none"}, "does not exist"),
        ({"imatrix": tmp_path / "none"}, "does not exist"),
    ]:
        with pytest.raises(lk.LorakitError, match=re.escape(said)):
            lk.export_gguf(model, file, **{"quantization": "f32", **options})
    with pytest.raises(lk.LorakitError, match="is a directory"):
        lk.export_gguf(model, tmp_path)
    loaded = lk.load_model(model, dtype="float32")
    loaded.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(lk.LorakitError, match="blk.1.ffn_up.weight holds values beyond fp16"):
        lk.export_gguf(loaded, file, quantization="f16")
    loaded.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(lk.LorakitError, match="blk.1.ffn_up.weight holds NaN"):
        lk.export_gguf(loaded, file, quantization="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
