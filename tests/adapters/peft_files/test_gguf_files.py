"""Adapters of llama.cpp: what llama.cpp computes with them, and what its formula gives."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapters.peft_files.gguf_files import open_gguf
from tests.adapters.common import hugging_face
from tests.adapters.peft_files.adapters_of_peft import IDS, LOGITS, MOE, SIZES, peft_logits
from tests.conftest import llama_cpp_server, tiny
from tests.models.gguf_files import ARCHITECTURES, write_gguf

F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))


def write_adapter(path, arch, tensors, alpha=8.0, kind=F32, **metadata):
    """An adapter as llama.cpp's convert_lora_to_gguf.py writes it."""
    writer = gguf.GGUFWriter(path, arch)
    pairs = {"general.type": "adapter", "adapter.type": "lora"} | metadata
    for key, value in pairs.items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        data = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name, out, size, r, *experts):
    return {
        f"{name}.weight.lora_a": torch.randn(*experts, r, size) * 0.2,
        f"{name}.weight.lora_b": torch.randn(*experts, out, r) * 0.2,
    }


VARIANTS = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "mixtral": ("mixtral", SIZES["mixtral"] | {"num_key_value_heads": 2}),
    "qwen3_moe": ("qwen3_moe", SIZES["qwen3_moe"]),
    "gemma2": ("gemma2", {"head_dim": 12, "tie_word_embeddings": True}),
}


def adapted(kind, config, ranks=(4, 4)):
    """Tensors for attention and the MLP of both layers, of rank ranks[0] and ranks[1]."""
    torch.manual_seed(0)
    hidden, width = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    rows = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    found = {}
    for i in (0, 1):
        for which, heads in rows.items():
            found |= pair(f"blk.{i}.attn_{which}", heads * head, hidden, ranks[0])
        if kind in MOE:
            count = config.num_local_experts
            width = config.moe_intermediate_size if kind == "qwen3_moe" else width
            found |= pair(f"blk.{i}.ffn_gate_exps", width, hidden, ranks[1], count)
            found |= pair(f"blk.{i}.ffn_down_exps", hidden, width, ranks[1], count)
            found |= pair(f"blk.{i}.ffn_gate_inp", count, hidden, ranks[1])
        else:
            found |= pair(f"blk.{i}.ffn_up", width, hidden, ranks[1])
    return found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("alpha", "ranks"), [(6.0, (4, 2)), (0.0, (2, 3))], ids=["alpha", "zero"])
def test_logits_are_llama_cpp(tmp_path, name, alpha, ranks):
    kind, settings = VARIANTS[name]
    theirs = tiny(kind, **settings)
    base = write_gguf(tmp_path / "m.gguf", theirs)
    tensors = adapted(kind, theirs.config, ranks)
    path = write_adapter(tmp_path / "a.gguf", ARCHITECTURES[kind], tensors, alpha)
    prompt = IDS[0].tolist()
    request = {"prompt": prompt, "n_predict": 3, "temperature": 0, "n_probs": 20}
    steps = llama_cpp_server(base, path)("completion", request)["completion_probabilities"]
    model = lk.load_model(base, dtype="float32")
    plain = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    lk.load_adapter(model, path)
    # two fp32 implementations; llama.cpp's GELU is a table of fp16 values
    tolerance = 1e-2 if "gemma" in kind else 1e-4
    for number, step in enumerate(steps):
        found = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
        assert number or (found - plain).abs().max() > 0.1
        for token in step["top_logprobs"]:
            assert token["logprob"] == pytest.approx(found[token["id"]].item(), abs=tolerance)
        prompt.append(step["id"])


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
def test_embedding_and_head_by_the_formula(tiny_dir, tmp_path, kind):
    """llama.cpp reads lora_a of the embedding, [V, r], by rows: W + s a b^T."""
    weights = load_file(tiny_dir / "model.safetensors")
    torch.manual_seed(0)
    V, H = weights["model.embed_tokens.weight"].shape
    tensors = {
        "token_embd.weight.lora_a": torch.randn(V, 32) * 0.2,
        "token_embd.weight.lora_b": torch.randn(H, 32) * 0.2,
        **pair("output", V, H, 32),
    }
    path = write_adapter(tmp_path / "a.gguf", "llama", tensors, 16.0, kind)
    stored = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), kind), kind))
        for name, t in tensors.items()
    }
    values = {name: t.double() for name, t in stored.items()}
    a, b = (values[f"token_embd.weight.lora_{end}"] for end in "ab")
    weights["model.embed_tokens.weight"] = (
        weights["model.embed_tokens.weight"] + a @ b.t() / 2
    ).float()
    a, b = (values[f"output.weight.lora_{end}"] for end in "ab")
    weights["lm_head.weight"] = (weights["lm_head.weight"] + b @ a / 2).float()
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        truth = hugging_face(tmp_path).eval()(IDS).logits
        found = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), path)(IDS)
    torch.testing.assert_close(found, truth, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_show_says_what_it_is_and_convert_writes_pefts_files(tmp_path, name):
    kind, settings = VARIANTS[name]
    base, out = tmp_path / "base", tmp_path / "out"
    theirs = tiny(kind, **settings)
    theirs.save_pretrained(base)
    tensors = adapted(kind, theirs.config, (4, 2))
    path = write_adapter(tmp_path / "a.gguf", ARCHITECTURES[kind], tensors)
    report = lk.describe_adapter(path)
    assert "in files of llama.cpp" in str(report)
    assert not report.warnings
    norm = sum(
        (8.0 / b.shape[-1] * b.double() @ tensors[key[:-1] + "a"].double()).square().sum().item()
        for key, b in tensors.items()
        if key.endswith("lora_b")
    )
    assert report.norm_delta == pytest.approx(norm**0.5, rel=1e-6)  # sums of fp32 values in fp64
    with pytest.raises(lk.LorakitError, match=r"give base_model \(--base-model\)"):
        lk.convert_adapter(path, out)
    lk.convert_adapter(path, out, base_model=base)
    model = lk.load_model(base, dtype="float32")
    with torch.no_grad():
        found = lk.load_adapter(model, path)(IDS)
        again = lk.load_adapter(lk.load_model(base, dtype="float32"), out)(IDS)
    torch.testing.assert_close(again, found, rtol=0, atol=LOGITS)
    if kind not in MOE:  # transformers 5 fuses experts, which PEFT cannot adapt one by one
        truth = peft_logits(theirs, out)
        torch.testing.assert_close(found, truth, rtol=0, atol=LOGITS)


Q = pair("blk.0.attn_q", 32, 32, 2)
BAD = {
    "a model": (Q, {"general.type": "model"}, "is a model and no adapter"),
    "no type": (Q, {"general.type": None}, "is a model and no adapter"),
    "a vector": (Q, {"adapter.type": "control_vector"}, "adapter.type is 'control_vector'"),
    "aLoRA": (Q, {"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA, which tokens of the input"),
    "architecture": (Q, {"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
    "nothing": ({}, {}, "no layer is adapted"),
    "a norm": (Q | {"output_norm.weight": torch.ones(32)}, {}, "is no pair of lora_a and lora_b"),
    "a alone": ({k: t for k, t in Q.items() if "_a" in k[-2:]}, {}, "is no pair of lora_a and"),
    "b alone": (
        {k: t for k, t in Q.items() if "_b" in k[-2:]},
        {},
        "attn_q.weight.lora_a is missing",
    ),
    "no layer": (pair("blk.0.attn_x", 32, 32, 2), {}, "belongs to no llama model"),
    "ranks": (Q | {"blk.0.attn_q.weight.lora_a": torch.ones(3, 32)}, {}, "no one rank"),
    "sides": (Q | {"blk.0.attn_q.weight.lora_a": torch.ones(1, 2, 32)}, {}, "no one rank"),
    "shape": (pair("blk.0.attn_q", 64, 32, 2), {}, "the model needs"),
    "another layer": (pair("blk.9.attn_v", 32, 32, 2), {}, "layers.9.self_attn.v_proj"),
}


@pytest.mark.parametrize(("tensors", "metadata", "message"), BAD.values(), ids=BAD)
def test_what_is_no_adapter_of_llama_cpp(tiny_dir, tmp_path, tensors, metadata, message):
    path = write_adapter(tmp_path / "a.gguf", "llama", tensors, **metadata)
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_adapter(model, path)
    assert not lk.adapter_names(model)


def test_models_of_another_kind(tiny_dir, tmp_path):
    path = write_adapter(tmp_path / "a.gguf", "llama", Q)
    with pytest.raises(lk.LorakitError, match="are for models of load_model"):
        lk.load_adapter(hugging_face(tiny_dir), path)
    with pytest.raises(lk.LorakitError, match="a.gguf is an adapter: load the model that it was"):
        lk.load_model(path)


@given(data=st.data())
def test_any_damage_is_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    whole = write_adapter(path, "llama", Q).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(damaged[:cut]))
    try:
        files = open_gguf(path, None)
        assert all(tensor.read().shape == tensor.shape for tensor in files.tensors.values())
    except lk.LorakitError as error:
        assert str(path) in str(error)
