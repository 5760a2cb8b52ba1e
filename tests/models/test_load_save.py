"""Reading and writing Hugging Face directories: equal to transformers, streamed, atomic, strict."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.conftest import GEMMA3, LOGITS, TINY, TINY_VARIANTS, tiny_llama


@pytest.fixture
def copy(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_round_trip_through_transformers(tmp_path, variant, shard):
    """transformers -> load_model -> save_model -> transformers gives the same bits."""
    from transformers import AutoModelForCausalLM

    theirs = tiny_llama(**TINY_VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "a", **({"max_shard_size": shard} if shard else {}))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1 or shard
    model = lk.load_model(tmp_path / "a", dtype="float32")
    lk.save_model(model, tmp_path / "b", max_shard_size=20_000 if shard else 10**9)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists() == bool(shard)
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for (name, a), b in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(back(IDS).logits, theirs(IDS).logits)


SAVED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_saving_again_leaves_no_stale_shards(tiny_dir, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.save_model(model, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    lk.save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED
    again = lk.load_model(tmp_path, dtype="float32")
    assert torch.equal(again(IDS), model(IDS))


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


def test_hub_id_from_the_local_cache(tiny_dir, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny-llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_dir, repo / "snapshots" / commit)
    script = (
        "import lorakit as lk, sys\n"
        "m = lk.load_model('someone/tiny-llama', dtype='float32')\n"
        "t = lk.load_tokenizer('someone/tiny-llama')\n"
        "print(len(t), m.config.vocab_size)\n"
        "try: lk.load_model('someone/absent')\n"
        "except lk.LorakitError as e: print(e)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.strip().splitlines()
    assert first == "259 300"
    assert second.startswith("'someone/absent' is no directory here, and the Hub did not give it:")


def test_quantized_while_streaming_equals_quantized_after(tiny_dir):
    streamed = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    after = lk.quantize(lk.load_model(tiny_dir, dtype="float32"))
    a, b = streamed.state_dict(), after.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert torch.equal(streamed(IDS), after(IDS))


def test_saving_a_quantized_model_writes_what_it_computes(tiny_dir, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32", quantize={"block_size": 32})
    lk.save_model(model, tmp_path)
    dense = lk.load_model(tmp_path, dtype="float32")
    ids = IDS.repeat(3, 1)  # a few rows take the weight packed: sums in another order
    assert torch.equal(dense(ids), model(ids))


# ---- what comes along ----


def test_tokenizer_and_generation_config_come_along(copy, tmp_path, monkeypatch):
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_k": 3}')
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (copy / "tokenizer_of_mine.json").mkdir()  # a directory is none of them
    monkeypatch.chdir(copy.parent)
    model = lk.load_model(copy.name)
    monkeypatch.chdir(tmp_path)
    lk.save_model(model, tmp_path / "b")
    assert set(lk.load_tokenizer(tmp_path / "b").chat_template) == {"default", "tool_use"}
    for name in set(SAVED) - {"config.json", "model.safetensors"}:
        assert (tmp_path / "b" / name).read_bytes() == (copy / name).read_bytes(), name
    assert lk.load_model(tmp_path / "b").config.eos_token_ids == [2, 7]


def test_a_gguf_files_tokenizer_comes_along(smollm2, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    lk.save_model(lk.load_model(smollm2), tmp_path)
    text, tok = "The sea, the sea! 1234", lk.load_tokenizer(smollm2)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == lk.load_tokenizer(tmp_path).encode(text) == tok.encode(text)
    assert theirs.eos_token_id == GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    turns = [{"role": "user", "content": "x"}]
    assert theirs.apply_chat_template(turns, tokenize=False) == tok.apply_chat_template(
        turns, tokenize=False
    )


def test_saving_over_the_source_and_without_it(copy, tmp_path, caplog):
    model = lk.load_model(copy, dtype="float32")
    before = {file.name: file.read_bytes() for file in copy.iterdir() if "config" not in file.name}
    lk.save_model(model, copy)
    after = {file.name: file.read_bytes() for file in copy.iterdir() if "config" not in file.name}
    assert before.keys() == after.keys()
    assert before["tokenizer.json"] == after["tokenizer.json"]
    shutil.rmtree(copy)
    lk.save_model(model, tmp_path / "b")
    assert "is gone; no tokenizer was written" in caplog.text
    assert torch.equal(lk.load_model(tmp_path / "b", dtype="float32")(IDS), model(IDS))


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    """A tiny Gemma 3 with a vision tower, as transformers saves it."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config={**TINY, **GEMMA3}, vision_config=vision, image_token_index=96
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    path = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("layout", ["language_model.model", "model.language_model"])
def test_text_tower_of_a_multimodal_checkpoint(multimodal, tmp_path, layout):
    from transformers import Gemma3ForConditionalGeneration

    source, theirs = multimodal
    shutil.copytree(source, tmp_path / "a")
    if layout != "language_model.model":
        found = load_file(tmp_path / "a" / "model.safetensors")
        renamed = {name.replace("language_model.model", layout): t for name, t in found.items()}
        save_file(renamed, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(tmp_path / "a", dtype="float32")
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
        model.model.layers[0].mlp.up_proj.weight *= 2
    lk.save_model(model, tmp_path / "b", max_shard_size=60_000)
    before, after = {}, {}
    for path, found in ((tmp_path / "a", before), (tmp_path / "b", after)):
        for file in path.glob("*.safetensors"):
            found |= load_file(file)
    changed = f"{layout}.layers.0.mlp.up_proj.weight"
    assert before.keys() == after.keys()
    assert any("vision_tower" in name for name in after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] * (2 if name == changed else 1)), name
    back = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS


def test_a_published_gemma_3_config_leaves_most_fields_out():
    """What the repository of gemma-3-4b-it says of its text model; the rest are defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    config = lk.ModelConfig.from_hf(values)
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (262208, 256, 4)
    assert (config.rope.rope_theta, config.rope.factor) == (1e6, 8.0)
    assert (config.rope_local.rope_theta, config.rope_local.factor) == (1e4, 1.0)
    assert config.query_pre_attn_scalar == 256
    assert [config.slides(i) for i in range(7)] == [True] * 5 + [False, True]
    assert config.eos_token_ids == [1, 106]


# ---- what is wrong is said in one sentence ----


def fails(path, message):
    before = torch.get_rng_state()
    with pytest.raises(lk.LorakitError, match=message) as caught:
        lk.load_model(path, dtype="float32")
    assert "\n" not in str(caught.value)
    assert torch.equal(before, torch.get_rng_state())


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_directory(tmp_path):
    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails("./nowhere", "nowhere does not exist")
    fails("~nobody-of-this-name/model", "is no path")
    fails("a\0b", "is no path|does not exist")
    fails(tmp_path / "model.gguf", r"model\.gguf does not exist")
    (tmp_path / "file.txt").write_text("")
    fails(tmp_path / "file.txt", "neither a model directory nor")


def test_missing_files(copy):
    (copy / "model.safetensors").rename(copy / "other")
    fails(copy, r"neither model\.safetensors nor model\.safetensors\.index\.json")
    (copy / "config.json").unlink()
    fails(copy, r"config\.json does not exist")


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
    edit(copy, lambda t: t.update({name: torch.zeros(4)}))
    lk.load_model(copy, dtype="float32")


def test_integers_are_no_weights(copy):
    edit(copy, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    fails(copy, r"model\.norm\.weight: holds torch\.int8; only floating-point")


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
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    fails(copy, r"generation_config\.json: eos_token_id must be a number")


def test_impossible_sizes(copy):
    config = json.loads((copy / "config.json").read_text())
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        (copy / "config.json").write_text(json.dumps({**config, name: 2**62, "head_dim": 8}))
        fails(copy, r"is missing|impossible|asks for|too large")


def test_nan_cannot_be_quantized(copy):
    edit(copy, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(lk.LorakitError, match=r"up_proj\.weight: cannot quantize.*NaN"):
        lk.load_model(copy, quantize="nf4")


def test_truncated_safetensors_at_any_length(copy):
    data = (copy / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        (copy / "model.safetensors").write_bytes(data[:length])
        fails(copy, r"model\.safetensors: damaged or cut off")


def test_bad_index(tiny_dir, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    weight_map = values["weight_map"]
    name = next(iter(weight_map))
    index.write_text(json.dumps({"weight_map": {**weight_map, name: "model-00009.safetensors"}}))
    fails(tmp_path, r"model-00009\.safetensors does not exist")
    other = next(file for file in weight_map.values() if file != weight_map[name])
    index.write_text(json.dumps({"weight_map": {**weight_map, name: other}}))
    fails(tmp_path, "which model.safetensors.index.json puts here, is missing")
    index.write_text("{}")
    fails(tmp_path, "weight_map, of names to files, is missing")
    index.write_text('{"weight_map": {"a": 3}}')
    fails(tmp_path, "weight_map, of names to files, is missing")


def test_failed_save_leaves_the_old_file(tiny_dir, tmp_path, monkeypatch):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lk.save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED


@pytest.mark.parametrize("size", ["8B", "3B", "1B-Instruct"])
def test_a_model_that_never_was(size):
    fails(f"meta-llama/Llama-3.3-{size}", "Llama 3.3 was published with 70B parameters only; 8B is")


def test_a_checkpoint_without_a_text_model(multimodal, tmp_path):
    source, _ = multimodal
    shutil.copytree(source, tmp_path / "a")
    found = load_file(tmp_path / "a" / "model.safetensors")
    vision = {name: t for name, t in found.items() if "language_model" not in name}
    save_file(vision, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    fails(tmp_path / "a", "the files hold no text model")


def test_fused_quantization_formats_are_refused_by_name(copy):
    config = json.loads((copy / "config.json").read_text())
    for method in ("gptq", "awq", "fp8", "compressed-tensors"):
        quantized = config | {"quantization_config": {"quant_method": method, "bits": 4}}
        (copy / "config.json").write_text(json.dumps(quantized))
        fails(copy, f"already quantized .{method}., which is not supported")


# ---- memory ----

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


def test_quantizing_streams_from_disk(tmp_path):
    """Of a checkpoint of 1.1 GB: the packed model, two of its largest tensors, and 150 MB: the code
    itself (50 seen), 16 of small tensors that stay mapped, and up to 64 that glibc keeps when they
    are free. A mapped file counts: kept open, it alone would be the 1.1 GB.
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
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
