"""A written file is read back and run: the figures are those of independent computations."""

import json

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.export import check as checking
from lorakit.export import runtime
from lorakit.export.sample import CHAT
from tests.export.models import byte_level, write_model

ROWS = [{"prompt": f"hello {i}", "completion": f" the {i * 7} he"} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("check") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def adapter(model):
    """An adapter that has learned ROWS."""
    adapted, tok = lk.load_model(model, dtype="float32"), lk.load_tokenizer(model)
    torch.manual_seed(0)
    lk.attach(adapted, lk.LoraConfig(r=4, target_modules="all-linear"))
    examples = lk.encode_rows(ROWS, tok, max_seq_length=64)
    longest = max(examples.lengths)
    batch = [
        [(*e, *[fill] * (longest - len(e))) for e, fill in zip(x, (0, -100), strict=True)]
        for x in examples
    ]
    ids, labels = torch.tensor(batch).unbind(1)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.02)
    for _ in range(30):
        total, count = adapted.loss(ids, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    lk.save_adapter(adapted, model.parent / "adapter")
    return model.parent / "adapter"


@pytest.fixture
def no_llama_cpp(monkeypatch):
    """A Python without xllamacpp, which also spares its start."""
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)


@pytest.mark.parametrize("variant", ["llama biases", "mixtral", "qwen3", "gemma3"])
def test_a_file_of_the_same_values_is_the_model(tmp_path, variant, no_llama_cpp):
    model = write_model(tmp_path / "model", variant)
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    found = lk.check_export(tmp_path / "m.gguf", model)
    # the rounding of log-probabilities in fp32, and of the offset of Gemma's norms
    assert abs(found.divergence) < 1e-9
    assert found.same_first == found.tokens > 100
    assert found.file_loss == pytest.approx(found.loss, abs=1e-5)
    assert found.greedy
    assert all(same == length for same, length in found.greedy)
    assert not found.warnings


def test_divergence_and_losses_are_those_of_the_loaded_models(tmp_path, model, no_llama_cpp):
    file = tmp_path / "m.gguf"
    lk.export_gguf(model, file, quantization="q4_0")
    found = lk.check_export(file, model, rows=ROWS)
    tok = lk.load_tokenizer(model)
    ours, theirs = (lk.load_model(each, dtype="float32") for each in (model, file))
    divergence, same, count = 0.0, 0, 0
    for example in lk.encode_rows(ROWS, tok, max_seq_length=64):
        ids = torch.tensor([example.input_ids])
        asked = torch.tensor(example.labels[1:]) != -100
        p, q = (each(ids)[0, :-1][asked].double().log_softmax(-1) for each in (ours, theirs))
        divergence += F.kl_div(q, p, reduction="sum", log_target=True).item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    assert found.tokens == count
    assert found.same_first == same
    # fp32 products of batches of other shapes sum in another order
    assert found.divergence == pytest.approx(divergence / count, rel=1e-3)
    assert found.divergence > 1e-4
    for loss, each in ((found.loss, ours), (found.file_loss, theirs)):
        assert loss == pytest.approx(lk.evaluate(each, tok, ROWS)["loss"], rel=1e-5)
    assert found.base_loss is None


def test_greedy_text_diverges_where_generation_does(tmp_path, model, no_llama_cpp):
    file = tmp_path / "m.gguf"
    lk.export_gguf(model, file, quantization="q4_0")
    found = lk.check_export(file, model, rows=ROWS)
    tok = lk.load_tokenizer(model)
    texts = [
        [lk.generate(m, tok, row["prompt"], max_new_tokens=24) for row in ROWS[:4]]
        for m in (lk.load_model(each, dtype="float32") for each in (model, file))
    ]
    equal = [ours == theirs for ours, theirs in zip(*texts, strict=True)]
    assert [same == length for same, length in found.greedy] == equal
    assert not all(equal)  # or this tests nothing


def test_what_the_adapter_learned_is_kept_or_a_warning_says_how_much(
    tmp_path, model, adapter, no_llama_cpp, caplog
):
    good, lost = tmp_path / "good.gguf", tmp_path / "lost.gguf"
    lk.export_gguf(model, good, quantization="q8_0", adapter=adapter)
    lk.export_gguf(model, lost, quantization="q8_0")  # a merge that was forgotten
    found = lk.check_export(good, model, adapter, rows=ROWS)
    tok, merged = lk.load_tokenizer(model), lk.load_model(model, dtype="float32")
    base = lk.evaluate(merged, tok, ROWS)["loss"]
    lk.load_adapter(merged, adapter)
    learned = base - lk.evaluate(merged, tok, ROWS)["loss"]
    kept = base - lk.evaluate(lk.load_model(good, dtype="float32"), tok, ROWS)["loss"]
    assert learned > 0.5
    assert found.kept == pytest.approx(kept / learned, rel=1e-3)
    assert found.kept > 0.95
    assert f"kept             {100 * found.kept:.1f} % of what was learned" in str(found)
    in_memory = lk.check_export(good, merged, rows=ROWS)
    assert in_memory.base_loss == pytest.approx(found.base_loss, rel=1e-6)
    assert in_memory.loss == pytest.approx(found.loss, rel=1e-6)
    assert not caplog.records
    bad = lk.check_export(lost, model, adapter, rows=ROWS)
    assert abs(bad.kept) < 0.05
    [warning] = bad.warnings
    assert " of what the adapter learned: choose a format" in warning
    assert warning in caplog.text
    assert lk.check_export(lost, model, adapter).kept is None  # without rows there is no telling


def test_llama_cpp_continues_the_prompts_and_renders_the_chat(tmp_path, model):
    pytest.importorskip("xllamacpp")
    file, tok = tmp_path / "m.gguf", byte_level()
    lk.export_gguf(model, file, quantization="f32")
    found = lk.check_export(file, model, rows=ROWS)
    assert not found.skipped
    assert len(found.in_llama_cpp) == 4
    # llama.cpp's fp16 cache may turn a near tie; a wrong prompt would turn all of them at once
    assert sum(same for same, _ in found.in_llama_cpp) >= 0.5 * sum(n for _, n in found.greedy)
    [differs] = found.differs
    assert differs.startswith("llama.cpp begins a chat with a BOS token")
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    lk.export_gguf(model, file, quantization="f32", tokenizer=tok)
    assert not lk.check_export(file, model, tokenizer=tok).differs
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:5000])
    assert "failed" in runtime.continue_in_llama_cpp(
        tmp_path / "bad.gguf", [[1]], CHAT, 1, threads=1
    )


def test_another_tokenizer_is_a_warning(tmp_path, model, no_llama_cpp, caplog):
    tok = byte_level()
    tok.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32", tokenizer=tok)
    found = lk.check_export(tmp_path / "m.gguf", model)
    assert found.differs == ["the file's chat template gives other tokens for a chat"]
    assert "other tokens for a chat" in caplog.text
    assert not lk.check_export(tmp_path / "m.gguf", model, tokenizer=tok).warnings


def test_without_memory_or_llama_cpp_it_says_what_is_missing(
    tmp_path, model, no_llama_cpp, monkeypatch
):
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32")
    monkeypatch.setattr(checking, "free_bytes", lambda: 0)
    said = str(lk.check_export(tmp_path / "m.gguf", model))
    assert "not checked: greedy text, which would need twice the model's memory" in said
    assert "not checked: llama.cpp itself (pip install xllamacpp)" in said


def test_what_is_wrong_is_one_sentence(tmp_path, model):
    file = tmp_path / "m.gguf"
    other = write_model(tmp_path / "other", "qwen2", hidden_size=64)
    lk.export_gguf(other, file, quantization="f32")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "hello"}))
    for arguments, options, said in [
        ((file, model), {}, "was not made of this model"),
        ((tmp_path / "none.gguf", model), {}, "none.gguf"),
        ((file, other), {"tokens": 0}, "tokens must be at least 1"),
        ((file, other), {"rows": tmp_path / "none.jsonl"}, "none.jsonl"),
        ((file, other, tmp_path / "none"), {}, "none"),
    ]:
        with pytest.raises(lk.LorakitError, match=said):
            lk.check_export(*arguments, **options)
