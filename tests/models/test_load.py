"""Loading gives the values of the files, packs them as they stream, and refuses damaged files."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.conftest import FAMILY_VARIANTS, LOGITS, TINY, tiny, tiny_llama
from tests.models.damage import edit, fails

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tiny_dir, dtype):
    model = lk.load_model(tiny_dir, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    exact = load_file(tiny_dir / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(p, exact[name].to(p.dtype))
    assert model(IDS).isfinite().all()


def test_loaded_model_survives_the_file(copy):
    model = lk.load_model(copy, dtype="float32")
    expected = model(IDS)
    with open(copy / "model.safetensors", "r+b") as file:  # overwritten in place, not replaced
        file.seek(2000)
        file.write(b"\0" * 20000)
    assert torch.equal(model(IDS), expected)


def test_quantized_while_streaming_equals_quantized_after(tiny_dir):
    streamed = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    after = lk.quantize(lk.load_model(tiny_dir, dtype="float32"))
    a, b = streamed.state_dict(), after.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert torch.equal(streamed(IDS), after(IDS))


def test_a_tied_config_over_different_heads_keeps_both(tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = lk.load_model(tmp_path, dtype="float32")
    assert "the weights differ; kept apart" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (theirs(IDS).logits - model(IDS)).abs().max() <= LOGITS
    lk.save_model(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["tie_word_embeddings"] is False


def test_generation_config_adds_end_tokens(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert lk.load_model(copy).config.eos_token_ids == [2, 7]
    config = json.loads((copy / "config.json").read_text())
    del config["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert lk.load_model(copy).config.eos_token_ids == [9, 7]  # Llama's default is 2
    (copy / "generation_config.json").write_text("{}")
    assert lk.load_model(copy).config.eos_token_ids == [2]
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    fails(copy, r"generation_config\.json: eos_token_id must be a number")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "model_type is missing"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_config(copy, content, message):
    (copy / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    fails(copy, message)


def test_missing_tensor(copy):
    edit(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(copy, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing")


def test_extra_tensor(copy):
    edit(copy, lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}))
    fails(copy, r"tensor model\.layers\.7\.mlp\.up_proj\.weight belongs to no part")


def test_wrong_shape(copy):
    edit(copy, lambda t: t.update({"model.norm.weight": torch.zeros(33)}))
    fails(copy, r"tensor model\.norm\.weight is \(33,\), the config asks for \(32,\)")


def test_derived_tensors_are_ignored(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    expected = lk.load_model(copy, dtype="float32").state_dict()
    edit(copy, lambda t: t.update({name: torch.zeros(4)}))
    found = lk.load_model(copy, dtype="float32").state_dict()
    assert found.keys() == expected.keys()
    assert name not in found
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_integers_are_no_weights(copy):
    edit(copy, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    fails(copy, r"model\.norm\.weight: holds torch\.int8; only weights of 16 bits")


def test_more_experts_than_the_files_hold(tmp_path):
    """They are refused before the model is built, which would take hours for so many."""
    tiny("qwen3_moe", **FAMILY_VARIANTS["qwen3_moe"][1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 10**12}))
    fails(tmp_path, "asks for 1000000000000 experts, and the files do not hold the last")


def test_impossible_sizes(copy):
    config = json.loads((copy / "config.json").read_text())
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        (copy / "config.json").write_text(json.dumps({**config, name: 2**62, "head_dim": 8}))
        fails(copy, r"is missing|impossible|asks for|too large")


def test_a_config_of_huge_sizes_takes_no_memory(copy):
    """The config asks for 1 TB of embeddings; the refusal comes before any tensor is made."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 2**34}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(copy, r"embed_tokens\.weight is \(300, 32\), the config asks for \(17179869184, 32\)")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_nan_cannot_be_quantized(copy):
    edit(copy, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(lk.LorakitError, match=r"up_proj\.weight: cannot quantize.*NaN"):
        lk.load_model(copy, quantize="nf4")


def test_quantization_formats_that_are_not_read_are_refused_by_name(copy):
    config = json.loads((copy / "config.json").read_text())
    for method in ("hqq", "quark"):
        quantized = config | {"quantization_config": {"quant_method": method, "bits": 4}}
        (copy / "config.json").write_text(json.dumps(quantized))
        fails(copy, f"already quantized .{method}., which is not supported")


PEAK = """
import resource, sys, torch, gguf, numpy, lorakit as lk
lk.load_model, lk.kernels
torch.ones(64, 64) @ torch.ones(64, 64)  # the pools of threads and of memory
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = lk.load_model(sys.argv[1], dtype=sys.argv[2], quantize="nf4")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
packed = sum(p.nbytes for p in model.parameters())
largest = 4 * model.config.vocab_size * model.config.hidden_size
print((peak - imports) / 1e6, packed / 1e6, largest / 1e6)
"""


@pytest.mark.slow
def test_quantizing_streams_from_disk(tmp_path):
    """Loading 1.1 GB takes the packed model, two of the largest tensors, and 150 MB.

    These are the code itself (50 seen), 16 of small tensors that stay mapped, and up to 64 that
    glibc keeps when they are free. A mapped file counts: kept open, it alone would be the 1.1 GB.
    """
    hidden, inner, layers = 2048, 8192, 8
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = TINY | sizes | {"model_type": "llama", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes["mlp.down_proj"] = (hidden, inner)
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors = {"model.embed_tokens.weight": torch.randn(TINY["vocab_size"], hidden).bfloat16()}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for i in range(layers):
        tensors |= {f"model.layers.{i}.{n}.weight": w.clone() for n, w in layer.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del tensors, layer
    assert (tmp_path / "model.safetensors").stat().st_size > 1e9
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), "bfloat16"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "model.safetensors").unlink()
    used, packed, _ = map(float, done.stdout.split())
    largest = 2 * hidden * inner / 1e6
    assert packed > 250
    assert used < packed + 2 * largest + 150, (used, packed, largest)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_peak_memory_of_loading(smollm2, tmp_path, kind, dtype):
    """Loading in NF4 peaks below the packed model + the largest dense tensor + 150 MB."""
    path = smollm2
    if kind == "safetensors":
        path = tmp_path
        lk.save_model(lk.load_model(smollm2, dtype="float32"), path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), dtype], capture_output=True, text=True, check=True
    )
    used, packed, largest = map(float, done.stdout.split())
    assert used < packed + largest + 150, (used, packed, largest)
    assert packed > 100
