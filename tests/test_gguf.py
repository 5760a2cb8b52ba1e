"""GGUF: against llama.cpp's convention, every block format, and damaged files."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.gguf import NAMES, read_gguf, read_header
from tests.conftest import LLAMA3_ROPE, tiny_llama

TOKENS = ["<unk>", "<s>", "</s>", "t", "o", "k", "to", "tok", *[f"tok{i}" for i in range(89)]]


def permute(weight, heads):
    """Hugging Face -> llama.cpp: the two halves of each head interleaved."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, metadata=None, skip=()):
    """A transformers Llama as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * 94)
    writer.add_token_merges(["t o", "to k"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    back = {hf: name for name, hf in NAMES.items()}
    for name, tensor in model.state_dict().items():
        if name in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = tensor.float().numpy()
        stem, _, leaf = name.rpartition(".")
        if stem.endswith("q_proj"):
            array = permute(array, config.num_attention_heads)
        if stem.endswith("k_proj"):
            array = permute(array, config.num_key_value_heads)
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{back[rest]}"
        else:
            stem = back[stem]
        its = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), its)
        writer.add_tensor(f"{stem}.{leaf}", data, raw_dtype=its)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (
            np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
        )
        writer.add_tensor(
            "rope_freqs.weight",
            (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"head_dim": 12},
        {"attention_bias": True, "mlp_bias": True},
        # as published models have it: a frequency low enough to be divided by the whole factor
        {
            "rope_parameters": {
                **LLAMA3_ROPE,
                "rope_theta": 500000.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ],
)
def test_loads_what_llama_cpp_writes(tmp_path, variant):
    theirs = tiny_llama(**variant)
    model = lk.load_model(write_gguf(tmp_path / "m.gguf", theirs), dtype="float32")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    # fp32: the divisors of a rotary scaling went through one rounding more
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-4
    assert model.config.eos_token_ids == [2]


@pytest.mark.parametrize("kind", sorted(gguf.GGML_QUANT_SIZES, key=lambda k: k.name))
def test_every_type_that_gguf_dequantizes(tmp_path, kind):
    """Random bytes of every block format decode as the gguf package decodes them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = None
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    for key, value in {
        "embedding_length": 2 * block, "feed_forward_length": 3, "block_count": 1,
        "attention.head_count": 1, "vocab_size": 4,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if 2 * block % 2:
        pytest.skip("head_dim must be even")
    _, tensors = read_gguf(tmp_path / "t.gguf")
    shape, read = tensors["model.layers.0.mlp.up_proj.weight"]
    assert shape == (3, 2 * block)
    if expected is None:
        with pytest.raises(lk.LorakitError, match="cannot be dequantized"):
            read()
    else:
        with np.errstate(all="ignore"):
            got = read().numpy()
        assert np.array_equal(got, expected.astype(np.float32), equal_nan=True)


def test_q8_0_is_close_and_streams_into_nf4(tmp_path):
    theirs = tiny_llama(hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "m.gguf", theirs, gguf.GGMLQuantizationType.Q8_0)
    model = lk.load_model(path, dtype="float32", quantize="nf4")
    dense = lk.quantize(lk.load_model(path, dtype="float32"))
    assert torch.equal(model(IDS), dense(IDS))


def test_greedy_text_equals_llama_cpp(smollm2, llama_cpp):
    """12 greedy tokens of the same file, in llama.cpp and here."""
    prompt = "Q: What is the capital of France?\nA:"
    answer = llama_cpp("completion", {"prompt": prompt, "n_predict": 12, "temperature": 0})
    model, tok = lk.load_model(smollm2, dtype="float32"), lk.load_tokenizer(smollm2)
    assert lk.generate(model, tok, prompt, max_new_tokens=12) == answer["content"]


# ---- damaged files ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_llama(num_hidden_layers=1))


def test_truncated_anywhere(good, tmp_path):
    data = good.read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in [*range(0, 200, 7), *range(200, len(data) - 40, 977), len(data) - 40]:
        bad.write_bytes(data[:length])
        with pytest.raises(lk.LorakitError, match=r"bad\.gguf: .*(cut off|not a GGUF)"):
            lk.load_model(bad, dtype="float32")


def test_truncated_rotary_scaling(tmp_path):
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    path = write_gguf(tmp_path / "bad.gguf", tiny_llama(rope_parameters=rope))
    data = path.read_bytes()
    for cut in (20, 40, 200, 5000):
        path.write_bytes(data[:-cut])
        with pytest.raises(lk.LorakitError, match="cut off"):
            lk.load_model(path, dtype="float32")


@settings(max_examples=150)
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_one_damaged_byte_never_crashes(good, tmp_path_factory, position, value):
    data = bytearray(good.read_bytes())
    data[position] = value
    bad = tmp_path_factory.getbasetemp() / "damaged.gguf"
    bad.write_bytes(data)
    try:
        lk.load_model(bad, dtype="float32")
        lk.load_tokenizer(bad)
    except lk.LorakitError as error:
        assert "damaged.gguf" in str(error)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rope_type 'yarn' is not supported"),
    ],
)
def test_unsupported(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_model(path)


def test_other_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(lk.LorakitError, match="architecture 'bert' is not supported"):
        lk.load_model(tmp_path / "m.gguf")


def test_missing_tensor(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), skip={"model.norm.weight"})
    with pytest.raises(lk.LorakitError, match=r"tensor model\.norm\.weight is missing"):
        lk.load_model(path)


def test_unknown_pre_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata={"tokenizer.ggml.pre": "viking"})
    with pytest.raises(lk.LorakitError, match="pre-tokenizer 'viking' is not supported"):
        lk.load_tokenizer(path)


def test_header_equals_the_gguf_reader(good):
    header, reader = read_header(good), gguf.GGUFReader(good)
    assert set(header.tensors) == {t.name for t in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.offset == tensor.data_offset
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
    for key, value in header.metadata.items():
        expected = reader.fields[key].contents()
        assert value == expected, key
