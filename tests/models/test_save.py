"""A saved model has the same bits in transformers, and all that belongs to it comes along.

A failed save leaves what was there.
"""

import json
import os
import shutil

import pytest
import torch

import lorakit as lk
from tests.conftest import BESIDE, TINY_VARIANTS, tiny_llama, write_tokenizer

IDS = torch.arange(24).view(2, 12)

SAVED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


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


def test_saving_again_leaves_no_stale_shards(tiny_dir, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.save_model(model, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    lk.save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED
    again = lk.load_model(tmp_path, dtype="float32")
    assert torch.equal(again(IDS), model(IDS))


def test_saving_a_quantized_model_writes_what_it_computes(tiny_dir, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32", quantize={"block_size": 32})
    lk.save_model(model, tmp_path)
    dense = lk.load_model(tmp_path, dtype="float32")
    ids = IDS.repeat(3, 1)  # a few rows take the weight packed: sums in another order
    assert torch.equal(dense(ids), model(ids))


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


def test_all_files_of_tokenizer_and_processors_come_along(copy, tmp_path):
    """Byte for byte, whatever lorakit itself reads of them."""
    for name, data in BESIDE.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    lk.save_model(lk.load_model(copy, dtype="float32"), tmp_path / "b")
    for name, data in BESIDE.items():
        assert (tmp_path / "b" / name).read_bytes() == data, name


def test_a_merged_model_has_them_too(copy, tmp_path):
    for name, data in BESIDE.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    model = lk.attach(lk.load_model(copy, dtype="float32", quantize="nf4"), lk.LoraConfig(r=2))
    lk.merge(model)
    lk.save_model(model, tmp_path / "b")
    assert all((tmp_path / "b" / name).read_bytes() == data for name, data in BESIDE.items())


def test_transformers_loads_a_saved_multimodal_model_with_its_processor(multimodal, tmp_path):
    pytest.importorskip("PIL")
    from transformers import AutoProcessor, AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

    source = tmp_path / "a"
    shutil.copytree(multimodal[0], source)
    write_tokenizer(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"image_token": "<unk>", "boi_token": "<s>", "eoi_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(source)
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(source)
    images.save_pretrained(source)
    lk.save_model(lk.load_model(source, dtype="float32"), tmp_path / "b")
    theirs, back = (AutoProcessor.from_pretrained(path) for path in (source, tmp_path / "b"))
    assert type(back) is type(theirs) is Gemma3Processor
    assert back.to_dict() == theirs.to_dict()
    assert back.image_processor.size == images.size
    assert back.tokenizer("a text").input_ids == tokenizer("a text").input_ids
    assert (tmp_path / "b" / "preprocessor_config.json").exists()


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


def test_failed_save_leaves_the_old_file(tiny_dir, tmp_path, monkeypatch):
    model = lk.load_model(tiny_dir, dtype="float32")
    lk.save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lk.save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED
