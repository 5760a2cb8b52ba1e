"""Models in GGUF files: the published tensors, and the logits of transformers and llama.cpp."""

import dataclasses
import math
from unittest import mock

import gguf
import numpy as np
import pytest
import torch

import lorakit as lk
from lorakit.files.gguf import read_header
from lorakit.models.config import RopeConfig
from lorakit.models.gguf import read_gguf
from lorakit.models.per_layer import host_tables
from tests.conftest import FAMILY_VARIANTS, LLAMA3_ROPE, LOGITS, tiny, tiny_llama
from tests.conftest import published as unfused
from tests.export.llama_cpp import LlamaCpp
from tests.models.gguf_files import ARCHITECTURES, published_tensors, stored, write_gguf

IDS = torch.arange(40).view(2, 20)

# as published models have it: a frequency low enough to be divided by the whole factor
LLAMA3 = {**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}

TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

GEMMA = {
    "head_dim": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 12,
    "sliding_window": 6,
}

CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "initializer_range": 0.8}

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}

MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}

# over all pairs, so that it does not matter that llama.cpp rounds the ends of the ramp
WIDE_YARN = {
    **YARN,
    "rope_theta": 3.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "truncate": False,
}

# of 6 of a head's 8 numbers; the rows are longer than the context before stretching
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.0, 2.5, 4.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}

GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}

OLMO3 = {
    "full_attention": {**YARN, "attention_factor": 0.1 * math.log(4) + 1},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

# llama.cpp shares the keys of the last two layers that have some, the full one behind the other
_SLIDES, _FULL = "sliding_attention", "full_attention"
SHARED_KEYS = {"layer_types": [_SLIDES, _SLIDES, _FULL, _SLIDES, _SLIDES, _FULL]}

SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}

LINEAR = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,  # llama.cpp knows no other
    "initializer_range": 0.15,  # from 0.3 on the delta rule widens fp32's roundings
}
LINEAR_MOE = {
    **LINEAR,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}

VARIANTS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "llama head_dim": ("llama", {"head_dim": 12}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama rope_freqs": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"head_dim": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 12, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**SHARED, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
    ),
    "mistral": ("mistral", {"head_dim": 12, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen3_next": ("qwen3_next", LINEAR_MOE),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**LINEAR_MOE, "intermediate_size": 512}),  # unused
    "ministral3": ("ministral3", {"head_dim": 12, "rope_parameters": MINISTRAL}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 0}),
    "granite": ("granite", {**GRANITE, "num_key_value_heads": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE, "pad_token_id": 0}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo3": ("olmo3", {"rope_parameters": OLMO3, "sliding_window": 6, "num_hidden_layers": 5}),
    "seed_oss": ("seed_oss", {"head_dim": 12, "num_key_value_heads": 2}),
    "gemma": ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, **CAPS, "num_hidden_layers": 3}),
    "gpt_oss": ("gpt_oss", {**FAMILY_VARIANTS["gpt_oss"][1], "rope_parameters": WIDE_YARN}),
    "gemma4 small": ("gemma4_text", {**FAMILY_VARIANTS["gemma4_text small"][1], **SHARED_KEYS}),
    "gemma4 large": FAMILY_VARIANTS["gemma4_text large"],
    "gemma4 experts": FAMILY_VARIANTS["gemma4_text experts"],
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": TWO_ROPES, "num_hidden_layers": 7}),
}


def make(variant):
    model_type, settings = VARIANTS[variant]
    model = tiny(model_type, **settings)
    if "gemma" in model_type or "linear_num_key_heads" in settings:
        # one is added to the norms and taken away: exact for these values
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.mul_(1024).round_().div_(1024)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A transformers model and the same as a GGUF file."""
    theirs = make(request.param)
    return theirs, write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", theirs)


def test_tensors_and_config_are_the_published_ones(pair):
    theirs, path = pair
    config, tensors = read_gguf(path)
    published = published_tensors(theirs, path.parent)
    family = theirs.config.model_type
    if family in ("gemma4_text", "gpt_oss"):  # whose files hold the experts of a layer in one
        published = unfused(published, family)
    assert tensors.keys() == published.keys() - (
        {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    )
    for name, tensor in tensors.items():
        assert tensor.shape == tuple(published[name].shape), name
        atol = 1e-6 if name.endswith("A_log") else 0  # exp, and ln again
        assert torch.allclose(tensor.read(), published[name], rtol=0, atol=atol), name
    expected = lk.ModelConfig.from_hf(theirs.config.to_dict())
    for field in dataclasses.fields(config):
        ours, its = getattr(config, field.name), getattr(expected, field.name)
        if isinstance(its, RopeConfig):  # what a file does not say need not be the same
            assert (ours.rope_type, ours.rope_theta) == (its.rope_type, its.rope_theta)
            assert ours.factor == pytest.approx(its.factor)
        elif field.name not in ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"):
            assert ours == pytest.approx(its), field.name
    layers = range(config.num_hidden_layers)
    assert [config.window(i) for i in layers] == [expected.window(i) for i in layers]
    assert config.eos_token_ids == [2]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_the_second_embedding_stays_in_its_file(tmp_path, kind):
    """Rows that are looked up have the values that the whole has, and no others are read."""
    model_type, settings = VARIANTS["gemma4 small"]
    whole_blocks = {"hidden_size_per_layer_input": 32, "intermediate_size": 64}
    theirs = tiny(model_type, **{**settings, **whole_blocks})
    path = write_gguf(tmp_path / "m.gguf", theirs, kind=gguf.GGMLQuantizationType[kind])
    model = lk.load_model(path, dtype="float32", device="cpu")
    [(name, table)] = host_tables(model).items()
    whole = read_gguf(path)[1][name].read()
    assert table.weight.is_meta
    ids = torch.tensor([[5, 96, 5, 0], [1, 2, 2, 96]])
    with mock.patch.object(np, "fromfile", side_effect=AssertionError("reads all of it")):
        assert torch.equal(table(ids, torch.float32), whole[ids])
    lk.save_model(model, tmp_path / "saved")
    assert torch.equal(lk.load_model(tmp_path / "saved", dtype="float32")(ids), model(ids))


def test_logits_are_transformers(pair):
    theirs, path = pair
    model = lk.load_model(path, dtype="float32")
    # fp32: the divisors of a rotary scaling went through one rounding more
    scaled = theirs.config.rope_parameters.get("rope_type") == "llama3"
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= (1e-4 if scaled else LOGITS)


def test_logits_are_llama_cpp(pair):
    theirs, path = pair
    compare_with_llama_cpp(path, theirs.config.model_type)


def compare_with_llama_cpp(path, model_type):
    """Compare the logits after every token of a text longer than any window."""
    model = lk.load_model(path, dtype="float32")
    ours, layers = model(IDS[:1])[0], model.config.num_hidden_layers
    # fp32 sums in another order; llama.cpp's GELU is a table of fp16 values, and layers add to that
    tolerance = 1e-2 * max(1, layers / 5) if "gemma" in model_type else 5e-5
    with LlamaCpp(path) as theirs:
        found = theirs.logits(IDS[0].tolist())
    assert (found - ours).abs().max() <= tolerance
    assert torch.equal(found.argmax(-1), ours.argmax(-1))


UNSAID = {
    "gemma3 before freq_base_swa": (
        VARIANTS["gemma3"],
        {"gemma3.rope.freq_base_swa": None},
        {"rope_local": RopeConfig(rope_theta=10000.0)},
    ),
    "gemma3 without a window": (
        VARIANTS["gemma3"],
        {"gemma3.attention.sliding_window": None},
        {"sliding_layers": [], "sliding_window": None},
    ),
    "gemma3 with a pattern": (
        VARIANTS["gemma3"],
        {"gemma3.attention.sliding_window_pattern": 3},
        {"sliding_layers": [True, True, False, True, True, False, True]},
    ),
    "gemma3 with a list of layers": (
        VARIANTS["gemma3"],
        {"gemma3.attention.sliding_window_pattern": [True, False, False, True, True, False, True]},
        {"sliding_layers": [True, False, False, True, True, False, True]},
    ),
    "gemma3 27B": (
        ("gemma3_text", {**GEMMA, "rope_parameters": TWO_ROPES, "num_hidden_layers": 62}),
        {},
        {"query_pre_attn_scalar": 8},  # hidden_size / heads
    ),
    "gemma2 27B": (
        ("gemma2", {**GEMMA, **CAPS, "num_hidden_layers": 46}),
        {},
        {"query_pre_attn_scalar": 8},
    ),
    "gemma2 defaults": (
        ("gemma2", GEMMA),
        {
            "gemma2.attention.sliding_window": None,
            "gemma2.attn_logit_softcapping": None,
            "gemma2.final_logit_softcapping": None,
            "gemma2.rope.freq_base": None,
        },
        {
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope": RopeConfig(rope_theta=10000.0),
        },
    ),
    "qwen3 head_dim": (
        ("qwen3", {"head_dim": 8}),
        {"qwen3.attention.key_length": None, "qwen3.attention.value_length": None},
        {"head_dim": 8},
    ),
    "llama linear": (
        ("llama", {}),
        {"llama.rope.scaling.factor": 4.0},
        {"rope": RopeConfig(rope_type="linear", factor=4.0)},
    ),
}


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_file_leaves_unsaid_is_what_llama_cpp_computes(tmp_path, name):
    (model_type, settings), metadata, fields = UNSAID[name]
    path = write_gguf(tmp_path / "m.gguf", tiny(model_type, **settings), metadata=metadata)
    config = read_gguf(path)[0]
    assert {name: getattr(config, name) for name in fields} == fields
    compare_with_llama_cpp(path, model_type)


def test_an_expert_is_read_alone(tmp_path, monkeypatch):
    theirs = tiny("mixtral", **EXPERTS, intermediate_size=64)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    _, tensors = read_gguf(write_gguf(tmp_path / "m.gguf", theirs, q8_0))
    published = published_tensors(theirs, tmp_path)
    read_bytes = []
    fromfile = np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda *a, **k: read_bytes.append(k["count"]) or fromfile(*a, **k)
    )
    for number in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight"
        expected = gguf.quants.dequantize(gguf.quants.quantize(published[name].numpy(), q8_0), q8_0)
        assert np.array_equal(tensors[name][1]().numpy(), expected)
    assert read_bytes == [32 * 64 // 32 * 34] * 4


def test_experts_in_tensors_of_their_own(tmp_path):
    """The first Mixtral files held each expert in a tensor of its own."""
    theirs = tiny("mixtral", **EXPERTS)
    published = published_tensors(theirs, tmp_path)
    arrays = {}
    for name, array in stored(published, theirs.config).items():
        if "_exps" in name:
            parts = {name.replace("_exps", f".{i}"): part for i, part in enumerate(array)}
            arrays |= parts
        else:
            arrays[name] = array
    _, tensors = read_gguf(write_gguf(tmp_path / "m.gguf", theirs, tensors=arrays))
    assert tensors.keys() == published.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.read(), published[name]), name


def test_q8_0_is_close_and_streams_into_nf4(tmp_path):
    theirs = tiny_llama(hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "m.gguf", theirs, gguf.GGMLQuantizationType.Q8_0)
    streamed = lk.load_model(path, dtype="float32", quantize="nf4")
    model = lk.load_model(path, dtype="float32")
    published = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            largest = published[name].reshape(-1, 32).abs().amax(1)
            error = (weight - published[name]).reshape(-1, 32).abs().amax(1)
            # half a step of largest / 127, and 127 times the rounding of the step to fp16
            assert (error <= (0.5 + 127 * 2**-11) * largest / 127).all(), name
    assert torch.equal(streamed(IDS), lk.quantize(model)(IDS))


def test_greedy_text_equals_llama_cpp(smollm2, llama_cpp):
    """llama.cpp and lorakit give the same 12 greedy tokens for the same file."""
    prompt = "Q: What is the capital of France?\nA:"
    answer = llama_cpp("completion", {"prompt": prompt, "n_predict": 12, "temperature": 0})
    model, tok = lk.load_model(smollm2, dtype="float32"), lk.load_tokenizer(smollm2)
    assert lk.generate(model, tok, prompt, max_new_tokens=12) == answer["content"]


@pytest.mark.parametrize(
    ("name", "variant", "metadata", "said"),
    [
        ("blk.0.ssm_a", "llama", {}, "belongs to no llama model"),
        ("blk.0.attn_sinks.weight", "llama", {}, "belongs to no llama model"),
        ("per_layer_proj_norm.weight", "llama", {}, "belongs to no llama model"),
        (
            "blk.0.ssm_a",
            "qwen3_5",
            {"qwen35.full_attention_interval": 1, "qwen35.ssm.group_count": 0},
            "self_attn.q_proj.weight is missing",
        ),
    ],
)
def test_a_tensor_of_another_architecture(tmp_path, name, variant, metadata, said):
    """The last file has a tensor of linear attention, and metadata that know no such layer."""
    theirs = make(variant)
    arrays = stored(published_tensors(theirs, tmp_path), theirs.config)
    arrays[name] = -np.ones(6, np.float32)
    path = write_gguf(tmp_path / "m.gguf", theirs, tensors=arrays, metadata=metadata)
    with pytest.raises(lk.LorakitError, match=said):
        lk.load_model(path)


def test_truncated_rotary_scaling(tmp_path):
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    path = write_gguf(tmp_path / "bad.gguf", tiny_llama(rope_parameters=rope))
    data = path.read_bytes()
    for cut in (20, 40, 200, 5000):
        path.write_bytes(data[:-cut])
        with pytest.raises(lk.LorakitError, match="cut off"):
            lk.load_model(path, dtype="float32")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "belongs to no mixtral model"),
        ({"llama.rope.dimension_count": 4}, "rotary embedding of 4 of 8 dimensions"),
        (
            {"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.attn_factor": 2.0},
            "scaling.attn_factor is not supported",
        ),
        ({"llama.rope.scaling.type": "squeezed"}, "rope_type 'squeezed' is not supported"),
    ],
)
def test_unsupported(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_model(path)


def test_another_number_of_experts(tmp_path):
    theirs = tiny("mixtral", **EXPERTS)
    path = write_gguf(tmp_path / "m.gguf", theirs, metadata={"llama.expert_count": 3})
    with pytest.raises(
        lk.LorakitError, match=r"ffn_gate_exps\.weight is \(4, 48, 32\), not \(3 exp"
    ):
        lk.load_model(path)


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "gemma2", "qwen3_5", "gemma4 experts"])
def test_a_metadata_value_of_another_type_never_crashes(tmp_path, variant):
    """A missing value does not crash either; config and vocabulary are read before any tensor."""
    theirs = make(variant)
    path = write_gguf(tmp_path / "good.gguf", theirs)
    arch = ARCHITECTURES[theirs.config.model_type]
    extra = ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window_pattern")
    extra += ("nextn_predict_layers",) if variant == "qwen3_5" else ()
    keys = [*read_header(path).metadata, *(f"{arch}.{name}" for name in extra)]
    for key in [*keys, "tokenizer.chat_template"]:
        for value in ("x", 0, 3, -1.5, [7], ["y"], None):
            bad = write_gguf(
                tmp_path / "bad.gguf", theirs, metadata={key: value}, tensors={"other": np.ones(1)}
            )
            for load in (lk.load_model, lk.load_tokenizer):
                try:
                    load(bad)
                except lk.LorakitError as error:
                    assert "bad.gguf" in str(error), (key, value)


def test_the_end_of_a_turn_is_an_end_token_too(tmp_path):
    extra = {"tokenizer.ggml.eot_token_id": 7}
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), metadata=extra)
    assert lk.load_model(path).config.eos_token_ids == [2, 7]
    same = {"tokenizer.ggml.eot_token_id": 2}
    path = write_gguf(tmp_path / "b.gguf", tiny_llama(), metadata=same)
    assert lk.load_model(path).config.eos_token_ids == [2]


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
