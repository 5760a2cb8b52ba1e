"""Adapters as GGUF files: llama.cpp computes with them what lorakit does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.files.gguf import read_header
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import name_base, train_adapter, write_model

IDS = [1, *range(4, 30)]
TYING = {"ensure_weight_tying": True}
PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers.1.*down_proj": 1},
    "alpha_pattern": {"v_proj": 3.5},
}


def compare(tmp_path, directory, model, dtype, tolerance):
    """Compare llama.cpp on the base's file and the adapter's with lorakit, at every position."""
    lk.export_gguf(directory, tmp_path / "base.gguf", quantization="f32")
    file = tmp_path / "adapter.gguf"
    lk.export_gguf_adapter(tmp_path / "adapter", file, base_model=directory, dtype=dtype)
    with LlamaCpp(tmp_path / "base.gguf", file) as theirs:
        found = theirs.logits(IDS)
    with LlamaCpp(tmp_path / "base.gguf") as theirs:
        plain = theirs.logits(IDS)
    expected = model(torch.tensor([IDS]))[0]
    assert (found - expected).abs().max() <= tolerance
    assert (plain - expected).abs().max() > 10 * tolerance  # the adapter matters


# fp32 sums in another order; llama.cpp's GELU is a table of fp16 values
@pytest.mark.parametrize(
    ("variant", "config", "tolerance"),
    [
        ("llama", {"use_rslora": True}, 1e-4),
        ("llama head_dim", PATTERNS, 1e-4),
        ("llama biases", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, 1e-4),
        ("mixtral", {"r": 3}, 1e-4),
        ("qwen2", {**PATTERNS, "use_rslora": True}, 1e-4),
        ("qwen3_moe", {"rank_pattern": {"experts.1.up_proj": 4}}, 1e-4),
        ("granite", {}, 1e-4),
        ("phi3", {}, 1e-4),
        ("qwen3_5", {}, 1e-4),
        ("gemma3", {}, 1e-2),
        ("gpt_oss", {}, 1e-4),
        ("gemma4 small", {"exclude_modules": ["per_layer_model_projection"]}, 1e-2),
        ("gemma4 experts", {"exclude_modules": r".*experts\..*down_proj"}, 1e-2),
    ],
)
def test_logits_are_llama_cpp(tmp_path, variant, config, tolerance):
    directory = write_model(tmp_path / "model", variant)
    model = train_adapter(directory, tmp_path / "adapter", **config)
    compare(tmp_path, directory, model, "float32", tolerance)


def test_the_default_is_half_precision(tmp_path):
    directory = write_model(tmp_path / "model", "llama")
    model = train_adapter(directory, tmp_path / "adapter")
    # A, B and their inputs are rounded to 11 bits, a part in 2,000 of logits of up to 5
    compare(tmp_path, directory, model, "float16", 1e-2)
    kinds = {info.kind for info in read_header(tmp_path / "adapter.gguf").tensors.values()}
    assert kinds == {1}


def test_some_experts_have_zeros(tmp_path):
    """A block whose experts have other ranks, or none, is one tensor all the same."""
    directory = write_model(tmp_path / "model", "mixtral")
    targets = ["experts.1.w1", "experts.3.w1", "experts.0.w2"]
    ranks = {"experts.3.w1": 5}
    model = train_adapter(
        directory, tmp_path / "adapter", target_modules=targets, rank_pattern=ranks
    )
    compare(tmp_path, directory, model, "float32", 1e-4)
    tensors = read_header(tmp_path / "adapter.gguf").tensors
    assert tensors["blk.0.ffn_gate_exps.weight.lora_a"].shape[1] == 5
    assert "blk.0.ffn_up_exps.weight.lora_a" not in tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@settings(deadline=None, max_examples=12)
@given(
    r=st.integers(1, 9),
    alpha=st.one_of(st.integers(-40, 40), st.floats(0.01, 100)),
    rslora=st.booleans(),
    other=st.integers(1, 9),
)
def test_the_update_of_each_weight_survives(llama, tmp_path_factory, r, alpha, rslora, other):
    """s B A of every layer, read back from the file, is that of the adapter, up to fp32."""
    tmp_path = tmp_path_factory.mktemp("update")
    config = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": {"k_proj": other}}
    model = train_adapter(
        llama, tmp_path / "adapter", target_modules=["q_proj", "k_proj"], **config
    )
    file = tmp_path / "a.gguf"
    lk.export_gguf_adapter(tmp_path / "adapter", file, base_model=llama, dtype="float32")
    again = lk.load_adapter(lk.load_model(llama, dtype="float32"), file)
    for merged in (model, again):
        lk.merge_and_unload(merged)
    found, expected = again.state_dict(), model.state_dict()
    for name, weight in expected.items():
        bound = 1e-6 * weight.abs().max()  # of a dozen roundings to 24 bits
        assert (found[name] - weight).abs().max() <= bound, name


@pytest.mark.parametrize(
    ("variant", "config", "said"),
    [
        ("llama", {"use_dora": True}, "is of DoRA, which a GGUF adapter has no place for"),
        (
            "llama tied",
            {"target_modules": ["embed_tokens"], **TYING},
            "embedding and head of .* are one",
        ),
        ("llama tied", {"target_modules": ["lm_head"]}, "embedding and head of .* are one"),
        ("qwen3_next", {"target_modules": ["in_proj_qkvz"]}, "is two layers in GGUF files"),
        ("gemma4 small", {}, "per_layer_model_projection: llama.cpp leaves an adapter out"),
        ("gemma4 experts", {}, "experts.0.down_proj: llama.cpp leaves an adapter out"),
        ("llama", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama", {"std": 1e6}, "holds values beyond float16; choose float32"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, variant, config, said):
    directory = write_model(tmp_path / "model", variant)
    train_adapter(directory, tmp_path / "adapter", **config)
    with pytest.raises(lk.LorakitError, match=said):
        lk.export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base_model=directory)
    assert not (tmp_path / "a.gguf").exists()


def test_the_model_must_be_the_one_it_was_trained_on(llama, tmp_path):
    train_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    other = write_model(tmp_path / "other", "llama", hidden_size=64)
    with pytest.raises(lk.LorakitError, match="is for a weight of"):
        lk.export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base_model=other)
    name_base(tmp_path / "adapter", llama)
    lk.export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    with pytest.raises(lk.LorakitError, match="names no base model: give base_model"):
        lk.export_gguf_adapter(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(lk.LorakitError, match="dtype must be float16 or float32"):
        lk.export_gguf_adapter(tmp_path / "adapter", tmp_path / "b.gguf", dtype="q8_0")


def test_an_adapter_whose_columns_moved_is_not_read(tmp_path):
    directory = write_model(tmp_path / "model", "qwen3_5")
    train_adapter(directory, tmp_path / "adapter", target_modules=["out_proj"])
    file = tmp_path / "adapter.gguf"
    lk.export_gguf_adapter(tmp_path / "adapter", file, base_model=directory)
    with pytest.raises(lk.LorakitError, match="ssm_out.*whose columns are moved, is not read"):
        lk.load_adapter(lk.load_model(directory, dtype="float32"), file)
