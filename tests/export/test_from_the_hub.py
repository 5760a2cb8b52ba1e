"""Adapters by Hub id: each export writes what it writes of the directory, under the id's name."""

import huggingface_hub
import pytest

import lorakit as lk
from lorakit.files.gguf import read_header
from tests.export.models import ASKS, byte_level, train_adapter, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hub") / "model", "llama")


@pytest.fixture
def snapshot(model, monkeypatch):
    """An adapter with a template and a tokenizer of its own, which the Hub gives as me/mine."""
    path = model.parent / "0123abcd"  # as a commit is called
    if not path.exists():
        train_adapter(model, path)
        tok = byte_level()
        tok.chat_template = ASKS.replace("<|turn|>", "<s>")
        tok.save(path)
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    yield path
    assert set(asked) == {"me/mine"}


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("export", [lk.export_mlx, lk.export_for_server, lk.convert_adapter])
def test_directories_are_the_same(model, snapshot, tmp_path, export):
    for name, adapter in (("here", snapshot), ("there", "me/mine")):
        (tmp_path / name).mkdir()
        export(adapter, tmp_path / name / "out", base_model=model)
    found, expected = (contents(tmp_path / name / "out") for name in ("there", "here"))
    assert found == expected


def test_a_gguf_adapter_is_called_as_its_repository(model, snapshot, tmp_path):
    lk.export_gguf_adapter(snapshot, tmp_path / "here.gguf", base_model=model, name="mine")
    lk.export_gguf_adapter("me/mine", tmp_path / "there.gguf", base_model=model)
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert read_header(tmp_path / "there.gguf").metadata["general.name"] == "mine"


@pytest.mark.parametrize("merge", [True, False])
def test_ollama_gets_the_adapters_template(model, snapshot, tmp_path, merge):
    for name, adapter in (("here", snapshot), ("there", "me/mine")):
        options = {"adapter": adapter, "merge": merge, "quantization": "f32", "name": "mine"}
        lk.export_ollama(model, tmp_path / name, **options)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert "<s>" in (tmp_path / "there" / "template").read_text()


def test_the_check_takes_the_adapters_tokenizer(model, snapshot, tmp_path):
    lk.export_gguf(model, tmp_path / "m.gguf", quantization="f32", adapter="me/mine")
    assert lk.check_export(tmp_path / "m.gguf", model, "me/mine", tokens=64).differs == []
