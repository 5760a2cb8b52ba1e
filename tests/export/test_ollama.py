"""Directories for Ollama: the files, what the Modelfile says, and that llama.cpp runs them."""

import json
import re

import pytest
import torch

import lorakit as lk
from lorakit.files.gguf import read_header
from tests.export.go_template import GoTemplate
from tests.export.llama_cpp import LlamaCpp
from tests.export.models import ASKS, byte_level, train_adapter, write_model

IDS = [1, *range(4, 30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("ollama") / "Tiny Llama", "llama")
    (path / "chat_template.jinja").write_text(ASKS)
    values = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "eos_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def adapted(model):
    return train_adapter(model, model.parent / "adapter")


def simple(text):
    """The commands of one line each."""
    without = re.sub(r'^(TEMPLATE|SYSTEM) """.*?"""\n', "", text, flags=re.DOTALL | re.MULTILINE)
    return without.splitlines()


def long_text(text, word):
    [found] = re.findall(rf'^{word} """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    return found


def test_a_merged_model(model, adapted, tmp_path):
    out = tmp_path / "out"
    system = 'Say "yes".\nOr\t"no"'
    written = lk.export_ollama(
        model,
        out,
        adapter=model.parent / "adapter",
        quantization="f32",
        system=system,
        context_length=48,
    )
    gguf, modelfile = out / "Tiny Llama-F32.gguf", (out / "Modelfile").read_text()
    assert {file.name for file in out.iterdir()} == {
        *("Modelfile", "template", "system", "params"),
        gguf.name,
    }
    assert simple(modelfile) == [
        "FROM ./Tiny Llama-F32.gguf",
        'PARAMETER stop "</s>"',
        "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 48",
    ]
    assert long_text(modelfile, "SYSTEM") == (out / "system").read_text() == system
    template = long_text(modelfile, "TEMPLATE")
    assert template == (out / "template").read_text()
    chat = [{"Role": "system", "Content": "a"}, {"Role": "user", "Content": "b"}]
    said = "<|turn|>system\na</s><|turn|>user\nb</s><|turn|>assistant\n"
    assert GoTemplate(template).execute({"Messages": chat}) == said
    assert json.loads((out / "params").read_text()) == {
        "stop": ["</s>"],
        "temperature": 0.7,
        "repeat_penalty": 1.1,
        "num_ctx": 48,
    }
    assert read_header(gguf).metadata["llama.context_length"] == 48
    create = f"ollama create tiny-llama -f '{out / 'Modelfile'}'"
    assert written.commands[0].replace("'", "") == create.replace("'", "")
    assert str(written).endswith("\n\n" + "\n".join(written.commands))
    assert written.commands[1] == "ollama run tiny-llama"
    with LlamaCpp(gguf) as theirs:
        found = theirs.logits(IDS)
    with torch.no_grad():
        assert (found - adapted(torch.tensor([IDS]))[0]).abs().max() <= 1e-4  # fp32, other order


def test_an_adapter_apart(model, adapted, tmp_path):
    adapter = tmp_path / "adapter"
    lk.save_adapter(adapted, adapter)
    (adapter / "chat_template.jinja").write_text(ASKS.replace("assistant", "bot"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "system").write_text("of an earlier export")
    lk.export_ollama(model, out, adapter=adapter, merge=False, quantization="q8_0", name="mine")
    lines = simple((out / "Modelfile").read_text())
    assert lines[:2] == ["FROM ./mine-Q8_0.gguf", "ADAPTER ./mine-lora-F16.gguf"]
    assert not (out / "system").exists()
    assert "<|turn|>bot\n" in (out / "template").read_text()
    metadata = read_header(out / "mine-Q8_0.gguf").metadata
    assert "bot" in metadata["tokenizer.chat_template"]
    with LlamaCpp(out / "mine-Q8_0.gguf", out / "mine-lora-F16.gguf") as theirs:
        found = theirs.logits(IDS)
    with LlamaCpp(out / "mine-Q8_0.gguf") as theirs:
        plain = theirs.logits(IDS)
    with torch.no_grad():
        expected = adapted(torch.tensor([IDS]))[0]
    # 8 bits in weights and activations: near the adapted model, and far from the base
    assert (found - expected).abs().mean() < 0.1 * (plain - expected).abs().mean()


def test_a_template_that_is_not_simple_is_left_out(model, tmp_path):
    tok = byte_level()
    tok.chat_template = ASKS.replace("m.role", "m.role ~ loop.index")
    source = write_model(tmp_path / "m", "llama")
    tok.save_chat_template(source)
    written = lk.export_ollama(source, tmp_path / "out", quantization="q8_0")
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()
    assert not (tmp_path / "out" / "template").exists()
    assert "no TEMPLATE (what it writes between" in str(written)


@pytest.mark.parametrize("system", ['a """ b', "a\u00a0b", "a\u200bb"])
def test_a_system_prompt_that_a_modelfile_cannot_have(model, tmp_path, system):
    with pytest.raises(lk.LorakitError, match="a Modelfile has no way to write"):
        lk.export_ollama(model, tmp_path / "out", system=system)
    assert not (tmp_path / "out").exists()
