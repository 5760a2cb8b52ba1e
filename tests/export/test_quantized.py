"""Quantized files: llama.cpp runs them, and they read back within the error of their format."""

import pytest
import torch

import lorakit as lk
from lorakit.export.gguf import GgufFile
from lorakit.models.gguf import read_gguf
from lorakit.models.gguf_mix import FILE_TYPES
from lorakit.models.load import open_model
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import write_model

# The root of the mean squared error of a matrix, relative, at most: the worst published figures
# for random weights, rounded up.
ERROR = {"f16": 3e-4, "bf16": 2.5e-3, "q8_0": 0.007, "q6_k": 0.02, "q5_k_m": 0.045, "q5_k_s": 0.045}
ERROR |= {"q5_0": 0.05, "q5_1": 0.05, "q4_k_m": 0.085, "q4_k_s": 0.085, "q4_0": 0.11, "q4_1": 0.1}
ERROR |= {"iq4_nl": 0.09, "mxfp4_moe": 0.007}  # a model without experts is in q8_0


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are whole blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    sizes |= {"initializer_range": 0.06}  # 1 / sqrt(256), as in a trained model
    path = tmp_path_factory.mktemp("wide") / "model"
    return write_model(path, "llama", num_key_value_heads=2, **sizes)


@pytest.mark.parametrize("name", [name for name in FILE_TYPES if name != "f32"])
def test_a_file_reads_back_within_its_error(wide, tmp_path, name):
    written = lk.export_gguf(wide, tmp_path / "m.gguf", quantization=name)
    assert not written.falls_back
    _, found = read_gguf(tmp_path / "m.gguf")
    _, expected, _ = open_model(wide)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        before, after = weight.read(), found[key].read()
        if before.dim() == 1:
            assert torch.equal(before, after), key
        else:
            assert (after - before).norm() <= ERROR[name] * before.norm(), key
    assert written.size == (tmp_path / "m.gguf").stat().st_size
    assert written.parameters == sum(w.read().numel() for w in expected.values())


def test_experts_in_mxfp4_have_the_values_of_their_files(tmp_path):
    """gpt-oss publishes its experts in MXFP4, with other bytes where a scale may be either."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts_per_tok": 5}  # none flips
    dense = write_model(tmp_path / "dense", "gpt_oss", **sizes)
    lk.export_gguf(dense, tmp_path / "first.gguf", quantization="mxfp4_moe")  # which rounds them
    lk.save_model(lk.load_model(tmp_path / "first.gguf", dtype="float32"), tmp_path / "rounded")
    tok = lk.load_tokenizer(dense)
    lk.export_gguf(
        tmp_path / "rounded", tmp_path / "m.gguf", quantization="mxfp4_moe", tokenizer=tok
    )
    _, found = read_gguf(tmp_path / "m.gguf")
    _, expected, _ = open_model(tmp_path / "rounded")
    experts = [name for name in expected if ".experts." in name]
    assert experts
    assert all(torch.equal(found[name].read(), expected[name].read()) for name in experts)
    with LlamaCpp(tmp_path / "m.gguf") as theirs:
        logits = theirs.logits([1, *range(4, 60)])
    ours = lk.load_model(tmp_path / "m.gguf", dtype="float32")(torch.tensor([[1, *range(4, 60)]]))
    assert (logits - ours[0]).std() <= 0.1 * ours.std()  # it rounds what layers read to 8 bits


@pytest.mark.parametrize("name", ["q8_0", "q4_k_m", "iq4_nl"])
def test_llama_cpp_reads_the_values_that_lorakit_reads(wide, tmp_path, name):
    """The rest is that llama.cpp rounds what layers read to 8 bits, some values at a time."""
    lk.export_gguf(wide, tmp_path / "m.gguf", quantization=name)
    ids = [1, *range(4, 60)]
    with LlamaCpp(tmp_path / "m.gguf") as theirs:
        found = theirs.logits(ids)
    ours = lk.load_model(tmp_path / "m.gguf", dtype="float32")(torch.tensor([ids]))[0]
    assert (found - ours).std() <= 0.1 * ours.std()  # a wrong matrix gives 1.4


def test_rows_that_do_not_fit_are_told(tmp_path):
    directory = write_model(tmp_path / "model", "llama")
    written = lk.export_gguf(directory, tmp_path / "m.gguf")
    assert set(written.formats) == {"F32", "Q5_0", "Q8_0", "F16"}  # the rows have 32 or 48 values
    said = str(written)
    assert said.splitlines()[0].startswith(f"{tmp_path / 'm.gguf'}: q4_k_m, ")
    assert "tensors are F16, Q5_0, Q8_0 and not what q4_k_m means" in said
    with LlamaCpp(tmp_path / "m.gguf") as theirs:
        assert theirs.logits([1, 5, 9]).isfinite().all()


def test_one_tensor_is_said_in_the_singular(tmp_path):
    formats = {"F32": (1, 10), "Q4_0": (12, 90)}
    told = str(GgufFile(tmp_path, "q4_k_m", 100, formats, {"blk.0.attn_q.weight": "Q4_0"}))
    assert "F32        1 tensor    10.0 %\n" in told
    assert "Q4_0      12 tensors   90.0 %\n" in told
    assert "1 tensor is Q4_0 and not what q4_k_m means: its rows are no" in told


def test_own_formats_of_tensors(wide, tmp_path):
    own = {r"blk\.[01]\.ffn_down": "q8_0", "ffn_down": "f16"}
    written = lk.export_gguf(wide, tmp_path / "m.gguf", quantization="q4_0", tensor_types=own)
    count = {kind: tensors for kind, (tensors, _) in written.formats.items()}
    assert count == {"F32": 17, "Q4_0": 49, "Q6_K": 1, "Q8_0": 2, "F16": 6}
    with LlamaCpp(tmp_path / "m.gguf") as theirs:
        assert theirs.logits([1, 5, 9]).isfinite().all()
